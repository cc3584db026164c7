"""CTC on the trie against enumeration, PyTorch's CTC loss, and itself under every change that must not matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.oracles import ctc_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_llm_feedback.asr.likelihood import ctc_log_prob
from nemo_llm_feedback.core.trie import PrefixTrie

LENGTHS = torch.tensor([5, 3, 0, 1])
HYPS = [[], [0], [1, 1], [0, 1, 2], [2, 2, 2], [0, 1], [0, 1]]


def random_log_probs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).log_softmax(-1)


def every_hyp_in_every_row(rows: int = len(LENGTHS)) -> tuple[list[list[int]], list[int]]:
    pairs = [(hyp, row) for row in range(rows) for hyp in HYPS]
    return [hyp for hyp, _ in pairs], [row for _, row in pairs]


def test_equals_the_sum_over_all_frame_strings() -> None:
    labels, rows = every_hyp_in_every_row()
    log_probs = random_log_probs(4, 5, 4)
    found = ctc_log_prob(log_probs, LENGTHS, PrefixTrie.build(labels, rows))
    expected = [
        ctc_oracle(log_probs[row, : LENGTHS[row]], hyp, blank=3) for hyp, row in zip(labels, rows, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert found.isinf().any()


def test_all_label_sequences_together_have_probability_one() -> None:
    labels = [list(hyp) for n in range(5) for hyp in itertools.product(range(2), repeat=n)]
    log_probs = random_log_probs(1, 4, 3)
    total = ctc_log_prob(log_probs, torch.tensor([4]), PrefixTrie.build(labels, [0] * len(labels))).exp().sum()
    assert abs(total.item() - 1.0) < 1e-9


def test_gradcheck() -> None:
    labels, rows = every_hyp_in_every_row()
    trie = PrefixTrie.build(labels, rows)
    log_probs = random_log_probs(4, 5, 4).requires_grad_()
    feasible = ctc_log_prob(log_probs, LENGTHS, trie).isfinite().detach()
    assert torch.autograd.gradcheck(lambda x: ctc_log_prob(x, LENGTHS, trie)[feasible], (log_probs,))


def test_double_backward_raises() -> None:
    log_probs = random_log_probs(1, 4, 3).requires_grad_()
    log_prob = ctc_log_prob(log_probs, torch.tensor([4]), PrefixTrie.build([[0, 1]], [0]))
    (grad,) = torch.autograd.grad(log_prob.sum(), log_probs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_equals_torch_ctc_loss_and_its_gradient() -> None:
    torch.manual_seed(0)
    labels = [torch.randint(0, 30, (n,)).tolist() for n in (12, 20, 1, 7)]
    lengths = torch.tensor([60, 45, 50, 33])
    logits = torch.randn(4, 60, 31, requires_grad=True)
    weight = torch.tensor([1.0, -0.5, 2.0, 0.3])
    log_probs = logits.log_softmax(-1)
    ours = ctc_log_prob(log_probs, lengths, PrefixTrie.build(labels, range(4)))
    flat = torch.tensor([v for hyp in labels for v in hyp])
    sizes = torch.tensor([len(hyp) for hyp in labels])
    theirs = -torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), flat, lengths, sizes, blank=30, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    (mine,) = torch.autograd.grad(ours @ weight, logits, retain_graph=True)
    (other,) = torch.autograd.grad(theirs @ weight, logits)
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=6)), min_size=1, max_size=10),
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
    st.integers(0, 10**6),
)
def test_trie_equals_one_hypothesis_at_a_time(hyps: list[tuple[int, list[int]]], sizes: list[int], seed: int) -> None:
    lengths = torch.tensor(sizes)
    log_probs = random_log_probs(3, 9, 4, seed=seed).requires_grad_()
    rows = [row for row, _ in hyps]
    together = ctc_log_prob(log_probs, lengths, PrefixTrie.build([labels for _, labels in hyps], rows))
    alone = [
        ctc_log_prob(log_probs[row : row + 1, : sizes[row]], lengths[row : row + 1], PrefixTrie.build([labels], [0]))
        for row, labels in hyps
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-9, rtol=0)
    weight = torch.linspace(-1, 1, len(hyps), dtype=torch.float64)
    grads = [
        torch.autograd.grad(total[total.isfinite()] @ weight[total.isfinite()], log_probs)[0]
        for total in (together, torch.cat(alone))
    ]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=0)


def test_infeasible_hypotheses_have_zero_gradient() -> None:
    log_probs = random_log_probs(1, 2, 3).requires_grad_()
    trie = PrefixTrie.build([[0, 0], [0, 1, 0], [1]], [0, 0, 0])
    log_prob = ctc_log_prob(log_probs, torch.tensor([2]), trie)
    assert log_prob.tolist()[:2] == [-math.inf, -math.inf]
    (grad,) = torch.autograd.grad(log_prob, log_probs, torch.tensor([5.0, math.nan, 0.0], dtype=torch.float64))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_impossible_labels_leave_other_hypotheses_their_gradient() -> None:
    log_probs = random_log_probs(1, 4, 3).detach()
    log_probs[0, :, 1] = -math.inf
    log_probs.requires_grad_()
    log_prob = ctc_log_prob(log_probs, torch.tensor([4]), PrefixTrie.build([[0], [1], [0, 1]], [0, 0, 0]))
    assert log_prob.isfinite().tolist() == [True, False, False]
    (grad,) = torch.autograd.grad(log_prob.sum(), log_probs)
    assert grad.isfinite().all()
    assert grad[0, :, 0].abs().sum() > 0


def test_padding_and_broken_rows_stay_where_they_are() -> None:
    clean = random_log_probs(3, 5, 4)
    dirty = clean.clone()
    dirty[0, 3:] = math.nan  # behind the row's length
    dirty[1, 2, 1] = math.nan  # a broken row
    dirty.requires_grad_()
    lengths = torch.tensor([3, 5, 5])
    trie = PrefixTrie.build([[0], [1], [0, 1], [2]], [0, 1, 2, 0])
    found = ctc_log_prob(dirty, lengths, trie)
    expected = ctc_log_prob(clean, lengths, trie)
    assert found.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]])
    (grad,) = torch.autograd.grad(found.sum(), dirty)
    assert grad.isfinite().all()
    assert grad[1].abs().sum() == 0
    assert grad[0, 3:].abs().sum() == 0


def test_low_precision_input_gives_float32() -> None:
    log_probs = random_log_probs(2, 20, 5, dtype=torch.float32)
    trie = PrefixTrie.build([[0, 1, 2], [3]], [0, 1])
    lengths = torch.tensor([20, 20])
    half = log_probs.to(torch.bfloat16).requires_grad_()
    found = ctc_log_prob(half, lengths, trie)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ctc_log_prob(half.float(), lengths, trie))
    found.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_no_hypotheses_can_be_trained_on() -> None:
    log_probs = random_log_probs(2, 3, 4).requires_grad_()
    result = ctc_log_prob(log_probs, torch.tensor([3, 3]), PrefixTrie.build([], []))
    assert result.shape == (0,)
    result.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("labels", "row", "lengths", "message"),
    [
        ([4], 0, [3, 3], "without blank"),
        ([3], 0, [3, 3], "without blank"),
        ([0], 2, [3, 3], "batch has 2 rows"),
        ([0], 0, [4, 3], "lengths"),
        ([0], 0, [3], "expected"),
    ],
)
def test_faults_are_named(labels: list[int], row: int, lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ctc_log_prob(random_log_probs(2, 3, 4), torch.tensor(lengths), PrefixTrie.build([labels], [row]))
