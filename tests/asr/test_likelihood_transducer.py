"""RNN-T and TDT on the trie against enumeration, and against themselves under every change that must not matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from helpers.oracles import TinyDecoder, joint_tables, transducer_mass, transducer_oracle
from helpers.transducers import FAMILIES, LABELS, LENGTHS, WIDTH, Model, make_model, random_frames
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nemo_llm_feedback.asr.likelihood import transducer_log_prob
from nemo_llm_feedback.asr.likelihood.lattice import ArcScores, lattice_log_prob
from nemo_llm_feedback.asr.likelihood.prediction import prefix_outputs
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.trie import PrefixTrie

MORE_FAMILIES = [*FAMILIES, (2, 0, 1), (1, 2), (0, 3)]
HYPS = [[], [0], [1, 1], [0, 1, 2], [2, 2, 2], [0, 1], [0, 1]]


def log_prob(
    encoded: Tensor,
    lengths: Tensor,
    trie: PrefixTrie,
    model: Model,
    durations: Sequence[int] | None,
    budget: float = 256,
) -> Tensor:
    return transducer_log_prob(encoded, lengths, trie, *model, durations=durations or (), memory_budget_mb=budget)


def every_hyp_in_every_row() -> tuple[list[list[int]], list[int]]:
    pairs = [(hyp, row) for row in range(len(LENGTHS)) for hyp in HYPS]
    return [hyp for hyp, _ in pairs], [row for _, row in pairs]


def full_gradient(encoded: Tensor, total: Tensor, model: Model) -> list[Tensor | None]:
    params = [param for module in model for param in module.parameters()]
    return list(torch.autograd.grad(total, [encoded, *params], allow_unused=True))


@pytest.mark.parametrize("durations", MORE_FAMILIES)
def test_equals_the_sum_over_all_paths(durations: Sequence[int] | None) -> None:
    labels, rows = every_hyp_in_every_row()
    model, encoded = make_model(durations), random_frames(4, 5, 6)
    found = log_prob(encoded, LENGTHS, PrefixTrie.build(labels, rows), model, durations)
    expected = []
    for hyp, row in zip(labels, rows, strict=True):
        tables = joint_tables(encoded[row, : LENGTHS[row]], hyp, *model, num_durations=len(durations or ()))
        expected.append(transducer_oracle(*tables, hyp, durations=durations))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert found.isinf().any()


@pytest.mark.parametrize("durations", FAMILIES)
def test_sequences_tail_and_leak_together_have_probability_one(durations: Sequence[int] | None) -> None:
    num_frames, most = 3, 2
    model, encoded = make_model(durations), random_frames(num_frames, 6)
    with torch.no_grad():
        done, tail, leaked = transducer_mass(encoded, *model, max_labels=most, durations=durations)
    labels = [list(hyp) for n in range(most + 1) for hyp in itertools.product(range(LABELS), repeat=n)]
    trie = PrefixTrie.build(labels, [0] * len(labels))
    ours = log_prob(encoded[None], torch.tensor([num_frames]), trie, model, durations).exp()
    assert abs(ours.sum().item() + tail + leaked - 1.0) < 1e-9
    assert tail > 1e-4
    assert (leaked > 1e-4) == (durations is not None)
    expected = torch.tensor([done[tuple(hyp)] for hyp in labels], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("durations", FAMILIES)
def test_gradcheck_of_encoder_prediction_network_and_joint(durations: Sequence[int] | None) -> None:
    labels, rows = every_hyp_in_every_row()
    trie, model = PrefixTrie.build(labels, rows), make_model(durations)
    encoded = random_frames(4, 5, 6).requires_grad_()
    feasible = log_prob(encoded, LENGTHS, trie, model, durations).isfinite().detach()
    params = [param for module in model for param in module.parameters()]

    def run(encoded: Tensor, *_: Tensor) -> Tensor:
        return log_prob(encoded, LENGTHS, trie, model, durations, budget=0.001)[feasible]

    assert torch.autograd.gradcheck(run, (encoded, *params), fast_mode=True)


@pytest.mark.parametrize("durations", [None, (0, 1)])
def test_double_backward_raises(durations: Sequence[int] | None) -> None:
    encoded = random_frames(1, 3, 6).requires_grad_()
    total = log_prob(encoded, torch.tensor([3]), PrefixTrie.build([[0, 1]], [0]), make_model(durations), durations)
    (grad,) = torch.autograd.grad(total.sum(), encoded, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=5)), min_size=1, max_size=10),
    st.lists(st.integers(0, 8), min_size=3, max_size=3),
    st.sampled_from(FAMILIES),
    st.sampled_from([0.0001, 0.01, 256]),
    st.integers(0, 10**6),
)
def test_trie_equals_one_hypothesis_at_a_time(
    hyps: list[tuple[int, list[int]]], sizes: list[int], durations: Sequence[int] | None, budget: float, seed: int
) -> None:
    """So neither batch, padding, order, duplicates nor chunks matter."""
    lengths, model = torch.tensor(sizes), make_model(durations, seed=seed, scale=3.0)
    encoded = random_frames(3, 8, 6, seed=seed).requires_grad_()
    trie = PrefixTrie.build([labels for _, labels in hyps], [row for row, _ in hyps])
    together = log_prob(encoded, lengths, trie, model, durations, budget)
    alone = torch.cat(
        [
            log_prob(
                encoded[row : row + 1, : sizes[row]],
                lengths[row : row + 1],
                PrefixTrie.build([labels], [0]),
                model,
                durations,
            )
            for row, labels in hyps
        ]
    )
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)
    weight = torch.linspace(-1, 2, len(hyps), dtype=torch.float64)
    possible = together.isfinite()
    grads = [full_gradient(encoded, (total[possible] * weight[possible]).sum(), model) for total in (together, alone)]
    for mine, other in zip(*grads, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if mine is None else mine.sum(),
            zero.double() if other is None else other.sum(),
            atol=1e-8,
            rtol=0,
            check_dtype=False,
        )
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("durations", FAMILIES)
def test_impossible_hypotheses_have_zero_gradient(durations: Sequence[int] | None) -> None:
    """No frames, so no label can be emitted; the empty hypothesis has the empty path."""
    model, encoded = make_model(durations), random_frames(2, 4, 6).requires_grad_()
    trie = PrefixTrie.build([[0], [], [1, 2]], [0, 0, 1])
    found = log_prob(encoded, torch.tensor([0, 4]), trie, model, durations)
    assert found[:2].tolist() == [-math.inf, 0.0]
    for weight in ([3.0, 2.0, 0.0], [math.nan, 2.0, 0.0]):  # what a caller's own arithmetic with −inf may send back
        (grad,) = torch.autograd.grad(found, encoded, torch.tensor(weight, dtype=torch.float64), retain_graph=True)
        assert torch.equal(grad, torch.zeros_like(grad))


def test_hypothesis_too_long_for_durations_without_zero_has_zero_gradient() -> None:
    model, encoded = make_model((1, 2)), random_frames(1, 4, 6).requires_grad_()
    trie = PrefixTrie.build([[0, 1, 2, 0], [0, 1]], [0, 0])
    found = log_prob(encoded, torch.tensor([4]), trie, model, (1, 2))
    assert found.isfinite().tolist() == [False, True]
    weight = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    (mine,) = torch.autograd.grad(found, encoded, weight, retain_graph=True)
    (other,) = torch.autograd.grad(found[1], encoded)
    torch.testing.assert_close(mine, other)


def test_lattice_ignores_frames_behind_the_end() -> None:
    trie, lengths = PrefixTrie.build([[0, 1], [2]], [0, 1]), torch.tensor([3, 2])
    scores = [random_frames(*size, seed=len(size)).log_softmax(-1) for size in ((5, 5), (5, 5), (2, 5, 5))]
    expected = lattice_log_prob(ArcScores(*scores), trie=trie, lengths=lengths, durations=(0, 1))
    behind = torch.arange(5)[:, None] >= lengths[trie.utterance]
    broken = [score.masked_fill(behind, math.nan).requires_grad_() for score in scores]
    found = lattice_log_prob(ArcScores(*broken), trie=trie, lengths=lengths, durations=(0, 1))
    torch.testing.assert_close(found, expected)
    for grad in torch.autograd.grad(found.sum(), broken):
        assert grad.isfinite().all()
        assert grad.masked_select(behind).eq(0).all()
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("durations", FAMILIES)
def test_padding_and_broken_rows_stay_where_they_are(durations: Sequence[int] | None) -> None:
    model, clean = make_model(durations), random_frames(3, 5, 6)
    dirty = clean.clone()
    dirty[0, 3:] = math.nan
    dirty[1, 2, 1] = math.inf
    dirty.requires_grad_()
    lengths, trie = torch.tensor([3, 5, 5]), PrefixTrie.build([[0], [1], [0, 1], [2]], [0, 1, 2, 0])
    found = log_prob(dirty, lengths, trie, model, durations)
    assert found.isnan().tolist() == [False, True, False, False]
    clean.requires_grad_()
    kept = [0, 2, 3]
    expected = log_prob(clean, lengths, trie, model, durations)
    torch.testing.assert_close(found[kept], expected[kept])
    mine = full_gradient(dirty, found.sum(), model)
    other = full_gradient(clean, expected[kept].sum(), model)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b)
    assert mine[0] is not None
    assert mine[0][1].abs().sum() == 0


def test_each_cell_and_each_prefix_is_evaluated_once_within_the_budget() -> None:
    model = make_model(None)
    decoder, joint = model
    sizes: list[int] = []
    prefixes: list[int] = []
    evaluate, predict = joint.joint_after_projection, decoder.predict

    def count_cells(f: Tensor, g: Tensor) -> Tensor:
        logits = evaluate(f, g)
        sizes.append(logits.shape[:-1].numel())
        return logits

    def count_prefixes(y: Tensor | None, state=None, add_sos: bool = True, batch_size: int | None = None):
        out = predict(y, state, add_sos, batch_size)
        prefixes.append(out[0].shape[:2].numel())
        return out

    joint.joint_after_projection, decoder.predict = count_cells, count_prefixes
    labels = [[0, 1, 2, 0], [0, 1, 2, 1], [0, 1, 0], [2], [0, 1, 2, 0]]
    trie, lengths = PrefixTrie.build(labels, [0, 0, 0, 1, 0]), torch.tensor([8, 5])
    cell_bytes = 4 * (5 + LABELS + 1) * 8
    for cells in (1, 3, 16, 10**6):
        sizes.clear()
        prefixes.clear()
        log_prob(random_frames(2, 8, 6), lengths, trie, model, None, budget=cells * cell_bytes / 2**20)
        assert sum(sizes) == 8 * 7 + 5 * 2  # T × distinct prefixes of each utterance
        assert sum(prefixes) == trie.num_nodes
        assert max(sizes) <= cells
    assert len(sizes) == 1  # one chunk when the budget allows


@pytest.mark.parametrize("durations", FAMILIES)
def test_backward_skips_cells_without_gradient_and_nothing_else(
    durations: Sequence[int] | None,
) -> None:
    """In train mode every cell is evaluated again; without dropout that is the same function."""
    decoder, joint = make_model(durations, scale=60.0)
    encoded = random_frames(2, 60, 6).requires_grad_()
    labels, lengths = [[0, 1, 2, 0, 1], [0, 1, 2, 2], [1] * 4], torch.tensor([60, 40])
    trie, weight = PrefixTrie.build(labels, [0, 0, 1]), torch.tensor([1.0, -0.7, 0.0], dtype=torch.float64)
    evaluate, cells, grads = joint.joint_after_projection, [0], []

    def count_cells(f: Tensor, g: Tensor) -> Tensor:
        logits = evaluate(f, g)
        cells[0] += logits.shape[:-1].numel()
        return logits

    joint.joint_after_projection = count_cells
    for mode in (True, False):
        joint.train(mode)
        total = log_prob(encoded, lengths, trie, (decoder, joint), durations, budget=0.02) @ weight
        cells[0] = 0
        grads.append(full_gradient(encoded, total, (decoder, joint)))
        everything = 60 * 7 + 40 * 5
        assert cells[0] == everything if mode else cells[0] < 0.7 * everything
    for every, some in zip(*grads, strict=True):
        torch.testing.assert_close(some, every, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        ([[0, 1, 2], [0, 1], [2, 2, 1, 0], [], [0, 2]], [0, 0, 1, 1, 0]),
        ([[0, 1, 2], [], [2, 1], [2, 1, 0, 0]], [0, 1, 3, 3]),  # no branches: whole sequences
        ([[]], [0]),
    ],
)
def test_prediction_network_on_the_trie_equals_one_run_per_hypothesis(
    labels: list[list[int]], rows: list[int]
) -> None:
    decoder = TinyDecoder(LABELS, WIDTH, layers=2).double()
    trie = PrefixTrie.build(labels, rows)
    out = prefix_outputs(decoder, trie)
    for hyp, leaf in zip(labels, trie.leaf.tolist(), strict=True):
        expected, _ = decoder.predict(torch.tensor([hyp], dtype=torch.long), add_sos=True)
        torch.testing.assert_close(out[leaf], expected[0, -1], atol=1e-12, rtol=0)


def test_train_mode_dropout_repeats_its_masks_in_the_backward() -> None:
    decoder, joint = make_model(None)
    joint.joint_net.insert(1, nn.Dropout(0.5))
    joint.train()
    trie = PrefixTrie.build([[0, 1], [0, 2, 1]], [0, 1])
    encoded, direction = random_frames(2, 6, 6).requires_grad_(), random_frames(2, 6, 6, seed=5)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return log_prob(x, torch.tensor([6, 4]), trie, (decoder, joint), None, budget=0.001).sum()

    total = run(encoded)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    (grad,) = torch.autograd.grad(total, encoded)
    assert torch.equal(before, torch.get_rng_state())
    step = 1e-6
    slope = (run(encoded + step * direction) - run(encoded - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_leaving_eval_mode_before_the_backward_changes_nothing() -> None:
    """The joint is evaluated again in the backward; dropout entered the gradient when train mode was back by then."""
    decoder, joint = make_model(None)
    joint.joint_net.insert(1, nn.Dropout(0.5))
    joint.eval()
    trie, lengths = PrefixTrie.build([[0, 1]], [0]), torch.tensor([6])
    encoded = random_frames(1, 6, 6).requires_grad_()
    expected = full_gradient(encoded, log_prob(encoded, lengths, trie, (decoder, joint), None).sum(), (decoder, joint))
    total = log_prob(encoded, lengths, trie, (decoder, joint), None).sum()
    joint.train()
    found = full_gradient(encoded, total, (decoder, joint))
    assert all(module.training for module in joint.modules())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_joint_keeps_its_log_softmax_setting() -> None:
    decoder, joint = make_model(None)
    for setting in (None, True, False):
        joint.log_softmax = setting
        encoded = random_frames(1, 4, 6).requires_grad_()
        log_prob(encoded, torch.tensor([4]), PrefixTrie.build([[0, 1]], [0]), (decoder, joint), None).sum().backward()
        assert joint.log_softmax is setting


@pytest.mark.parametrize(
    ("durations", "dtype"), [*((family, torch.bfloat16) for family in FAMILIES), (None, torch.float16)]
)
def test_autocast_keeps_a_float32_lattice(durations: Sequence[int] | None, dtype: torch.dtype) -> None:
    decoder, joint = (module.float() for module in make_model(durations))
    trie, lengths = PrefixTrie.build([[0, 1, 2], [0, 1], [2]], [0, 0, 1]), torch.tensor([30, 20])
    encoded = random_frames(2, 30, 6).float().requires_grad_()
    exact = log_prob(encoded, lengths, trie, (decoder, joint), durations)
    reference = full_gradient(encoded, exact.sum(), (decoder, joint))
    with torch.autocast("cpu", dtype=dtype):
        rough = log_prob(encoded, lengths, trie, (decoder, joint), durations)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0.0)
    assert not torch.equal(rough, exact)
    for mine, other in zip(full_gradient(encoded, rough.sum(), (decoder, joint)), reference, strict=True):
        assert mine is not None
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < 0.05 * other.norm()


def test_no_hypotheses_can_be_trained_on() -> None:
    encoded = random_frames(2, 3, 6).requires_grad_()
    result = log_prob(encoded, torch.tensor([3, 3]), PrefixTrie.build([], []), make_model(None), None)
    assert result.shape == (0,)
    result.sum().backward()
    assert encoded.grad is not None


def test_frozen_parameters_get_no_gradient_and_the_rest_keep_theirs() -> None:
    decoder, joint = make_model(None)
    for param in joint.parameters():
        param.requires_grad_(False)
    encoded = random_frames(1, 4, 6).requires_grad_()
    log_prob(encoded, torch.tensor([4]), PrefixTrie.build([[0, 1]], [0]), (decoder, joint), None).sum().backward()
    assert all(param.grad is None for param in joint.parameters())
    assert encoded.grad is not None
    assert decoder.embed.weight.grad is not None


@pytest.mark.parametrize(
    ("labels", "lengths", "durations", "joint_durations", "error", "message"),
    [
        ([LABELS], [3], None, None, ValueError, "without blank"),
        ([0], [4], None, None, ValueError, "lengths"),
        ([0], [3, 3], None, None, ValueError, "expected"),
        ([0], [3], None, (0, 1), ConfigError, "0 durations but the joint has 2"),
        ([0], [3], (0, 1), None, ConfigError, "none for RNN-T"),
        ([0], [3], (0, 0), (0, 0), ConfigError, "distinct"),
        ([0], [3], (0,), (0,), ConfigError, "at least one > 0"),
    ],
)
def test_faults_are_named(
    labels: list[int],
    lengths: list[int],
    durations: Sequence[int] | None,
    joint_durations: Sequence[int] | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        log_prob(
            random_frames(1, 3, 6),
            torch.tensor(lengths),
            PrefixTrie.build([labels], [0]),
            make_model(joint_durations),
            durations,
        )
