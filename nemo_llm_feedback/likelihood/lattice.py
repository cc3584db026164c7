"""The transducer lattice over trie nodes: α forward and its adjoint, one vectorised step per anti-diagonal.

One recursion serves RNN-T (Graves 2012, arXiv:1211.3711, eq. 16–18) and TDT (Xu et al. 2023, arXiv:2304.06795, eq. 7).
A path starts at (t = 0, root). A *blank arc* of move m goes from (t, node) to (t + m, node); a *label arc* of move m
goes from (t, parent) to (t + m, node). RNN-T has the blank move 1 and the label move 0; TDT has a blank arc for each
duration > 0 and a label arc for each duration. With T frames in the utterance,

    α(0, root) = 0
    α(t, k)    = logsumexp over  α(t − m, k)         + blank_m(t − m, k)     for each blank move m
                                 α(t − m, parent(k)) + label_m(t − m, k)     for each label move m         0 ≤ t < T
    log p(h)   = logsumexp over  α(T − m, leaf(h))   + blank_m(T − m, leaf(h))

so the last move is a blank that reaches T exactly; a label arc that lands on T, or any arc beyond it, is no part of a
complete path. With no frames (T = 0) the empty hypothesis has the one empty path, log p = 0.

All arcs lead to a larger t + depth, so the cells of one anti-diagonal d = t + depth(k) are independent: the cell of
node k on diagonal d is t = d − depth(k), and its sources lie on diagonals d − m (blank) and d − m − 1 (label).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_INF = float("inf")


@dataclass(frozen=True, eq=False)
class LatticeShape:
    """What the recursion needs to know besides the arc scores.

    Attributes:
        parent: [K] parent node, −1 at roots.
        depth: [K] labels in the prefix of the node.
        frames: [K] T of the node's utterance.
        leaf: [H] final node of each hypothesis.
        blank_moves: frames that each blank arc consumes, ≥ 1.
        label_moves: frames that each label arc consumes, ≥ 0.
    """

    parent: Tensor
    depth: Tensor
    frames: Tensor
    leaf: Tensor
    blank_moves: tuple[int, ...]
    label_moves: tuple[int, ...]


def lattice_log_prob(blank: Tensor, *, label: Tensor, shape: LatticeShape) -> Tensor:
    """Log-probability of every hypothesis from the scores of its arcs.

    The recursion runs in float64 where the device has it, since α grows with the utterance while the gradient needs
    differences of α; it is a small part of the cost.

    Args:
        blank: [Mb, T, K] log-probability of the blank arc of move ``shape.blank_moves[i]`` out of (t, node).
        label: [Ml, T, K] log-probability of the label arc of move ``shape.label_moves[i]`` into the node out of
            (t, parent(node)); ignored at roots. Frames t ≥ ``shape.frames`` of either are ignored.
        shape: the trie and the moves.

    Returns:
        [H] natural-log probability, ≤ 0, of ``blank``'s dtype; −inf where no path exists. Differentiable once in
        ``blank`` and ``label``; an infeasible hypothesis contributes zero gradient.
    """
    return _Lattice.apply(blank, label, shape)  # type: ignore[no-any-return]


class _Lattice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, blank: Tensor, label: Tensor, shape: LatticeShape) -> Tensor:
        num_diagonals = int((shape.frames + shape.depth).max())
        blank_in = _by_diagonal(blank, shape, shape.blank_moves, num_diagonals)
        label_in = _by_diagonal(label, shape, shape.label_moves, num_diagonals)
        label_in[:, :, shape.parent < 0] = -_INF
        alpha = _forward_pass(blank_in, label_in, shape)
        ends = _end_scores(alpha, blank, shape)
        log_prob = ends.logsumexp(0)
        no_frames = shape.frames[shape.leaf] == 0
        log_prob = log_prob.masked_fill(no_frames & (shape.depth[shape.leaf] == 0), 0.0)
        ctx.save_for_backward(alpha, blank_in, label_in, ends, log_prob)
        ctx.shape, ctx.num_frames = shape, blank.shape[1]  # type: ignore[attr-defined]
        ctx.dtypes = (blank.dtype, label.dtype)  # type: ignore[attr-defined]
        return log_prob.to(blank.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        alpha, blank_in, label_in, ends, log_prob = ctx.saved_tensors  # type: ignore[attr-defined]
        shape: LatticeShape = ctx.shape  # type: ignore[attr-defined]
        weight = torch.where(log_prob.isfinite(), grad.to(log_prob.dtype), torch.zeros_like(log_prob))
        # A hypothesis's weight splits over its last arcs by their posterior.
        end_flow = _posterior(ends, log_prob) * weight  # [Mb, H]
        blank_flow, label_flow = _backward_pass(alpha, blank_in, label_in, end_flow, shape)
        blank_grad = _by_frame(blank_flow, shape, shape.blank_moves, ctx.num_frames)  # type: ignore[attr-defined]
        label_grad = _by_frame(label_flow, shape, shape.label_moves, ctx.num_frames)  # type: ignore[attr-defined]
        arc, start, inside = _end_arcs(shape)
        leaf = shape.leaf.expand_as(start)
        blank_grad.index_put_((arc[inside], start[inside], leaf[inside]), end_flow[inside], accumulate=True)
        blank_dtype, label_dtype = ctx.dtypes  # type: ignore[attr-defined]
        return blank_grad.to(blank_dtype), label_grad.to(label_dtype), None


def _forward_pass(blank_in: Tensor, label_in: Tensor, shape: LatticeShape) -> Tensor:
    """[pad + D, K] α by diagonal, below ``pad`` rows of −inf that stand for the time before the start."""
    pad = _pad(shape)
    num_diagonals, num_nodes = blank_in.shape[1:]
    alpha = blank_in.new_full((pad + num_diagonals, num_nodes), -_INF)
    alpha[pad, shape.depth == 0] = 0.0
    parent = shape.parent.clamp_min(0)
    blank_rows = [pad - move for move in shape.blank_moves]
    label_rows = [pad - move - 1 for move in shape.label_moves]
    if len(blank_rows) == len(label_rows) == 1:
        for d in range(1, num_diagonals):
            by_blank = alpha[d + blank_rows[0]] + blank_in[0, d]
            by_label = alpha[d + label_rows[0]].index_select(0, parent).add_(label_in[0, d])
            torch.logaddexp(by_blank, by_label, out=alpha[pad + d])
        return alpha
    sources = torch.tensor(blank_rows + label_rows, device=alpha.device)
    arcs_in = torch.cat([blank_in, label_in])  # [Mb + Ml, D, K]
    is_label = torch.arange(len(sources), device=alpha.device) >= len(blank_rows)
    own = torch.arange(num_nodes, device=alpha.device)
    column = torch.where(is_label[:, None], parent, own)  # [Mb + Ml, K] node that each arc comes from
    offset = sources[:, None] * num_nodes + column
    flat = alpha.view(-1)
    for d in range(1, num_diagonals):
        torch.logsumexp(flat.take(offset + d * num_nodes).add_(arcs_in[:, d]), 0, out=alpha[pad + d])
    return alpha


def _backward_pass(
    alpha: Tensor, blank_in: Tensor, label_in: Tensor, end_flow: Tensor, shape: LatticeShape
) -> tuple[Tensor, Tensor]:
    """Flow through every arc: the gradient with respect to its score, [Mb, D, K] and [Ml, D, K] by diagonal.

    The β recursion in adjoint form: γ(t, k) is the gradient-weighted posterior of visiting the cell. It is passed back
    along each arc in proportion to the arc's share of α, which keeps shares ≤ 1 and takes weights of either sign.
    """
    pad, num_diagonals = _pad(shape), blank_in.shape[1]
    parent = shape.parent.clamp_min(0)
    here = alpha[pad:]
    blank_flow = torch.empty_like(blank_in)
    for i, move in enumerate(shape.blank_moves):
        blank_flow[i] = _posterior(alpha[pad - move :][:num_diagonals] + blank_in[i], here)
    label_flow = torch.empty_like(label_in)
    for i, move in enumerate(shape.label_moves):
        label_flow[i] = _posterior(alpha[pad - move - 1 :][:num_diagonals, parent] + label_in[i], here)

    gamma = torch.zeros_like(alpha)
    _, start, inside = _end_arcs(shape)
    rows = pad + start + shape.depth[shape.leaf]
    gamma.index_put_((rows[inside], shape.leaf.expand_as(start)[inside]), end_flow[inside], accumulate=True)
    for d in range(num_diagonals - 1, 0, -1):
        blank_flow[:, d] *= gamma[pad + d]
        label_flow[:, d] *= gamma[pad + d]
        for i, move in enumerate(shape.blank_moves):
            gamma[pad + d - move] += blank_flow[i, d]
        for i, move in enumerate(shape.label_moves):
            gamma[pad + d - move - 1].index_add_(0, parent, label_flow[i, d])
    blank_flow[:, 0] = 0.0
    label_flow[:, 0] = 0.0
    return blank_flow, label_flow


def _pad(shape: LatticeShape) -> int:
    return max(*shape.blank_moves, *(move + 1 for move in shape.label_moves))


def _posterior(part: Tensor, total: Tensor) -> Tensor:
    """exp(part − total), 0 where the total is impossible."""
    return (part - total).exp_().masked_fill_(total == -_INF, 0.0)


def _by_diagonal(score: Tensor, shape: LatticeShape, moves: tuple[int, ...], num_diagonals: int) -> Tensor:
    """[M, T, K] by source frame → [M, D, K] by the diagonal of the cell that the arc leads to; −inf where none does."""
    wide = torch.float32 if score.device.type == "mps" else torch.float64
    out = score.new_empty((len(moves), num_diagonals, score.shape[2]), dtype=wide)
    target = torch.arange(num_diagonals, device=score.device)[:, None] - shape.depth  # [D, K] frame of the cell
    for i, move in enumerate(moves):
        start = target - move
        outside = (start < 0) | (target >= shape.frames)
        out[i] = score[i].gather(0, start.clamp_(0, score.shape[1] - 1)).masked_fill_(outside, -_INF)
    return out


def _by_frame(flow: Tensor, shape: LatticeShape, moves: tuple[int, ...], num_frames: int) -> Tensor:
    """Inverse of ``_by_diagonal``: [M, D, K] → [M, T, K]; 0 where the arc leads nowhere."""
    out = flow.new_empty((len(moves), num_frames, flow.shape[2]))
    start = torch.arange(num_frames, device=flow.device)[:, None]
    for i, move in enumerate(moves):
        target = start + move
        diagonal = (target + shape.depth).clamp_max_(flow.shape[1] - 1)
        out[i] = flow[i].gather(0, diagonal).masked_fill_(target >= shape.frames, 0.0)
    return out


def _end_arcs(shape: LatticeShape) -> tuple[Tensor, Tensor, Tensor]:
    """[Mb, H] arc index, source frame T − m, and whether that frame exists, of the last blank of each hypothesis."""
    moves = torch.tensor(shape.blank_moves, device=shape.leaf.device)[:, None]
    start = shape.frames[shape.leaf] - moves
    arc = torch.arange(len(shape.blank_moves), device=shape.leaf.device)[:, None].expand_as(start)
    return arc, start, start >= 0


def _end_scores(alpha: Tensor, blank: Tensor, shape: LatticeShape) -> Tensor:
    """[Mb, H] α at the source of the last blank plus that blank's score; −inf where the source does not exist."""
    arc, start, inside = _end_arcs(shape)
    source = start.clamp_min(0)
    score = blank[arc, source, shape.leaf].to(alpha.dtype)
    score += alpha[_pad(shape) + source + shape.depth[shape.leaf], shape.leaf]
    return score.masked_fill_(~inside, -_INF)
