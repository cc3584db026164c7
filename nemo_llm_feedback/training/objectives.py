"""Objectives: pure functions of padded tensors, one group of hypotheses per row; none knows a model or trainer.

**Tensors.** All objectives take tensors of one shape [B, N] (B groups, N the largest group) as `Groups`.

**Rules that all share.** A member of −inf in any of the log-probabilities is infeasible and counts as padding; a NaN
in ``logp`` of a member is a numerical failure and is passed on to the loss, where the trainer's guard sees it. A group
with a member that could not be judged is dropped whole: judging only a part would reward whatever the judge cannot
read. Groups without signal (`signal`) are dropped; the loss is the mean over the others, or a zero that is still
connected to ``logp`` when none is left. Rewards, reference and old log-probabilities are constants: no gradient
reaches them. P̂ = softmax(logp) over a group's members is the *renormalised policy*.

**Members that nothing sampled.** A group is as a rule an enumeration, not a sample: the best of a beam, boosted beams,
swapped terms, an LLM's rewrite, each once, many of them with a tiny P̂. A mean over its members would be an estimate
over nothing; what stands for it are weights that are known exactly (`member_weights`):

- `distill`: right for any member. Its gradient P̂ − q is −q for such a member: bounded, and zero only once P̂ = q.
- `dpo`: right for any member, since a preference pair need not be sampled from the policy; which pair is taken decides
  what is learned (see there).
- `self_training`: right for any member that the reward puts first.
- `mwer`, `grpo`, `gspo`: with ``correction="kl_optimum"``, the default; ``proposal`` is for samples.
- `reinforce`: never; it estimates over samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_llm_feedback.training.group_math import (
    Groups,
    Members,
    bounded_exp,
    centred,
    constant,
    effective_members,
    group_kl,
    k3_penalty,
    leave_one_out,
    log_mass,
    log_softmax_over,
    member_mean,
    members,
    probabilities,
    usable_members,
)


@dataclass(frozen=True)
class ObjectiveOutput:
    """A loss with what is worth logging about it.

    Attributes:
        loss: scalar, mean over the groups with signal, connected to ``logp``.
        metrics: name → detached scalar. ``groups`` counts the groups with signal and is the weight for averaging the
            other metrics over steps or ranks; these are NaN where no group had signal.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def distill(groups: Groups, *, temperature: float, min_spread: float) -> ObjectiveOutput:
    """Soft N-best distillation: KL(q ‖ P̂) with q = softmax(reward / τ).

    For a reward of the form R = R' + logP_ref, q at τ = 1 is the optimum of max_π E_π[R'] − KL(π ‖ π_ref) over the
    group, the distribution of LLM rescoring; other τ sharpen or flatten it. The gradient with respect to ``logp`` is
    P̂ − q: no sampling noise, entries in [−1, 1], 0 where P̂ = q. The loss does not see probability outside the
    group; see `group_mass`.

    Args:
        groups: see `Groups`; ``old_logp`` is not used.
        temperature: τ > 0 in reward units; towards 0 the best member alone is the target.
        min_spread: see `signal`.

    Returns:
        Loss in nats ≥ 0; adds the metrics ``target_entropy`` (nats) and ``target_policy_mass`` = Σ q·P̂.
    """
    g = usable_members(groups, min_spread)
    log_q = log_softmax_over(g.rewards / temperature, g.valid)
    q = probabilities(log_q, g.valid)
    parts = {"target_entropy": -(q * log_q).sum(dim=1), "target_policy_mass": (q * g.policy).sum(dim=1)}
    return _output(g, group_kl(g.rewards / temperature, g.logp, g.valid), parts)


def member_weights(
    g: Members, logp: Tensor, *, correction: str, temperature: float, mixture: float
) -> tuple[Tensor, Tensor]:
    """How much each member of a group counts, and its advantage: [B, N] w with Σ w = 1, and R_i − Σ_j w_j R_j.

    ``proposal``: w = 1/N, for members that were *sampled* from ``logp``, repetitions kept: the Monte Carlo mean.

    ``none``: w = P̂, the self-normalised importance weights of an enumerated group: exact for the expected reward where
    the group holds all that the policy can produce. A member that another proposer supplied has P̂_i ≈ 0 and hence no
    gradient, however good it is. That is not an estimation error: the expected reward itself is flat there. All that
    remains is pressure among the policy's few probable members, which moves probability out of the group.

    ``kl_optimum``: w = (1 − ε)·P̂ + ε·q, the mixture of the policy and the KL-regularised optimum
    q = softmax(reward / τ) (see `distill`). Take P̂ ≈ 1 on the policy's favourite f and q ≈ 1 on a better foreign
    member b: then w_b (R_b − Σ w R) = ε(1 − ε)(R_b − R_f), however small P̂_b, and f gets the opposite. Members that
    are bad *and* improbable have w ≈ 0: pushing them further down gains nothing and takes probability out of the
    group. Where policy and optimum agree on one member the advantages that count are 0. ε = 0 is ``none``; ε = 1
    forgets the policy, and with it the difference between f and b.

    The baseline is the mean under the same weights, so Σ w_i A_i = 0: as much is pushed up as down.

    Args:
        g: the members that count.
        logp: [B, N] log-probability that P̂ is made of: now, or when the group was made.
        correction: ``none``, ``kl_optimum`` or ``proposal``.
        temperature: τ > 0 of q, in reward units; used by ``kl_optimum`` only.
        mixture: ε in [0, 1]; used by ``kl_optimum`` only.

    Raises:
        ValueError: unknown ``correction``.
    """
    if correction not in ("none", "kl_optimum", "proposal"):
        raise ValueError(f"unknown correction '{correction}': choose none, kl_optimum or proposal")
    if correction == "proposal":
        weights = g.valid / g.valid.sum(dim=1, keepdim=True).clamp(min=1)
    else:
        share = mixture if correction == "kl_optimum" else 0.0
        q = probabilities(log_softmax_over(g.rewards / temperature, g.valid), g.valid)
        policy = probabilities(log_softmax_over(constant(logp, g.logp, g.valid), g.valid), g.valid)
        weights = (1 - share) * policy + share * q
    rewards = centred(g.rewards, g.valid)  # of the order of their differences: float32 keeps these
    return weights, (rewards - (weights * rewards).sum(dim=1, keepdim=True)).masked_fill(~g.valid, 0.0)


def mwer(groups: Groups, *, correction: str, temperature: float, mixture: float, min_spread: float) -> ObjectiveOutput:
    """Expected reward over the N-best, after Prabhavalkar et al. 2018 with word errors → −R.

    ``none``: −Σ P̂_i (R_i − R̄), R̄ the plain group mean (it changes no gradient, since Σ P̂ = 1). Gradient
    −P̂_i (R_i − E_P̂[R]).

    ``kl_optimum``: the gradient is −w_i A_i with the weights and advantages of `member_weights`, both held constant:
    the policy gradient with w as the distribution that the members come from. The reported loss is −Σ w_i (R_i − R̄).

    ``proposal``: w ∝ exp(logp − old_logp), self-normalised importance sampling, for members that were *sampled* from
    old_logp, multiplicity kept. Bare P̂ would count the policy's probability twice there, once in how often a member
    was drawn and once in its weight. Not for beams, which sample from nothing.

    Args:
        groups: see `Groups`; ``proposal`` needs ``old_logp``, the log-probability under the sampler.
        correction, temperature, mixture: see `member_weights`.
        min_spread: see `signal`.

    Raises:
        ValueError: unknown ``correction``, or ``proposal`` without ``old_logp``.
    """
    g = usable_members(groups, min_spread, proposed=True)
    reward = centred(g.rewards, g.valid)
    if correction == "none":
        return _output(g, -(g.policy_grad * reward).sum(dim=1), {})
    if correction == "proposal":
        if groups.old_logp is None:
            raise ValueError("mwer with correction='proposal' needs old_logp, the log-probability under the sampler")
        ratio = g.logp - constant(groups.old_logp, g.logp, g.valid)
        weights = probabilities(log_softmax_over(ratio, g.valid), g.valid)
        return _output(g, -(weights * reward).sum(dim=1), {"effective_members": effective_members(weights)})
    weights, advantage = member_weights(g, g.logp, correction=correction, temperature=temperature, mixture=mixture)
    # The value is the expected reward under w; the bracket adds its gradient and exactly nothing to the value.
    surrogate = (weights * advantage * (g.logp - g.logp.detach())).sum(dim=1)
    parts = {"effective_members": effective_members(weights)}
    return _output(g, -((weights * reward).sum(dim=1) + surrogate), parts)


def reinforce(groups: Groups, *, min_spread: float) -> ObjectiveOutput:
    """Policy gradient on samples with the leave-one-out baseline: −(1/N) Σ A_i s_i (Kool et al. 2019).

    The gradient is an unbiased estimate of that of −E_π[R] for members that are independent samples of the policy,
    repetitions kept; it is meaningless for a beam list. With ``old_logp`` the members were sampled from an older
    policy and each term is weighted by the importance ratio exp(logp − old_logp), which keeps it unbiased.

    Args:
        groups: see `Groups`.
        min_spread: see `signal`; above 0 the estimate leaves out the groups it drops.
    """
    g = usable_members(groups, min_spread, proposed=True)
    advantage = leave_one_out(g.rewards, g.valid)
    if groups.old_logp is None:
        return _output(g, -member_mean(advantage * g.logp, g.valid), {})
    ratio = bounded_exp(g.logp - constant(groups.old_logp, g.logp, g.valid))
    return _output(g, -member_mean(advantage * ratio, g.valid), {"ratio_mean": member_mean(ratio, g.valid)})


def grpo(
    groups: Groups,
    *,
    correction: str,
    temperature: float,
    mixture: float,
    clip: float,
    kl_weight: float,
    standardize: bool,
    std_floor: float,
    min_spread: float,
    per_label: bool = False,
) -> ObjectiveOutput:
    """Group-relative policy optimisation (Shao et al. 2024) on whole sequences; with ``per_label`` GSPO.

    Loss of a group: −Σ w_i min(ρ_i A_i, clip(ρ_i, 1−ε, 1+ε) A_i) + β·KL, with ρ_i = exp(logp − old_logp), w and A of
    `member_weights` with the policy that made the group, A divided by its standard deviation under w if asked for
    (without it: Dr. GRPO, Liu et al. 2025). With ``proposal``, w = 1/N, it is the published form, for samples, with
    k3 as in `sequence_k3` for the KL. On an enumerated group that form spends its gradient on pushing improbable
    members further down, and k3 on holding each of them: its exp(ref_logp − logp) is e⁵ where a member has lost five
    nats. There the KL is that of the group, KL(P̂ ‖ P̂_ref), known exactly. The ratio is that of the sequence, so ε
    bounds the change of a whole transcript: with 0.2 one update may use a group up, and more updates on it do nothing
    until it is made anew (``feedback.refresh_every``).

    The objective ``gspo`` is ``per_label``: group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071),
    ρ_i = exp((logp − old_logp) / |y_i|) with |y| labels, so that ε bounds the mean change of a label, whatever the
    length, and one group bears several updates. Two things are ours: the weights of an enumerated group, and that the
    loss is multiplied by the mean length under w, Σ w_j |y_j|, a constant of the group: at ρ = 1 the gradient of a
    member of mean length is then −w_i A_i as in GRPO, and beside replay the terms keep their weights. Published clips
    (3e-4) are for texts of thousands of tokens that one policy samples thousands of times; ours is larger.

    Args:
        groups: see `Groups`; ``old_logp`` is ``logp`` when the group was made, None = the first update on it (ρ = 1).
        correction, temperature, mixture: see `member_weights`.
        clip: ε in (0, 1).
        kl_weight: β ≥ 0.
        standardize: divide by the standard deviation of the group's rewards under w.
        std_floor: reward units, > 0; smallest divisor, against blow-up where rewards are nearly equal.
        min_spread: see `signal`.
        per_label: the ratio of GSPO; needs ``groups.lengths``.

    Returns:
        Adds the metrics ``ratio_mean``, ``clip_fraction`` (of members, by weight, whose gradient the clip removed),
        ``effective_members`` and ``penalty``, the KL term without its weight.

    Raises:
        ValueError: ``per_label`` without ``groups.lengths``, or an unknown ``correction``.
    """
    g = usable_members(groups, min_spread, proposed=True)
    old = g.logp.detach() if groups.old_logp is None else constant(groups.old_logp, g.logp, g.valid)
    weights, advantage = member_weights(g, old, correction=correction, temperature=temperature, mixture=mixture)
    if standardize:
        std = (weights * advantage.square()).sum(dim=1).sqrt().clamp(min=std_floor)
        advantage = advantage / std.unsqueeze(1)
    lengths = _label_counts(groups, g) if per_label else torch.ones_like(g.logp)
    ratio = bounded_exp((g.logp - old) / lengths)
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
    gain = (weights * torch.minimum(ratio * advantage, clipped)).sum(dim=1)
    penalty = (k3_penalty if correction == "proposal" else group_kl)(g.logp, g.ref_logp, g.valid)
    parts = {
        "ratio_mean": (weights * ratio).sum(dim=1),
        "clip_fraction": (weights * (clipped < ratio * advantage)).sum(dim=1),
        "effective_members": effective_members(weights),
        "penalty": penalty,
    }
    return _output(g, kl_weight * penalty - (weights * lengths).sum(dim=1) * gain, parts)


def _label_counts(groups: Groups, g: Members) -> Tensor:
    """[B, N] labels of each member, at least 1: the empty text has a log-probability, too."""
    if groups.lengths is None:
        raise ValueError("gspo needs lengths, the number of labels of each member")
    return constant(groups.lengths, g.logp, g.valid).clamp(min=1)


gspo = partial(grpo, per_label=True)
"""GSPO; see `grpo`."""


def dpo(groups: Groups, *, beta: float, rejected: str, reference_free: bool, min_spread: float) -> ObjectiveOutput:
    """Direct preference optimisation (Rafailov et al. 2023): the best member by reward against another.

    Loss of a group: −log σ(β·margin) with margin = (s⁺ − s⁺_ref) − (s⁻ − s⁻_ref), or s⁺ − s⁻ with ``reference_free``;
    the gradient is ∓βσ(−β·margin) on the two.

    Which member is rejected decides what is learned. DPO's pairs are two answers of the reference, so ``probable``
    takes what the reference would say: its most probable member among those that are worse than the best by more than
    ``min_spread``. ``worst`` takes the lowest reward; of an enumerated group that is a text that nobody would have
    written, the margin grows by pushing it further down, and the transcript that is to be replaced is not touched.

    The loss is flat beyond a margin of a few 1/β nats. A better member that nothing sampled may stand far more than
    that below the reference's favourite; against the reference it then stops short of overtaking it.
    ``reference_free`` goes on until the policy itself prefers the better member by a few 1/β nats; what holds it then
    are replay and the guards.

    Args:
        groups: see `Groups`; ``old_logp`` is not used.
        beta: per nat, > 0; with the reference, the strength of the implied KL penalty.
        rejected: ``probable`` or ``worst``.
        reference_free: leave the reference out of the margin.
        min_spread: the margin filter: pairs with R⁺ − R⁻ ≤ ``min_spread`` are dropped (see `signal`).

    Returns:
        Adds the metrics ``preference_accuracy`` (implied reward ranks the pair as the reward does) and ``margin``, the
        implied reward difference in nats.

    Raises:
        ValueError: unknown ``rejected``.
    """
    if rejected not in ("probable", "worst"):
        raise ValueError(f"unknown rejected '{rejected}' of dpo: choose probable or worst")
    g = usable_members(groups, min_spread)
    shift = g.logp if reference_free else g.logp - g.ref_logp
    top, best = g.rewards.masked_fill(~g.valid, -torch.inf).max(dim=1, keepdim=True)
    worse = g.valid & (top - g.rewards > min_spread)
    score = g.ref_logp if rejected == "probable" else -g.rewards
    other = score.masked_fill(~worse, -torch.inf).argmax(dim=1, keepdim=True)
    margin = (shift.gather(1, best) - shift.gather(1, other)).squeeze(1)
    parts = {"preference_accuracy": (margin > 0).to(margin), "margin": margin}
    return _output(g, F.softplus(-beta * margin), parts)


def self_training(groups: Groups, *, label: str, min_confidence: float) -> ObjectiveOutput:
    """Negative log-likelihood of one pseudo-label per group: the baseline.

    A group with one member has a pseudo-label too, so no spread is asked for; the filter is the confidence of the
    label, its share softmax(score)_label of the group, where the score is what chose it.

    Args:
        groups: see `Groups`; ``old_logp`` is not used.
        label: ``reference``: the member that the frozen model finds most probable (plain self-training; rewards
            are not read), ``reward``: the best by reward (LLM-rescored pseudo-labels).
        min_confidence: in [0, 1]; groups whose label has a smaller share are dropped.

    Returns:
        Loss in nats per sequence; adds the metric ``confidence``.

    Raises:
        ValueError: unknown ``label``.
    """
    if label not in ("reference", "reward"):
        raise ValueError(f"unknown label '{label}' of self_training: choose reference or reward")
    score, valid = groups.rewards if label == "reward" else groups.ref_logp, groups.feasible
    usable = valid.any(dim=1) & (torch.isfinite(score.to(valid.device)) | ~valid).all(dim=1)
    score = constant(score, groups.logp, valid)
    confidence, best = probabilities(log_softmax_over(score, valid), valid).max(dim=1)
    g = members(groups, valid, usable & (confidence >= min_confidence))
    loss = -g.logp.gather(1, best.unsqueeze(1)).squeeze(1)
    return _output(g, loss, {"confidence": confidence})


def reference_kl(groups: Groups) -> ObjectiveOutput:
    """Keeps the ranking of a group near the reference's: KL(P̂_ref ‖ P̂), mean over groups of two or more members.

    This direction has the gradient P̂ − P̂_ref, bounded, and it goes on pulling at a member that the policy has given
    up, where KL(P̂ ‖ P̂_ref) falls silent. Both see ratios within the group only; `group_mass` sees the rest.

    Args:
        groups: see `Groups`; rewards are not read.
    """
    valid = groups.feasible
    g = members(groups, valid, valid.sum(dim=1) >= 2, judged=False)
    return _output(g, group_kl(g.ref_logp, g.logp, g.valid), {})


def sequence_k3(groups: Groups) -> ObjectiveOutput:
    """Schulman's k3 against the reference: mean over members of exp(δ) − δ − 1, δ = ref_logp − logp.

    For samples of the policy its mean is KL(π ‖ π_ref); on any other members it is a penalty ≥ 0 that is least where
    the policy gives each what the reference gave. Beyond δ = 10 nats exp(δ) is continued along its tangent.

    Args:
        groups: see `Groups`; rewards are not read.
    """
    valid = groups.feasible
    g = members(groups, valid, valid.any(dim=1), judged=False)
    return _output(g, k3_penalty(g.logp, g.ref_logp, g.valid), {})


def group_mass(groups: Groups) -> ObjectiveOutput:
    """Keeps probability inside the group: −log Σ_i p(h_i|x), for *distinct* members.

    The gradients of `distill`, `mwer` and `reference_kl` sum to zero over a group, so all of them let probability leak
    to texts outside it. This term is what is missing: KL(q ‖ P̂) − log Σ p(h_i) = −Σ q_i log p(h_i) − H(q), the
    cross-entropy of soft labels.

    Args:
        groups: see `Groups`; ``ref_logp`` only marks infeasible members, rewards are not read.
    """
    valid = groups.feasible
    g = members(groups, valid, valid.any(dim=1), judged=False)
    return _output(g, -log_mass(g.logp, g.valid), {})


OBJECTIVES: dict[str, Callable[..., ObjectiveOutput]] = {
    "distill": distill,
    "mwer": mwer,
    "reinforce": reinforce,
    "grpo": grpo,
    "gspo": gspo,
    "dpo": dpo,
    "self_training": self_training,
}
"""Name → objective; all take `Groups` and, by name, their `hyperparameters`."""


def hyperparameters(name: str) -> tuple[str, ...]:
    """The keyword arguments that an objective requires."""
    arguments = list(inspect.signature(OBJECTIVES[name]).parameters.values())[1:]
    return tuple(argument.name for argument in arguments if argument.default is argument.empty)


def _output(g: Members, loss: Tensor, parts: dict[str, Tensor]) -> ObjectiveOutput:
    """Averages the [B] loss and metrics over the kept groups, and adds the metrics that every objective has."""
    common = {"logp": member_mean(g.logp, g.valid), "kl_reference": group_kl(g.logp, g.ref_logp, g.valid)}
    if g.judged:
        common["reward"] = member_mean(g.rewards, g.valid)
        common["reward_policy"] = (g.policy * g.rewards).sum(dim=1)
        common["reward_best"] = g.rewards.masked_fill(~g.valid, -torch.inf).amax(dim=1)
    groups = g.kept.sum()
    metrics = {"groups": groups.to(g.logp), "signal_fraction": g.kept.to(g.logp).mean()}
    for name, values in {**common, **parts}.items():
        total = values.detach().masked_fill(~g.kept, 0.0).sum()
        metrics[name] = torch.where(groups > 0, total / groups.clamp(min=1), torch.nan)
    return ObjectiveOutput(loss.masked_fill(~g.kept, 0.0).sum() / groups.clamp(min=1), metrics)
