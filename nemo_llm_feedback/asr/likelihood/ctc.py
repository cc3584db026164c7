"""Exact CTC log p(y|x) for all hypotheses of a prefix trie, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.autograd import differentiable_once
from nemo_llm_feedback.asr.likelihood.inputs import check_labels, check_shapes, empty_result, wide
from nemo_llm_feedback.core.trie import PrefixTrie

_INF = float("inf")
_BLOCK = 16  # frames


def ctc_log_prob(log_probs: Tensor, lengths: Tensor, trie: PrefixTrie) -> Tensor:
    """log p(h | x) of a CTC model: the sum over all frame sequences that collapse to h (Graves et al. 2006, eq. 6–8).

    Each node k has two states after t frames: L(t, k), the last frame was token(k), and B(t, k), it was a blank after
    prefix k; S = logaddexp(L, B) is the log-probability of having read prefix k. With y(t, ·) the log-probabilities of
    frame t,

        B(0, root) = 0, all other states −inf
        B(t+1, k) = S(t, k) + y(t, blank)
        L(t+1, k) = logaddexp(L(t, k), X(t, k)) + y(t, token(k)),   L(t, root) = −inf
        X(t, k)   = S(t, parent(k)), or B(t, parent(k)) where parent and node have the same token, since a repeated
                    label needs a blank between
        log p(h)  = S(T, leaf(h))

    One vectorised step per frame over all nodes of the batch, in float64 where the device has it.

    Args:
        log_probs: [B, T, V] natural-log probabilities of each frame (the output of a log-softmax), blank last; −inf
            allowed.
        lengths: [B] valid frames of each row, ≤ T. What stands behind them is never read.
        trie: the prefix trie of the H hypotheses.

    Returns:
        [H] natural-log probability in the trie's order, float32 (float64 for float64 input); −inf, with zero gradient,
        where the audio is too short; NaN, with zero gradient, where the row's valid frames hold a NaN or +inf.
        Differentiable once in ``log_probs``; the gradient is that of the formula, not PyTorch's ctc_loss shortcut that
        is right only behind a log-softmax.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
    """
    if trie.num_hyps == 0:
        return empty_result(log_probs)
    check_shapes(log_probs, lengths, trie)
    check_labels(trie, num_classes=log_probs.shape[-1])
    trie = trie.to(log_probs.device)
    lengths = lengths.to(log_probs.device)
    valid = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
    row_ok = ((log_probs < _INF).all(-1) | ~valid).all(-1)  # NaN compares false
    log_prob = _CTC.apply(log_probs, lengths, trie, valid & row_ok[:, None])
    return log_prob.masked_fill(~row_ok[trie.utterance[trie.leaf]], float("nan"))


class _CTC(torch.autograd.Function):
    """The recursion of :func:`ctc_log_prob` and its gradient."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, lengths: Tensor, trie: PrefixTrie, keep: Tensor) -> Tensor:
        """[H] log p from [B, T, V] log-probabilities; ``keep`` [B, T]: frames that are read."""
        states = _forward_pass(log_probs, trie, keep)
        end = lengths[trie.utterance[trie.leaf]]
        log_prob = torch.logaddexp(*states[:, end, trie.leaf])
        # The log-softmax before this keeps the log-probabilities anyway; what the nodes read of them would be more.
        ctx.save_for_backward(log_probs, keep, states, log_prob, end)
        ctx.trie = trie
        return log_prob.to(torch.promote_types(log_probs.dtype, torch.float32))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[H] → [B, T, V]."""
        log_probs, keep, states, log_prob, end = ctx.saved_tensors
        weight = torch.where(log_prob.isfinite(), grad.to(log_prob.dtype), torch.zeros_like(log_prob))
        return _backward_pass(states, log_probs, keep, weight, end, ctx.trie).to(log_probs.dtype), None, None, None


def _blocks(num_frames: int) -> list[slice]:
    """The frames in runs; beside the states only what belongs to one run is in memory."""
    return [slice(first, min(first + _BLOCK, num_frames)) for first in range(0, num_frames, _BLOCK)]


def _emissions(log_probs: Tensor, trie: PrefixTrie, keep: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] y(t, token(k)), −inf at roots, and [T, K] y(t, blank); 0 at frames that must not be read."""
    label_in = log_probs[trie.utterance, :, trie.token.clamp_min(0)].T.to(wide(log_probs))
    blank_in = log_probs[:, :, -1].to(label_in.dtype)[trie.utterance].T
    dropped = ~keep[trie.utterance].T
    label_in = label_in.masked_fill(dropped, 0.0).masked_fill_(trie.parent < 0, -_INF)
    return label_in.contiguous(), blank_in.masked_fill(dropped, 0.0).contiguous()


def _source(trie: PrefixTrie) -> Tensor:
    """[K] where X comes from, as an index into the concatenation of B and S, [2K]."""
    parent = trie.parent.clamp_min(0)
    repeats = trie.token == trie.token[parent]
    return torch.where(repeats, parent, parent + trie.num_nodes)


def _forward_pass(log_probs: Tensor, trie: PrefixTrie, keep: Tensor) -> Tensor:
    """[2, T + 1, K] the states L and B after t frames."""
    num_frames = log_probs.shape[1]
    states = log_probs.new_full((2, num_frames + 1, trie.num_nodes), -_INF, dtype=wide(log_probs))
    ends, blanks = states
    blanks[0, trie.parent < 0] = 0.0
    here = blanks[:1].repeat(2, 1)  # B and S after t frames
    flat, (blank_here, total) = here.view(-1), here
    source = _source(trie)
    for block in _blocks(num_frames):
        inputs = _emissions(log_probs[:, block], trie, keep[:, block])
        after = slice(block.start + 1, block.stop + 1)
        rows = (part.unbind() for part in (ends[block], ends[after], blanks[after], *inputs))
        for end, next_end, next_blank, label_in, blank_in in zip(*rows, strict=True):
            torch.logaddexp(end, flat.index_select(0, source), out=next_end).add_(label_in)
            blank_here.copy_(torch.add(total, blank_in, out=next_blank))
            torch.logaddexp(next_end, next_blank, out=total)
    return states


def _backward_pass(
    states: Tensor, log_probs: Tensor, keep: Tensor, weight: Tensor, end: Tensor, trie: PrefixTrie
) -> Tensor:
    """[B, T, V] gradient: the flow through each label and each blank emission, summed over the nodes that read it.

    The β recursion in adjoint form: the gradient-weighted posterior of a state is passed back to its predecessors in
    proportion to their share of it.
    """
    num_rows, num_frames, num_classes = log_probs.shape
    source = _source(trie)
    grad = log_probs.new_zeros(log_probs.numel(), dtype=torch.promote_types(log_probs.dtype, torch.float32))
    carried = states.new_zeros(trie.num_nodes)  # gradient that reaches L(t+1) directly from L(t+2)
    into = states.new_zeros(2 * trie.num_nodes)  # gradient that reaches B(t+1) and S(t+1) from the children's labels
    from_blank, from_total = into.view(2, -1)
    for block in reversed(_blocks(num_frames)):
        label_in, _ = _emissions(log_probs[:, block], trie, keep[:, block])
        stay, enter, label_flow, blank_flow = _shares(states[:, block.start : block.stop + 1], label_in, source)
        gamma = torch.zeros_like(label_in)  # of S after each frame, from the hypotheses that end there
        place = end - 1 - block.start
        ends_here = (place >= 0) & (place < len(gamma))
        at = (place.clamp(0, len(gamma) - 1), trie.leaf)
        gamma.index_put_(at, weight.masked_fill(~ends_here, 0.0), accumulate=True)
        rows = (reversed(part.unbind()) for part in (gamma, label_flow, blank_flow, stay, enter))
        for visits, label, blank, staying, entering in zip(*rows, strict=True):
            visits.add_(from_total)
            label.mul_(visits).add_(carried)
            blank.mul_(visits).add_(from_blank)
            torch.mul(label, staying, out=carried)
            into.zero_().index_add_(0, source, entering.mul_(label))
            from_total.add_(blank)
        frame = torch.arange(block.start, block.stop, device=grad.device)[:, None]
        first = (trie.utterance * num_frames + frame) * num_classes  # [n, K] place of class 0
        for token, flow in ((trie.token.clamp_min(0), label_flow), (num_classes - 1, blank_flow)):
            grad.index_add_(0, (first + token).view(-1), flow.to(grad.dtype).view(-1))
    return grad.view(num_rows, num_frames, num_classes)


def _shares(states: Tensor, label_in: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shares of the predecessors in the states after n frames.

    Args:
        states: [2, n + 1, K] L and B, also before the first of the frames.
        label_in: [n, K] y(t, token(k)).
        source: [K] see ``_source``.

    Returns:
        [n, K] each: of L(t) and of X(t) in L(t + 1), of L(t + 1) and of B(t + 1) in S(t + 1).
    """
    ends, blanks = states
    total = torch.logaddexp(ends, blanks)
    entering = torch.cat([blanks[:-1], total[:-1]], dim=1).index_select(1, source)
    before = ends[:-1] + label_in, entering.add_(label_in)
    stay, enter = (_share(part, ends[1:]) for part in before)
    return stay, enter, _share(ends[1:], total[1:]), _share(blanks[1:], total[1:])


def _share(part: Tensor, total: Tensor) -> Tensor:
    """exp(part − total), 0 where the total is impossible."""
    return (part - total).exp_().masked_fill_(total == -_INF, 0.0)
