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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.autograd import differentiable_once
from nemo_llm_feedback.core.trie import PrefixTrie

_INF = float("inf")


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


class _Lattice(torch.autograd.Function):
    """The recursion of :func:`lattice_log_prob` and its gradient."""

    @staticmethod
    def forward(ctx: Any, blank: Tensor, label: Tensor, durations: Tensor, shape: _Shape) -> Tensor:
        """[H] log p from the parts of :class:`ArcScores`."""
        blank_in, label_in = _arcs(ArcScores(blank, label, durations), shape)
        alpha = _forward_pass(blank_in, label_in, shape)
        # [Mb, H] score of all paths to T whose last blank has each of the moves; −inf where there is none.
        rows = shape.source_rows(shape.blank_moves, device=alpha.device)[shape.last].T
        ends = alpha[rows, shape.leaf] + blank_in[:, shape.last, shape.leaf]
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
        shape: _Shape = ctx.shape
        blank_in, label_in = _arcs(ArcScores(blank, label, durations), shape)
        weight = torch.where(log_prob.isfinite(), grad.to(log_prob.dtype), torch.zeros_like(log_prob))
        # A hypothesis's weight splits over its possible last blanks by their posterior.
        end_flow = (ends - log_prob.masked_fill(log_prob == -_INF, _INF)).exp_() * weight
        blank_flow, label_flow = _backward_pass(alpha, blank_in, label_in, end_flow, shape)
        flows = _arcs_adjoint(blank_flow, label_flow, shape, num_frames=blank.shape[0], num_durations=len(durations))
        return *(flow.to(blank.dtype) for flow in flows), None  # type: ignore[return-value]


def _arcs(scores: ArcScores, shape: _Shape) -> tuple[Tensor, Tensor]:
    """Scores of the arcs into (diagonal, node), −inf where there is none: [Mb, D, K] blank and [Ml, D, K] label."""
    frame = torch.arange(shape.num_diagonals, device=scores.blank.device)[:, None] - shape.depth  # [D, K]
    outside = (frame < 0) | (frame >= shape.frames)
    place = _flat(frame.clamp_(0, len(scores.blank) - 1))
    blank = _take(scores.blank, place).masked_fill_(outside, -_INF)
    label = _take(scores.label, place).masked_fill_(outside | shape.is_root, -_INF)
    blank_in = blank.new_full((len(shape.blank_moves), *blank.shape), -_INF)
    label_in = blank.new_full((len(shape.label_moves), *blank.shape), -_INF)
    if not shape.moving:
        blank_in[0, 1:] = blank[:-1]
        label_in[0] = label
        return blank_in, label_in
    durations = [_take(part, place).masked_fill_(outside, -_INF) for part in scores.durations]
    for arc, i, move in zip(blank_in, shape.moving, shape.blank_moves, strict=True):
        torch.add(blank[:-move], durations[i][:-move], out=arc[move:])
    for arc, duration, move in zip(label_in, durations, shape.label_moves, strict=True):
        # (t, parent) lies on the diagonal before that of (t, node), by which `label` is sorted.
        at_parent = duration[:-1].index_select(1, shape.parent)
        torch.add(label[1 : len(label) - move], at_parent[: len(label) - 1 - move], out=arc[1 + move :])
    return blank_in, label_in


def _arcs_adjoint(
    blank_flow: Tensor, label_flow: Tensor, shape: _Shape, *, num_frames: int, num_durations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint of ``_arcs``: flow into the arcs → gradient of the scores, [T, K], [T, K] and [M, T, K]."""
    rows = shape.num_diagonals
    blank, label = torch.zeros_like(blank_flow[0]), torch.zeros_like(label_flow[0])
    durations = [torch.zeros_like(blank) for _ in range(num_durations)]
    for arc, move in zip(blank_flow, shape.blank_moves, strict=True):
        blank[:-move] += arc[move:]
    for arc, move in zip(label_flow, shape.label_moves, strict=True):
        label[: rows - move] += arc[move:]
    if num_durations:
        for arc, i, move in zip(blank_flow, shape.moving, shape.blank_moves, strict=True):
            durations[i][:-move] += arc[move:]
        parent = torch.arange(rows, device=blank.device)[:, None] * blank.shape[1] + shape.parent
        for arc, duration, move in zip(label_flow, durations, shape.label_moves, strict=True):
            into = slice(0, rows - 1 - move)
            duration[into].view(-1).index_add_(0, parent[into].view(-1), arc[1 + move :].reshape(-1))
    frame = torch.arange(num_frames, device=blank.device)[:, None]
    outside = frame >= shape.frames  # [T, K]
    place = _flat((frame + shape.depth).clamp_max_(rows - 1))
    blank, label, *durations = (_take(flow, place).masked_fill_(outside, 0.0) for flow in (blank, label, *durations))
    return blank, label, torch.stack(durations) if durations else blank.new_empty((0, *blank.shape))


def _forward_pass(blank_in: Tensor, label_in: Tensor, shape: _Shape) -> Tensor:
    """[pad + D, K] α by diagonal, below ``pad`` rows of −inf that stand for the time before the start."""
    pad, device = shape.pad, blank_in.device
    alpha = blank_in.new_full((pad + shape.num_diagonals, blank_in.shape[2]), -_INF)
    at_parent = alpha.clone()
    alpha[pad, shape.is_root] = 0.0
    blank_rows = shape.source_rows(shape.blank_moves, device=device)
    label_rows = shape.source_rows(tuple(move + 1 for move in shape.label_moves), device=device)
    single = len(shape.blank_moves) == len(shape.label_moves) == 1
    sums = blank_in.new_empty((len(blank_in) + len(label_in), blank_in.shape[2]))
    for d in range(1, shape.num_diagonals):
        torch.index_select(alpha[pad + d - 1], 0, shape.parent, out=at_parent[pad + d - 1])
        torch.add(alpha.index_select(0, blank_rows[d]), blank_in[:, d], out=sums[: len(blank_in)])
        torch.add(at_parent.index_select(0, label_rows[d]), label_in[:, d], out=sums[len(blank_in) :])
        if single:
            torch.logaddexp(sums[0], sums[1], out=alpha[pad + d])
        else:
            _logsumexp_(sums, out=alpha[pad + d])
    return alpha


def _logsumexp_(parts: Tensor, *, out: Tensor) -> None:
    """``out`` = logsumexp of [M, K] ``parts`` over M, which are overwritten; −inf where all parts are."""
    top = parts.amax(0).clamp_min_(torch.finfo(parts.dtype).min)
    torch.sum(parts.sub_(top).exp_(), 0, out=out)
    out.log_().add_(top)


def _backward_pass(
    alpha: Tensor, blank_in: Tensor, label_in: Tensor, end_flow: Tensor, shape: _Shape
) -> tuple[Tensor, Tensor]:
    """Flow through every arc, i.e. the gradient of its score; overwrites the arcs' scores.

    The β recursion in adjoint form: γ(t, k) is the gradient-weighted posterior of visiting the cell. It is passed back
    along each arc in proportion to the arc's share of α, which keeps shares ≤ 1 and takes weights of either sign.
    """
    pad, rows = shape.pad, shape.num_diagonals
    here = alpha[pad:].masked_fill(alpha[pad:] == -_INF, _INF)  # so that the shares of an unreachable cell are 0
    for arc, move in zip(blank_in, shape.blank_moves, strict=True):
        arc.add_(alpha[pad - move :][:rows]).sub_(here).exp_()
    for arc, move in zip(label_in, shape.label_moves, strict=True):
        arc.add_(alpha[pad - move - 1 :][:rows].index_select(1, shape.parent)).sub_(here).exp_()

    gamma = torch.zeros_like(alpha)
    to_parent = torch.zeros_like(alpha)  # flow that leaves a diagonal for nodes, not yet summed by their parents
    blank_rows = shape.source_rows(shape.blank_moves, device=alpha.device)
    label_rows = shape.source_rows(tuple(move + 1 for move in shape.label_moves), device=alpha.device)
    gamma.index_put_((blank_rows[shape.last].T, shape.leaf.expand_as(end_flow)), end_flow, accumulate=True)
    for d in range(rows - 1, 0, -1):
        gamma[pad + d].index_add_(0, shape.parent, to_parent[pad + d])
        blank_flow = blank_in[:, d].mul_(gamma[pad + d])
        label_flow = label_in[:, d].mul_(gamma[pad + d])
        gamma.index_add_(0, blank_rows[d], blank_flow)
        to_parent.index_add_(0, label_rows[d], label_flow)
    blank_in[:, 0] = 0.0
    label_in[:, 0] = 0.0
    arc = torch.arange(len(blank_in), device=alpha.device)[:, None].expand_as(end_flow)
    places = (arc, shape.last.expand_as(end_flow), shape.leaf.expand_as(end_flow))
    blank_in.index_put_(places, end_flow, accumulate=True)
    return blank_in, label_in


def _flat(rows: Tensor) -> Tensor:
    """[R, K] row of each entry → [R · K] places in a flattened matrix of K columns; overwrites ``rows``."""
    return rows.mul_(rows.shape[1]).add_(torch.arange(rows.shape[1], device=rows.device)).view(-1)


def _take(source: Tensor, place: Tensor) -> Tensor:
    """[R, K] entries of ``source`` [·, K] at the places, in the recursion's dtype; much faster than a gather."""
    wide = torch.float32 if source.device.type == "mps" else torch.float64
    return source.reshape(-1).index_select(0, place).view(-1, source.shape[1]).to(wide)
