"""Exact CTC log p(y|x) for all hypotheses of a prefix trie, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.autograd import differentiable_once
from nemo_llm_feedback.asr.likelihood.inputs import check_labels, check_shapes, empty_result
from nemo_llm_feedback.core.trie import PrefixTrie

_INF = float("inf")


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
        label_in, blank_in = _emissions(log_probs, trie, keep)
        states = _forward_pass(label_in, blank_in, trie)
        end = lengths[trie.utterance[trie.leaf]]
        log_prob = states[2, end, trie.leaf]
        ctx.save_for_backward(states, label_in, log_prob, end)
        ctx.trie, ctx.like = trie, (log_probs.shape, log_probs.dtype)
        return log_prob.to(torch.promote_types(log_probs.dtype, torch.float32))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[H] → [B, T, V]."""
        states, label_in, log_prob, end = ctx.saved_tensors
        trie: PrefixTrie = ctx.trie
        (num_rows, num_frames, num_classes), dtype = ctx.like
        weight = torch.where(log_prob.isfinite(), grad.to(log_prob.dtype), torch.zeros_like(log_prob))
        flows = _backward_pass(states, label_in, weight, end, trie)
        label_flow, blank_flow = (flow.to(torch.promote_types(dtype, torch.float32)) for flow in flows)
        # Several nodes read the same (frame, class): sum their flows.
        row = trie.utterance * num_classes
        out = label_flow.new_zeros((num_frames, num_rows * num_classes))
        out.index_add_(1, row + trie.token.clamp_min(0), label_flow)
        out.index_add_(1, row + num_classes - 1, blank_flow)
        return out.view(num_frames, num_rows, num_classes).transpose(0, 1).to(dtype), None, None, None


def _emissions(log_probs: Tensor, trie: PrefixTrie, keep: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] y(t, token(k)), −inf at roots, and [T, K] y(t, blank); 0 at frames that must not be read."""
    wide = torch.float32 if log_probs.device.type == "mps" else torch.float64
    label_in = log_probs[trie.utterance, :, trie.token.clamp_min(0)].T.to(wide)
    blank_in = log_probs[:, :, -1].to(wide)[trie.utterance].T
    dropped = ~keep[trie.utterance].T
    label_in = label_in.masked_fill(dropped, 0.0).masked_fill_(trie.parent < 0, -_INF)
    return label_in.contiguous(), blank_in.masked_fill(dropped, 0.0).contiguous()


def _source(trie: PrefixTrie) -> Tensor:
    """[K] where X comes from, as an index into the concatenation of B and S, [2K]."""
    parent = trie.parent.clamp_min(0)
    repeats = trie.token == trie.token[parent]
    return torch.where(repeats, parent, parent + trie.num_nodes)


def _forward_pass(label_in: Tensor, blank_in: Tensor, trie: PrefixTrie) -> Tensor:
    """[3, T + 1, K] the states L, B and S after t frames."""
    num_frames, num_nodes = label_in.shape
    states = label_in.new_full((3, num_frames + 1, num_nodes), -_INF)
    ends, blanks, total = states
    states[1:, 0, trie.parent < 0] = 0.0
    source = _source(trie)
    for t in range(num_frames):
        entering = states[1:, t].reshape(-1).index_select(0, source)
        torch.logaddexp(ends[t], entering, out=ends[t + 1]).add_(label_in[t])
        torch.add(total[t], blank_in[t], out=blanks[t + 1])
        torch.logaddexp(ends[t + 1], blanks[t + 1], out=total[t + 1])
    return states


def _backward_pass(
    states: Tensor, label_in: Tensor, weight: Tensor, end: Tensor, trie: PrefixTrie
) -> tuple[Tensor, Tensor]:
    """[T, K] flow through each label and each blank emission: the gradient with respect to its log-probability.

    The β recursion in adjoint form: the gradient-weighted posterior of a state is passed back to its predecessors in
    proportion to their share of it.
    """
    ends, blanks, total = states
    num_frames, num_nodes = label_in.shape
    source = _source(trie)
    entering = states[1:, :-1].transpose(0, 1).flatten(1).index_select(1, source)
    stay = _share(ends[:-1] + label_in, ends[1:])
    enter = _share(entering + label_in, ends[1:])
    by_label = _share(ends, total)
    by_blank = _share(blanks, total)
    gamma = torch.zeros_like(total)  # of S
    gamma.index_put_((end, trie.leaf), weight, accumulate=True)
    label_flow, blank_flow = torch.zeros_like(label_in), torch.zeros_like(label_in)
    carried = label_in.new_zeros(num_nodes)  # gradient that reaches L(t+1) directly from L(t+2)
    into = label_in.new_zeros(2, num_nodes)  # gradient that reaches B(t+1) and S(t+1) from the children's labels
    for t in range(num_frames - 1, -1, -1):
        visits = gamma[t + 1] + into[1]
        label_flow[t] = visits * by_label[t + 1] + carried
        blank_flow[t] = visits * by_blank[t + 1] + into[0]
        carried = label_flow[t] * stay[t]
        into.zero_().view(-1).index_add_(0, source, label_flow[t] * enter[t])
        into[1] += blank_flow[t]
    return label_flow, blank_flow


def _share(part: Tensor, total: Tensor) -> Tensor:
    """exp(part − total), 0 where the total is impossible."""
    return (part - total).exp_().masked_fill_(total == -_INF, 0.0)
