"""Sums over all paths of a transducer lattice (RNN-T, TDT), and the gradient, one vectorised step per anti-diagonal.

One recursion serves RNN-T (Graves 2012, arXiv:1211.3711, eq. 16–18) and TDT (Xu et al. 2023, arXiv:2304.06795, eq. 7).
A path starts at (t = 0, root). A *blank arc* of move m goes from (t, node) to (t + m, node); a *label arc* of move m
goes from (t, parent) to (t + m, node). RNN-T has the blank move 1 and the label move 0; TDT has a blank arc for each
duration > 0 and a label arc for each duration. With T frames in the utterance,

    α(0, root) = 0
    α(t, k)    = logsumexp over  α(t − m, k)         + blank_m(t − m, k)     for each blank move m
                                 α(t − m, parent(k)) + label_m(t − m, k)     for each label move m         0 ≤ t < T
    log p(h)   = logsumexp over  α(T − m, leaf(h))   + blank_m(T − m, leaf(h))

so the last move is a blank that reaches T exactly; a label arc that lands on T, or any arc beyond it, is part of no
complete path. With no frames (T = 0) the empty hypothesis has the one empty path, log p = 0.

All arcs lead to a larger t + depth, so the cells of one anti-diagonal d = t + depth(k) are independent: the cell of
node k on diagonal d is t = d − depth(k), and its sources lie on diagonals d − m (blank) and d − m − 1 (label). Arcs
out of frames t < 0 and t ≥ T have score −inf, so what α holds there reaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.autograd import differentiable_once
from nemo_llm_feedback.asr.likelihood.inputs import wide
from nemo_llm_feedback.core.trie import PrefixTrie

_INF = float("inf")
_BLOCK = 64  # diagonals


class ArcScores(NamedTuple):
    """Log-probabilities out of the cells (t, node), each part of the joint's output normalised by itself.

    Attributes:
        blank: [T, K] of blank at (t, k).
        label: [T, K] of token(k) at (t, parent(k)); ignored at roots.
        durations: [M, T, K] of the i-th duration at (t, k); M = 0 for RNN-T. Frames t ≥ T of the node's utterance are
            ignored in all three.
    """

    blank: Tensor
    label: Tensor
    durations: Tensor


def lattice_log_prob(
    scores: ArcScores, *, trie: PrefixTrie, lengths: Tensor, durations: tuple[int, ...] = ()
) -> Tensor:
    """Log-probability of every hypothesis from the scores of the arcs.

    The recursion runs in float64 where the device has it, since α grows with the utterance while the gradient needs
    differences of α; it is a small part of the cost.

    Args:
        scores: the arcs' scores; at least one frame.
        trie: the prefix trie on the scores' device, with at least one hypothesis.
        lengths: [B] frames T of each batch row.
        durations: frames that each duration stands for; none for RNN-T.

    Returns:
        [H] natural-log probability, ≤ 0, of the scores' dtype; −inf where no path exists. Differentiable once in the
        scores; an infeasible hypothesis contributes zero gradient.
    """
    return _Lattice.apply(*scores, _Shape(trie, lengths, durations))


class _Shape:
    """The trie as the recursion sees it: K nodes, D diagonals, Mb blank moves and Ml label moves.

    Args:
        trie: the prefix trie.
        lengths: [B] frames of each batch row.
        durations: TDT's durations in frames; none for RNN-T.
    """

    def __init__(self, trie: PrefixTrie, lengths: Tensor, durations: tuple[int, ...]) -> None:
        self.is_root, self.depth, self.leaf = trie.parent < 0, trie.depth, trie.leaf  # [K], [K], [H]
        self.parent = trie.parent.clamp_min(0)  # [K], 0 at roots
        self.frames = lengths[trie.utterance]  # [K] T of the node's utterance
        ends = self.frames + trie.depth
        self.last = ends[trie.leaf]  # [H] the diagonal T + depth on which the hypothesis ends
        self.num_diagonals = max(int(ends.max()), max(durations, default=1) + 1) + 1
        # Indices of the durations > 0, which a blank may have.
        self.moving = tuple(i for i, duration in enumerate(durations) if duration > 0)
        self.blank_moves = tuple(durations[i] for i in self.moving) or (1,)
        self.label_moves = durations or (0,)
        # Rows of −inf before the first diagonal, as many as an arc can reach back.
        self.pad = max(*self.blank_moves, *(move + 1 for move in self.label_moves))

    def source_rows(self, moves: tuple[int, ...], *, device: torch.device) -> Tensor:
        """[D, M] padded row that the arc of each move into diagonal d comes from."""
        diagonal = torch.arange(self.num_diagonals, device=device)[:, None]
        return diagonal + self.pad - torch.tensor(moves, device=device)

    def blocks(self) -> list[slice]:
        """The diagonals in runs; beside α only what belongs to the arcs of one run is in memory."""
        stop = self.num_diagonals
        return [slice(first, min(first + _BLOCK, stop)) for first in range(0, stop, _BLOCK)]

    def frames_of(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """[R, K] frame of the cells of diagonals ``first`` … ``stop`` − 1, and whether the node has no such frame."""
        frame = torch.arange(first, stop, device=self.depth.device)[:, None] - self.depth
        outside = (frame < 0) | (frame >= self.frames)
        return frame, outside


class _Lattice(torch.autograd.Function):
    """The recursion of :func:`lattice_log_prob` and its gradient."""

    @staticmethod
    def forward(ctx: Any, blank: Tensor, label: Tensor, durations: Tensor, shape: _Shape) -> Tensor:
        """[H] log p from the parts of :class:`ArcScores`."""
        scores = ArcScores(blank, label, durations)
        alpha = _forward_pass(scores, shape)
        # [Mb, H] score of all paths to T whose last blank has each of the moves; −inf where there is none.
        rows = shape.source_rows(shape.blank_moves, device=alpha.device)[shape.last].T
        ends = alpha[rows, shape.leaf] + _last_blanks(scores, shape)
        log_prob = ends.logsumexp(0)
        no_frames = shape.frames[shape.leaf] == 0
        log_prob = log_prob.masked_fill(no_frames & shape.is_root[shape.leaf], 0.0)
        ctx.save_for_backward(blank, label, durations, alpha, ends, log_prob)
        ctx.shape = shape
        return log_prob.to(blank.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """[H] → gradients of the three parts."""
        blank, label, durations, alpha, ends, log_prob = ctx.saved_tensors
        weight = torch.where(log_prob.isfinite(), grad.to(log_prob.dtype), torch.zeros_like(log_prob))
        # A hypothesis's weight splits over its possible last blanks by their posterior.
        end_flow = (ends - log_prob.masked_fill(log_prob == -_INF, _INF)).exp_() * weight
        flows = _backward_pass(alpha, ArcScores(blank, label, durations), end_flow, ctx.shape)
        return flows[0], flows[1], flows[2:], None


def _arcs(scores: ArcScores, shape: _Shape, block: slice) -> tuple[Tensor, Tensor]:
    """Scores of the arcs into the n diagonals of a block, −inf where there is none: [Mb, n, K] and [Ml, n, K]."""
    size, pad = block.stop - block.start, shape.pad
    # Of the cells that the arcs come from: [pad + n, K].
    frame, outside = shape.frames_of(block.start - pad, block.stop)
    place = _flat(frame.clamp_(0, len(scores.blank) - 1))
    blank = _take(scores.blank, place).masked_fill_(outside, -_INF)
    label = _take(scores.label, place).masked_fill_(outside | shape.is_root, -_INF)
    blank_in = blank.new_empty((len(shape.blank_moves), size, blank.shape[1]))
    label_in = blank.new_empty((len(shape.label_moves), size, blank.shape[1]))
    if not shape.moving:
        blank_in[0] = blank[pad - 1 : -1]
        label_in[0] = label[pad:]
        return blank_in, label_in
    durations = [_take(part, place).masked_fill_(outside, -_INF) for part in scores.durations]
    for arc, i, move in zip(blank_in, shape.moving, shape.blank_moves, strict=True):
        torch.add(blank[pad - move :][:size], durations[i][pad - move :][:size], out=arc)
    for arc, duration, move in zip(label_in, durations, shape.label_moves, strict=True):
        # (t, parent) lies on the diagonal before that of (t, node), by which `label` is sorted.
        at_parent = duration[pad - move - 1 :][:size].index_select(1, shape.parent)
        torch.add(label[pad - move :][:size], at_parent, out=arc)
    return blank_in, label_in


def _last_blanks(scores: ArcScores, shape: _Shape) -> Tensor:
    """[Mb, H] scores of the blank arcs of each move that reach T from the hypothesis's leaf."""
    moves = torch.tensor(shape.blank_moves, device=scores.blank.device)[:, None]
    frame = shape.frames[shape.leaf] - moves
    at = frame.clamp_min(0), shape.leaf.expand_as(frame)
    found = scores.blank[at].to(wide(scores.blank))
    if shape.moving:
        moving = torch.tensor(shape.moving, device=frame.device)[:, None]
        found += scores.durations[moving, at[0], at[1]].to(found.dtype)
    return found.masked_fill(frame < 0, -_INF)


def _forward_pass(scores: ArcScores, shape: _Shape) -> Tensor:
    """[pad + D, K] α by diagonal, below ``pad`` rows of −inf that stand for the time before the start."""
    pad, device, num_nodes = shape.pad, scores.blank.device, len(shape.parent)
    alpha = scores.blank.new_full((pad + shape.num_diagonals, num_nodes), -_INF, dtype=wide(scores.blank))
    alpha[pad, shape.is_root] = 0.0
    blank_rows = shape.source_rows(shape.blank_moves, device=device)
    label_rows = shape.source_rows(tuple(move + 1 for move in shape.label_moves), device=device)
    num_blank, num_label = len(shape.blank_moves), len(shape.label_moves)
    single = num_blank == num_label == 1
    sums = alpha.new_empty((num_blank + num_label, num_nodes))
    for block in shape.blocks():
        blank_in, label_in = _arcs(scores, shape, block)
        before = alpha[block.start :]  # a row of it is a row of `at_parent`: the diagonal's, and pad
        at_parent = alpha.new_empty((pad + block.stop - block.start, num_nodes))
        at_parent[:pad] = before[:pad].index_select(1, shape.parent)
        for d in range(0 if block.start else 1, block.stop - block.start):
            torch.index_select(before[pad + d - 1], 0, shape.parent, out=at_parent[pad + d - 1])
            torch.add(before.index_select(0, blank_rows[d]), blank_in[:, d], out=sums[:num_blank])
            torch.add(at_parent.index_select(0, label_rows[d]), label_in[:, d], out=sums[num_blank:])
            if single:
                torch.logaddexp(sums[0], sums[1], out=before[pad + d])
            else:
                _logsumexp_(sums, out=before[pad + d])
    return alpha


def _logsumexp_(parts: Tensor, *, out: Tensor) -> None:
    """``out`` = logsumexp of [M, K] ``parts`` over M, which are overwritten; −inf where all parts are."""
    top = parts.amax(0).clamp_min_(torch.finfo(parts.dtype).min)
    torch.sum(parts.sub_(top).exp_(), 0, out=out)
    out.log_().add_(top)


def _backward_pass(alpha: Tensor, scores: ArcScores, end_flow: Tensor, shape: _Shape) -> Tensor:
    """[2 + M, T, K] gradients of the scores: blank, label, durations.

    The β recursion in adjoint form: γ(t, k) is the gradient-weighted posterior of visiting the cell. It is passed back
    along each arc in proportion to the arc's share of α, which keeps shares ≤ 1 and takes weights of either sign.
    """
    pad, num_nodes, num_frames = shape.pad, alpha.shape[1], len(scores.blank)
    blank_rows = shape.source_rows(shape.blank_moves, device=alpha.device)
    label_rows = shape.source_rows(tuple(move + 1 for move in shape.label_moves), device=alpha.device)
    ends = blank_rows[shape.last].T  # [Mb, H] the row that the last blank of each move comes from
    arc = torch.arange(len(ends), device=alpha.device)[:, None].expand_as(ends)
    leaf = shape.leaf.expand_as(ends)
    grads = scores.blank.new_zeros((2 + len(scores.durations), num_frames + 1, num_nodes))
    # Of the sources of a block's arcs: γ; flow to nodes that their parents have not yet summed; gradients by diagonal.
    gamma, to_parent, *flows = alpha.new_zeros((2 + len(grads), pad, num_nodes))
    fresh = shape.num_diagonals + pad  # rows from here on have the flow of the ends
    for block in reversed(shape.blocks()):
        size = block.stop - block.start
        gamma, to_parent, *flows = (_grown(part[:pad], size) for part in (gamma, to_parent, *flows))
        here = (ends >= block.start) & (ends < fresh)
        fresh = block.start
        row = (ends - block.start).clamp(0, pad + size - 1)
        gamma.index_put_((row, leaf), end_flow.masked_fill(~here, 0.0), accumulate=True)
        blank_in, label_in = _arc_shares(alpha, scores, shape, block)
        for d in range(size - 1, -1 if block.start else 0, -1):
            gamma[pad + d].index_add_(0, shape.parent, to_parent[pad + d])
            blank_flow = blank_in[:, d].mul_(gamma[pad + d])
            label_flow = label_in[:, d].mul_(gamma[pad + d])
            gamma.index_add_(0, blank_rows[d], blank_flow)
            to_parent.index_add_(0, label_rows[d], label_flow)
        if not block.start:
            blank_in[:, 0] = 0.0
            label_in[:, 0] = 0.0
        here = (shape.last >= block.start) & (shape.last < block.stop)
        row = (shape.last - block.start).clamp(0, size - 1)
        places = (arc, row.expand_as(ends), leaf)
        blank_in.index_put_(places, end_flow.masked_fill(~here, 0.0), accumulate=True)
        _arcs_adjoint(blank_in, label_in, flows, shape)
        _by_frame(flows, grads, shape, block)
    return grads[:, :-1]


def _grown(part: Tensor, size: int) -> Tensor:
    """The rows of the next block's sources: ``size`` of zeros, then the first ``pad``, which more is added to."""
    return torch.cat([part.new_zeros(size, part.shape[1]), part])


def _arc_shares(alpha: Tensor, scores: ArcScores, shape: _Shape, block: slice) -> tuple[Tensor, Tensor]:
    """Share of each arc into a block in the α that it leads to, as :func:`_arcs`."""
    blank_in, label_in = _arcs(scores, shape, block)
    pad, size, before = shape.pad, block.stop - block.start, alpha[block.start :]
    here = before[pad:][:size]
    here = here.masked_fill(here == -_INF, _INF)  # so that the shares of an unreachable cell are 0
    for arc, move in zip(blank_in, shape.blank_moves, strict=True):
        arc.add_(before[pad - move :][:size]).sub_(here).exp_()
    for arc, move in zip(label_in, shape.label_moves, strict=True):
        arc.add_(before[pad - move - 1 :][:size].index_select(1, shape.parent)).sub_(here).exp_()
    return blank_in, label_in


def _arcs_adjoint(blank_flow: Tensor, label_flow: Tensor, flows: Sequence[Tensor], shape: _Shape) -> None:
    """Adjoint of :func:`_arcs`: adds the flow into the arcs of a block to ``flows`` of blank, label and durations,
    [pad + n, K] each, by the diagonal that the score is sorted by."""
    pad, (size, num_nodes) = shape.pad, blank_flow.shape[1:]
    blank, label, *durations = flows
    for arc, move in zip(blank_flow, shape.blank_moves, strict=True):
        blank[pad - move :][:size] += arc
    for arc, move in zip(label_flow, shape.label_moves, strict=True):
        label[pad - move :][:size] += arc
    if durations:
        for arc, i, move in zip(blank_flow, shape.moving, shape.blank_moves, strict=True):
            durations[i][pad - move :][:size] += arc
        parent = (torch.arange(size, device=blank.device)[:, None] * num_nodes + shape.parent).view(-1)
        for arc, duration, move in zip(label_flow, durations, shape.label_moves, strict=True):
            duration[pad - move - 1 :][:size].view(-1).index_add_(0, parent, arc.view(-1))


def _by_frame(flows: Sequence[Tensor], grads: Tensor, shape: _Shape, block: slice) -> None:
    """Writes the ``flows`` of a block's diagonals to their frames in ``grads``, [2 + M, T + 1, K]; what has no frame
    goes to the last row."""
    frame, outside = shape.frames_of(block.start, block.stop)
    place = _flat(frame.masked_fill_(outside, grads.shape[1] - 1))
    for grad, flow in zip(grads, flows, strict=True):
        grad.view(-1).index_copy_(0, place, flow[shape.pad :].reshape(-1).to(grad.dtype))


def _flat(rows: Tensor) -> Tensor:
    """[R, K] row of each entry → [R · K] places in a flattened matrix of K columns; overwrites ``rows``."""
    return rows.mul_(rows.shape[1]).add_(torch.arange(rows.shape[1], device=rows.device)).view(-1)


def _take(source: Tensor, place: Tensor) -> Tensor:
    """[R, K] entries of ``source`` [·, K] at the places, in the recursion's dtype; much faster than a gather."""
    return source.reshape(-1).index_select(0, place).view(-1, source.shape[1]).to(wide(source))
