"""Objectives against hand-computed values, identities, finite differences and exact expectations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from nemo_llm_feedback.training import objectives
from nemo_llm_feedback.training.objectives import OBJECTIVES, Groups, ObjectiveOutput, hyperparameters

SAMPLED = {"correction": "proposal", "temperature": 1.0, "mixture": 0.5}
ENUMERATED = {"correction": "kl_optimum", "temperature": 2.0, "mixture": 0.3}
SETTINGS: dict[str, list[dict]] = {
    "distill": [{"temperature": 0.7}, {"temperature": 3.0}],
    "mwer": [
        {"correction": "none", "temperature": 1.0, "mixture": 0.5},
        {"correction": "kl_optimum", "temperature": 2.0, "mixture": 0.3},
        {"correction": "proposal", "temperature": 1.0, "mixture": 0.5},
    ],
    "reinforce": [{}],
    "grpo": [
        {**SAMPLED, "clip": 0.2, "kl_weight": 0.1, "standardize": True, "std_floor": 0.1},
        {**SAMPLED, "clip": 0.2, "kl_weight": 0.0, "standardize": False, "std_floor": 0.1},
        {**ENUMERATED, "clip": 0.2, "kl_weight": 0.1, "standardize": True, "std_floor": 0.1},
    ],
    "gspo": [
        {**ENUMERATED, "clip": 0.02, "kl_weight": 0.1, "standardize": True, "std_floor": 0.1},
        {**SAMPLED, "clip": 0.02, "kl_weight": 0.0, "standardize": False, "std_floor": 0.1},
    ],
    "dpo": [
        {"beta": 0.3, "rejected": "probable", "reference_free": True},
        {"beta": 0.3, "rejected": "worst", "reference_free": False},
    ],
    "self_training": [
        {"label": "reward", "min_confidence": 0.0},
        {"label": "reference", "min_confidence": 0.2},
    ],
}
CASES = [
    pytest.param(name, settings, id=f"{name}-{i}")
    for name, many in SETTINGS.items()
    for i, settings in enumerate(many)
]
JUDGED = [case for case in CASES if case.values[1].get("label") != "reference"]  # plain self-training asks no reward
TRUE_LOSSES = [
    c for c in CASES if c.values[:1] != ("mwer",) or c.values[1]["correction"] != "kl_optimum"
]  # a surrogate


def regularise(
    function: Callable[[Groups], ObjectiveOutput], logp: Tensor, *, ref_logp: Tensor, mask: Tensor
) -> ObjectiveOutput:
    """Calls a regulariser; it must not read rewards."""
    return function(Groups(logp, torch.full_like(logp, math.nan), ref_logp, mask))


reference_kl = partial(regularise, objectives.reference_kl)
sequence_k3 = partial(regularise, objectives.sequence_k3)
group_mass = partial(regularise, objectives.group_mass)
REGULARISERS = [reference_kl, sequence_k3, group_mass]


def run(name: str, logp: Tensor, rewards: Tensor, ref: Tensor, mask: Tensor | None = None, old=None, **settings):
    """Calls an objective in double precision, with a spread floor of 0 where it takes one."""
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    if "min_spread" in hyperparameters(name):
        settings = {"min_spread": 0.0} | settings
    return OBJECTIVES[name](Groups(logp, rewards, ref, mask, old, torch.full_like(logp, 5)), **settings)


def example(seed: int = 0, shape: tuple[int, int] = (3, 4)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp (leaf), rewards, ref_logp, old_logp with ratios to ``logp`` inside and outside a clip of 0.2."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda scale: torch.randn(shape, dtype=torch.float64, generator=generator) * scale  # noqa: E731
    logp = (-6 + draw(1.5)).requires_grad_()
    return logp, draw(2.0), logp.detach() + draw(0.5), logp.detach() + draw(0.3)


def grad(loss: Tensor, logp: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logp, retain_graph=True)[0]


# --- hand-computed values -------------------------------------------------------------------------------------------

LOGP = torch.tensor([[math.log(0.2), math.log(0.1), math.log(0.1)]], dtype=torch.float64)  # P̂ = ½, ¼, ¼
REWARDS = torch.tensor([[0.0, 2.0, 4.0]], dtype=torch.float64)


def test_distill_by_hand():
    rewards = torch.log(torch.tensor([[0.125, 0.125, 0.75]], dtype=torch.float64))
    out = run("distill", LOGP, rewards, LOGP, temperature=1.0)
    # ⅛ ln(⅛/½) + ⅛ ln(⅛/¼) + ¾ ln(¾/¼) = ¾ ln 3 − ⅜ ln 2; not symmetric on purpose
    assert out.loss.item() == pytest.approx(0.75 * math.log(3) - 0.375 * math.log(2))
    assert out.metrics["target_entropy"].item() == pytest.approx(2.25 * math.log(2) - 0.75 * math.log(3))
    assert out.metrics["target_policy_mass"].item() == pytest.approx(0.0625 + 0.03125 + 0.1875)


def test_mwer_by_hand():
    logp = LOGP.clone().requires_grad_()
    out = run("mwer", logp, REWARDS, LOGP, correction="none", temperature=1.0, mixture=0.0)
    # E[R] = 1.5, group mean 2
    assert out.loss.item() == pytest.approx(0.5)
    expected = torch.tensor([[0.5 * 1.5, -0.25 * 0.5, -0.25 * 2.5]], dtype=torch.float64)
    torch.testing.assert_close(grad(out.loss, logp), expected)
    assert out.metrics["reward_policy"].item() == pytest.approx(1.5)
    assert out.metrics["reward"].item() == pytest.approx(2.0)
    assert out.metrics["reward_best"].item() == pytest.approx(4.0)


def test_mwer_kl_optimum_by_hand():
    logp = LOGP.clone().requires_grad_()
    rewards = torch.log(torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64))  # q = ¼, ¼, ½ at τ = 1
    out = run("mwer", logp, rewards, LOGP, correction="kl_optimum", temperature=1.0, mixture=0.5)
    # w = ⅜, ¼, ⅜; E_w[R] = ⅜ ln 2
    w, expected = torch.tensor([0.375, 0.25, 0.375], dtype=torch.float64), 0.375 * math.log(2)
    torch.testing.assert_close(grad(out.loss, logp)[0], -w * (rewards[0] - expected))
    assert out.loss.item() == pytest.approx(math.log(2) / 3 - expected)
    assert out.metrics["effective_members"].item() == pytest.approx(1 / (2 * 0.375**2 + 0.25**2))


def test_reinforce_by_hand():
    logp = LOGP.clone().requires_grad_()
    out = run("reinforce", logp, REWARDS, LOGP)
    # leave-one-out advantages: 0 − 3, 2 − 2, 4 − 1
    assert out.loss.item() == pytest.approx(-(-3 * math.log(0.2) + 3 * math.log(0.1)) / 3)
    torch.testing.assert_close(grad(out.loss, logp), torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64))


def test_grpo_by_hand():
    old = LOGP - torch.log(torch.tensor([[1.5, 1.0, 1.5]], dtype=torch.float64))  # ρ = 1.5, 1, 1.5
    logp = LOGP.clone().requires_grad_()
    settings = {**SAMPLED, "clip": 0.2, "kl_weight": 0.0, "standardize": False, "std_floor": 1.0}
    out = run("grpo", logp, REWARDS, LOGP, old=old, **settings)
    # A = −2, 0, 2: the bad member's ratio is not clipped from above, the good one's is, at 1.2
    assert out.loss.item() == pytest.approx(-(-2 * 1.5 + 0 + 2 * 1.2) / 3)
    torch.testing.assert_close(grad(out.loss, logp), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    assert out.metrics["clip_fraction"].item() == pytest.approx(1 / 3)
    assert out.metrics["ratio_mean"].item() == pytest.approx(4 / 3)
    standardised = run("grpo", LOGP, REWARDS, LOGP, old=old, **settings | {"standardize": True})
    assert standardised.loss.item() == pytest.approx(out.loss.item() / math.sqrt(8 / 3))


def test_grpo_clips_only_moves_that_went_far_enough():
    ratios = torch.tensor([[0.7, 0.7, 1.3, 1.3, 1.1, 0.9]], dtype=torch.float64)
    rewards = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)  # mean 0
    logp = torch.full((1, 6), -5.0, dtype=torch.float64, requires_grad=True)
    old = logp.detach() - ratios.log()
    settings = {**SAMPLED, "clip": 0.2, "kl_weight": 0.0, "standardize": False, "std_floor": 1.0}
    out = run("grpo", logp, rewards, logp, old=old, **settings)
    # bad and below 0.8, good and above 1.2: done; all others go on with −ρA/N
    keep = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(grad(out.loss, logp), -keep * ratios * rewards / 6)
    assert out.metrics["clip_fraction"].item() == pytest.approx(1 / 3)


def test_grpo_std_floor_bounds_nearly_equal_rewards():
    rewards = torch.tensor([[0.0, 1e-6]], dtype=torch.float64)
    logp = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    settings = {**SAMPLED, "clip": 0.2, "kl_weight": 0.0, "standardize": True, "std_floor": 0.5}
    out = run("grpo", logp, rewards, logp, **settings)
    torch.testing.assert_close(grad(out.loss, logp), torch.tensor([[5e-7, -5e-7]], dtype=torch.float64))


WORST = {"rejected": "worst", "reference_free": False}


def test_dpo_by_hand_and_is_the_logistic_loss():
    ref = LOGP - torch.tensor([[1.0, 7.0, 3.0]], dtype=torch.float64)  # shifts 1, 7, 3; best 3, worst 1
    out = run("dpo", LOGP, REWARDS, ref, beta=0.5, **WORST)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 2.0)))
    assert out.metrics["margin"].item() == pytest.approx(2.0)
    assert out.metrics["preference_accuracy"].item() == 1.0
    at_reference = run("dpo", LOGP, REWARDS, LOGP, beta=0.5, **WORST)
    assert at_reference.loss.item() == pytest.approx(math.log(2))
    far = run("dpo", LOGP, REWARDS, LOGP + torch.tensor([[0.0, 0.0, 4000.0]]), beta=1.0, **WORST)
    assert far.loss.item() == pytest.approx(4000.0)  # no overflow


def test_dpo_rejects_what_the_reference_would_say_and_not_what_nobody_says():
    rewards = torch.tensor([[0.0, -90.0, 5.0, 4.9]], dtype=torch.float64)
    logp = torch.tensor([[-1.0, -80.0, -20.0, -0.5]], dtype=torch.float64, requires_grad=True)
    settings = {"beta": 0.2, "reference_free": False, "min_spread": 0.5}
    moved = {
        kind: grad(run("dpo", logp, rewards, logp.detach(), rejected=kind, **settings).loss, logp)
        for kind in ("probable", "worst")
    }
    # the fourth is more probable, but hardly worse than the best
    torch.testing.assert_close(moved["probable"], torch.tensor([[0.1, 0.0, -0.1, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(moved["worst"], torch.tensor([[0.0, 0.1, -0.1, 0.0]], dtype=torch.float64))


def test_dpo_without_reference_goes_on_until_the_policy_prefers_the_better_member():
    ref = torch.tensor([[-1.0, -30.0]], dtype=torch.float64)
    logp = torch.tensor([[-8.0, -12.0]], dtype=torch.float64, requires_grad=True)  # moved by 25, 4 are lacking
    rewards = torch.tensor([[0.0, 5.0]], dtype=torch.float64)
    for free, margin in ((True, -4.0), (False, 25.0)):
        out = run("dpo", logp, rewards, ref, beta=0.5, rejected="probable", reference_free=free)
        assert out.metrics["margin"].item() == pytest.approx(margin)
        pull = 0.5 / (1 + math.exp(0.5 * margin))
        torch.testing.assert_close(grad(out.loss, logp), torch.tensor([[pull, -pull]], dtype=torch.float64))


def test_self_training_by_hand():
    ref = torch.log(torch.tensor([[0.3, 0.2, 0.1]], dtype=torch.float64))
    plain = run("self_training", LOGP, REWARDS * math.nan, ref, label="reference", min_confidence=0.0)
    assert plain.loss.item() == pytest.approx(-math.log(0.2))
    assert plain.metrics["confidence"].item() == pytest.approx(0.5)
    rescored = run("self_training", LOGP, REWARDS, ref, label="reward", min_confidence=0.0)
    assert rescored.loss.item() == pytest.approx(-math.log(0.1))
    one = torch.tensor([[True, False, False]])
    assert run("self_training", LOGP, REWARDS, ref, one, label="reward", min_confidence=1.0).metrics["groups"] == 1


def test_self_training_confidence_filter():
    ref = torch.log(torch.tensor([[0.3, 0.2, 0.1], [0.9, 0.05, 0.05]], dtype=torch.float64))
    logp = torch.log(torch.tensor([[0.5, 0.1, 0.1], [0.25, 0.1, 0.1]], dtype=torch.float64))
    out = run("self_training", logp, REWARDS.expand(2, 3), ref, label="reference", min_confidence=0.6)
    assert out.loss.item() == pytest.approx(-math.log(0.25))
    assert out.metrics["signal_fraction"].item() == 0.5


def test_regularisers_by_hand():
    ref = torch.log(torch.tensor([[0.1, 0.1, 0.2]], dtype=torch.float64))
    ones = torch.ones_like(LOGP, dtype=torch.bool)
    skewed = torch.log(torch.tensor([[0.25, 0.25, 1.5]], dtype=torch.float64))  # ⅛, ⅛, ¾
    expected = math.log(1 / 4) / 8 + math.log(1 / 2) / 8 + 3 * math.log(3) / 4  # Σ P̂_ref ln(P̂_ref / P̂)
    assert reference_kl(LOGP, ref_logp=skewed, mask=ones).loss.item() == pytest.approx(expected)
    pair = LOGP.expand(2, 3), skewed.expand(2, 3), torch.tensor([[True, True, True], [True, False, False]])
    alone = reference_kl(pair[0], ref_logp=pair[1], mask=pair[2])
    assert (alone.loss.item(), alone.metrics["groups"]) == (pytest.approx(expected), 1)
    # ratios ref/policy ½, 1, 2: (½ + ln 2 − 1 + 0 + 2 − ln 2 − 1) / 3
    assert sequence_k3(LOGP, ref_logp=ref, mask=ones).loss.item() == pytest.approx(0.5 / 3)
    assert group_mass(LOGP, ref_logp=ref, mask=ones).loss.item() == pytest.approx(-math.log(0.4))


def test_sequence_k3_averages_to_the_kl_divergence():
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    counts = (p * 10).round().long()  # members in exact proportion to the policy
    members = torch.repeat_interleave(torch.arange(3), counts)
    out = sequence_k3(p.log()[members][None], ref_logp=q.log()[members][None], mask=torch.ones(1, 10).bool())
    assert out.loss.item() == pytest.approx((p * (p / q).log()).sum().item())


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_reward_shift_changes_nothing(name, settings):
    logp, rewards, ref, old = example()
    first = run(name, logp, rewards, ref, old=old, **settings).loss
    shift = torch.tensor([[100.0], [-3.0], [7.0]], dtype=torch.float64)
    second = run(name, logp, rewards + shift, ref, old=old, **settings).loss
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(grad(first, logp), grad(second, logp))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_padding_changes_nothing(name, settings, bad):
    logp, rewards, ref, old = example()
    junk = torch.full((3, 2), bad, dtype=torch.float64)
    wide = torch.cat([junk[:, :1], logp.detach(), junk[:, 1:]], dim=1).requires_grad_()
    pad = lambda x: torch.cat([junk[:, :1], x, junk[:, 1:]], dim=1)  # noqa: E731
    mask = torch.tensor([False, True, True, True, True, False]).expand(3, 6)
    plain = run(name, logp, rewards, ref, old=old, **settings)
    padded = run(name, wide, pad(rewards), pad(ref), mask, pad(old), **settings)
    torch.testing.assert_close(plain.loss, padded.loss)
    gradient = grad(padded.loss, wide)
    torch.testing.assert_close(gradient[:, 1:-1], grad(plain.loss, logp))
    assert (gradient[:, [0, -1]] == 0).all()
    for key, value in plain.metrics.items():
        torch.testing.assert_close(value, padded.metrics[key])


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_infeasible_members_count_as_padding(name, settings):
    logp, rewards, ref, old = example()
    column = torch.zeros(3, 1, dtype=torch.float64)
    inf = column - math.inf
    cases = [(inf, inf, inf, inf), (inf, column, column, column), (column, inf, inf * 0, column)]
    if name in ("grpo", "gspo", "reinforce") or settings.get("correction") == "proposal":
        cases.append((column, column, column, inf))
    for cells in cases:
        wide = [torch.cat([x.detach(), cell], dim=1) for x, cell in zip((logp, ref, rewards, old), cells, strict=True)]
        wide[0].requires_grad_()
        mask = torch.ones(3, 5, dtype=torch.bool)
        out = run(name, wide[0], wide[2], wide[1], mask, wide[3], **settings)
        torch.testing.assert_close(out.loss, run(name, logp, rewards, ref, old=old, **settings).loss)
        assert torch.isfinite(grad(out.loss, wide[0])).all()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_members_may_come_in_any_order(name, settings):
    logp, rewards, ref, old = example()
    order = torch.tensor([2, 0, 3, 1])
    first = run(name, logp, rewards, ref, old=old, **settings).loss
    second = run(name, logp[:, order], rewards[:, order], ref[:, order], old=old[:, order], **settings).loss
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("name", "settings"), JUDGED)
def test_loss_is_the_mean_over_groups_with_signal(name, settings):
    logp, rewards, ref, old = example()
    rewards[1, 2] = math.nan
    out = run(name, logp, rewards, ref, old=old, **settings)
    rows = [run(name, *(x[i : i + 1] for x in (logp, rewards, ref)), old=old[i : i + 1], **settings) for i in range(3)]
    torch.testing.assert_close(out.loss, (rows[0].loss + rows[2].loss) / 2)
    assert (grad(out.loss, logp)[1] == 0).all()
    assert out.metrics["groups"] == 2
    assert out.metrics["signal_fraction"].item() == pytest.approx(2 / 3)
    assert rows[1].loss == 0


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_without_signal_the_loss_is_zero_and_connected(name, settings):
    logp, rewards, ref, old = example()
    nothing = torch.zeros_like(logp, dtype=torch.bool)
    out = run(name, logp, rewards, ref, nothing, old, **settings)
    assert out.loss == 0
    assert (grad(out.loss, logp) == 0).all()
    assert out.metrics["groups"] == 0
    assert torch.isnan(out.metrics["logp"])
    if "min_spread" in hyperparameters(name):
        assert run(name, logp, rewards * 0, ref, old=old, **settings).loss == 0


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_nan_log_probability_is_passed_on(name, settings):
    logp, rewards, ref, old = example()
    broken = logp.detach().clone()
    broken[0] = math.nan
    assert torch.isnan(run(name, broken, rewards, ref, old=old, **settings).loss)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_no_gradient_reaches_rewards_reference_or_old(name, settings):
    logp, rewards, ref, old = example()
    constants = [x.clone().requires_grad_() for x in (rewards, ref, old)]
    loss = run(name, logp, constants[0], constants[1], old=constants[2], **settings).loss
    assert torch.autograd.grad(loss, [logp, *constants], allow_unused=True)[1:] == (None, None, None)


@pytest.mark.parametrize("scale", [1.0, 300.0, 3e4])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_float32_stays_finite_at_any_scale(name, settings, scale):
    logp, rewards, ref, old = (x.detach().float() * scale for x in example())
    logp.requires_grad_()
    out = run(name, logp, rewards.float(), ref, old=old, **settings)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(grad(out.loss, logp)).all()
    assert out.loss.dtype == torch.float32


def test_distill_is_zero_at_the_optimum_and_its_gradient_is_the_difference():
    logp, rewards, ref, _ = example()
    at_optimum = run("distill", (rewards / 0.7 - 50).requires_grad_(), rewards, ref, temperature=0.7)
    assert at_optimum.loss.item() == pytest.approx(0.0, abs=1e-12)
    out = run("distill", logp, rewards, ref, temperature=0.7)
    q = torch.softmax(rewards / 0.7, dim=1)
    torch.testing.assert_close(grad(out.loss, logp) * 3, torch.softmax(logp, dim=1).detach() - q)


def test_distill_with_group_mass_is_the_cross_entropy_of_soft_labels():
    logp, rewards, ref, _ = example()
    mask = torch.ones_like(logp, dtype=torch.bool)
    total = run("distill", logp, rewards, ref, temperature=1.0).loss + group_mass(logp, ref_logp=ref, mask=mask).loss
    q = torch.softmax(rewards, dim=1)
    torch.testing.assert_close(total, (q * (q.log() - logp)).sum(dim=1).mean())


def test_distill_tends_to_rescored_self_training():
    logp, rewards, ref, _ = example()
    mask = torch.ones_like(logp, dtype=torch.bool)
    cold = run("distill", logp, rewards, ref, temperature=1e-4).loss + group_mass(logp, ref_logp=ref, mask=mask).loss
    torch.testing.assert_close(cold, run("self_training", logp, rewards, ref, label="reward", min_confidence=0.0).loss)


def test_grpo_at_ratio_one_is_reinforce_with_the_group_mean_as_baseline():
    logp, rewards, ref, _ = example()
    settings = {**SAMPLED, "clip": 0.2, "kl_weight": 0.0, "standardize": False, "std_floor": 1.0}
    grpo = grad(run("grpo", logp, rewards, ref, **settings).loss, logp)
    again = grad(run("grpo", logp, rewards, ref, old=logp.detach(), **settings).loss, logp)
    baseline = -(rewards - rewards.mean(dim=1, keepdim=True)) / 4 / 3
    torch.testing.assert_close(grpo, baseline)
    torch.testing.assert_close(again, baseline)
    leave_one = grad(run("reinforce", logp, rewards, ref).loss, logp)
    torch.testing.assert_close(leave_one, baseline * 4 / 3)


def test_grpo_kl_term_is_sequence_k3():
    logp, rewards, ref, old = example()
    settings = {**SAMPLED, "clip": 0.2, "standardize": True, "std_floor": 0.1}
    without = run("grpo", logp, rewards, ref, old=old, kl_weight=0.0, **settings)
    with_kl = run("grpo", logp, rewards, ref, old=old, kl_weight=0.3, **settings)
    k3 = sequence_k3(logp, ref_logp=ref, mask=torch.ones_like(logp, dtype=torch.bool)).loss
    torch.testing.assert_close(with_kl.loss - without.loss, 0.3 * k3)
    torch.testing.assert_close(with_kl.metrics["penalty"], k3.detach())


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_the_kl_of_an_enumerated_group_is_exact_and_bears_a_member_that_fell_far(name):
    logp, rewards, ref, _ = example()
    settings = {**ENUMERATED, "clip": 0.2, "standardize": True, "std_floor": 0.1}
    without, with_kl = (run(name, logp, rewards, ref, kl_weight=weight, **settings) for weight in (0.0, 0.3))
    log_p, log_ref = torch.log_softmax(logp, dim=1), torch.log_softmax(ref, dim=1)
    kl = (log_p.exp() * (log_p - log_ref)).sum(dim=1).mean()
    torch.testing.assert_close(with_kl.loss - without.loss, 0.3 * kl)
    fallen = torch.tensor([[-50.0, -1.0]], dtype=torch.float64, requires_grad=True)
    start, worth = torch.tensor([[-1.0, -9.0]], dtype=torch.float64), torch.tensor([[0.0, 5.0]], dtype=torch.float64)
    for correction in ("kl_optimum", "proposal"):
        held = {**settings, "correction": correction, "kl_weight": 0.04}
        free = {**held, "kl_weight": 0.0}
        pull = [grad(run(name, fallen, worth, start, old=fallen, **s).loss, fallen)[0, 0] for s in (held, free)]
        assert bool(abs(pull[0] - pull[1]) < 0.1) is (correction == "kl_optimum"), pull


RATIOS = {"clip": 0.2, "kl_weight": 0.0, "standardize": False, "std_floor": 1.0}


def test_grpo_of_an_enumerated_group_starts_with_the_gradient_of_mwer_and_keeps_it_where_weights_are_old():
    logp, rewards, ref, old = example()
    mwer = grad(run("mwer", logp, rewards, ref, **ENUMERATED).loss, logp)
    first = run("grpo", logp, rewards, ref, **ENUMERATED, **RATIOS)
    torch.testing.assert_close(grad(first.loss, logp), mwer)
    assert first.loss.item() == pytest.approx(0.0, abs=1e-12)  # the baseline is the mean under the same weights
    later = grad(run("grpo", logp, rewards, ref, old=old, **ENUMERATED, **{**RATIOS, "clip": 0.999}).loss, logp)
    w = 0.7 * torch.softmax(old, dim=1) + 0.3 * torch.softmax(rewards / 2.0, dim=1)
    advantage = rewards - (w * rewards).sum(dim=1, keepdim=True)
    torch.testing.assert_close(later, -w * (logp.detach() - old).exp() * advantage / 3)


def test_gspo_gradient_is_that_of_grpo_times_the_mean_length_over_the_members_own():
    logp, rewards, ref, _ = example()
    lengths = torch.tensor([[1, 2, 3, 4], [0, 1, 1, 1], [7, 7, 7, 7]])  # an empty text counts as one label
    groups = Groups(logp, rewards, ref, torch.ones_like(lengths, dtype=torch.bool), None, lengths)
    for weights in (SAMPLED, ENUMERATED):
        settings = {**weights, **RATIOS, "min_spread": 0.0}
        grpo, gspo = (grad(OBJECTIVES[name](groups, **settings).loss, logp) for name in ("grpo", "gspo"))
        share = 0.3 * torch.softmax(rewards / 2.0, dim=1) + 0.7 * torch.softmax(logp.detach(), dim=1)
        w = share if weights is ENUMERATED else torch.full_like(share, 0.25)
        labels = lengths.clamp(min=1).double()
        torch.testing.assert_close(gspo, grpo * (w * labels).sum(dim=1, keepdim=True) / labels)


def test_gspo_clips_by_the_mean_change_of_a_label_and_grpo_by_that_of_the_sequence():
    logp = torch.full((1, 2), -5.0, dtype=torch.float64, requires_grad=True)
    old = logp.detach() - torch.tensor([[1.5, 0.0]], dtype=torch.float64)  # of 10 labels: 0.15 each, ratio 1.16
    lengths, rewards = torch.tensor([[10, 10]]), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    groups = Groups(logp, rewards, logp.detach(), lengths > 0, old, lengths)
    settings = {**SAMPLED, **RATIOS, "min_spread": 0.0}
    out = {name: OBJECTIVES[name](groups, **settings) for name in ("grpo", "gspo")}
    assert {name: found.metrics["clip_fraction"].item() for name, found in out.items()} == {"grpo": 0.5, "gspo": 0.0}
    torch.testing.assert_close(grad(out["grpo"].loss, logp), torch.tensor([[0.0, 0.5]], dtype=torch.float64))
    expected = torch.tensor([[-math.exp(0.15) / 2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(grad(out["gspo"].loss, logp), expected)
    with pytest.raises(ValueError, match="gspo needs lengths"):
        OBJECTIVES["gspo"](groups._replace(lengths=None), **settings)


def test_mwer_corrections_meet_the_bare_form():
    logp, rewards, ref, _ = example()
    bare = run("mwer", logp, rewards, ref, correction="none", temperature=1.0, mixture=0.5)
    pure = run("mwer", logp, rewards, ref, correction="kl_optimum", temperature=1.0, mixture=0.0)
    flat = run(
        "mwer", logp, rewards, ref, old=torch.zeros_like(ref), correction="proposal", temperature=1.0, mixture=0
    )
    for other in (pure, flat):
        torch.testing.assert_close(bare.loss, other.loss)
        torch.testing.assert_close(grad(bare.loss, logp), grad(other.loss, logp))


def test_mwer_proposal_on_policy_weighs_samples_equally():
    logp, rewards, ref, _ = example()
    out = run("mwer", logp, rewards, ref, old=logp, correction="proposal", temperature=1.0, mixture=0.0)
    baseline = -(rewards - rewards.mean(dim=1, keepdim=True)) / 4 / 3
    torch.testing.assert_close(grad(out.loss, logp), baseline)
    assert out.metrics["effective_members"].item() == pytest.approx(4.0)


def test_kl_reference_metric_and_regulariser_vanish_at_the_reference():
    logp, rewards, _, _ = example()
    mask = torch.ones_like(logp, dtype=torch.bool)
    shifted = logp.detach() - 5  # the group distribution does not see a common shift, k3 does
    assert reference_kl(logp, ref_logp=shifted, mask=mask).loss.item() == pytest.approx(0.0, abs=1e-12)
    assert run("reinforce", logp, rewards, shifted).metrics["kl_reference"].item() == pytest.approx(0.0, abs=1e-12)
    expected = math.exp(-5) + 5 - 1
    assert sequence_k3(logp, ref_logp=shifted, mask=mask).loss.item() == pytest.approx(expected)


# --- filters ---------------------------------------------------------------------------------------------------------


def test_dpo_margin_filter():
    logp, rewards, ref, _ = example()
    rewards[0] = torch.tensor([0.0, 0.1, 0.2, 0.3])
    settings = {"beta": 1.0, "rejected": "probable", "reference_free": False}
    assert run("dpo", logp, rewards, ref, min_spread=0.31, **settings).metrics["groups"] == 2
    assert run("dpo", logp, rewards, ref, min_spread=0.29, **settings).metrics["groups"] == 3


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), TRUE_LOSSES)
def test_gradient_against_finite_differences(name, settings):
    logp, rewards, ref, old = example(seed=3)
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True, True, False, False]])
    assert torch.autograd.gradcheck(lambda x: run(name, x, rewards, ref, mask, old, **settings).loss, (logp,))


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_regulariser_gradient_against_finite_differences(regulariser):
    logp, _, ref, _ = example(seed=4)
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])
    assert torch.autograd.gradcheck(lambda x: regulariser(x, ref_logp=ref, mask=mask).loss, (logp,))


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_regularisers_ignore_padding_and_empty_batches(regulariser):
    logp, _, ref, _ = example()
    mask = torch.tensor([[True, True, True, False]] * 3)
    junk = torch.full((3, 1), math.nan, dtype=torch.float64)
    wide = torch.cat([logp.detach()[:, :3], junk], 1).requires_grad_()
    out = regulariser(wide, ref_logp=torch.cat([ref[:, :3], junk], 1), mask=mask)
    torch.testing.assert_close(out.loss, regulariser(logp, ref_logp=ref, mask=mask).loss)
    assert torch.isfinite(grad(out.loss, wide)).all()
    none = regulariser(wide, ref_logp=ref, mask=torch.zeros_like(mask))
    assert none.loss == 0
    assert (grad(none.loss, wide) == 0).all()


# --- interface ------------------------------------------------------------------------------------------------------


def test_every_objective_names_its_hyperparameters_and_hides_no_default():
    assert set(SETTINGS) == set(OBJECTIVES)
    for name, many in SETTINGS.items():
        for settings in many:
            assert set(hyperparameters(name)) - {"min_spread"} == set(settings)
        logp, rewards, ref, _ = example()
        with pytest.raises(TypeError, match="missing"):
            OBJECTIVES[name](Groups(logp, rewards, ref, logp > -99))


def test_wrong_choices_are_named():
    logp, rewards, ref, _ = example()
    with pytest.raises(ValueError, match="choose none, kl_optimum or proposal"):
        run("mwer", logp, rewards, ref, correction="uniform", temperature=1.0, mixture=0.5)
    with pytest.raises(ValueError, match="needs old_logp"):
        run("mwer", logp, rewards, ref, correction="proposal", temperature=1.0, mixture=0.5)
    with pytest.raises(ValueError, match="choose reference or reward"):
        run("self_training", logp, rewards, ref, label="oracle", min_confidence=0.0)
    with pytest.raises(ValueError, match="choose probable or worst"):
        run("dpo", logp, rewards, ref, beta=1.0, rejected="random", reference_free=False)
    with pytest.raises(ValueError, match="choose none, kl_optimum or proposal"):
        run("grpo", logp, rewards, ref, **{**SETTINGS["grpo"][0], "correction": "uniform"})
