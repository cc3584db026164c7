"""Runs the transducer joint over (frame, trie node) cells and keeps only the scores that the lattice reads.

The joint's output has one row of V logits per cell. Of these the lattice needs the blank, the labels of the node's
children and, for TDT, the durations. So the cells are evaluated in chunks that fit a memory budget, each chunk is
normalised and reduced, and its logits are dropped. The backward pass evaluates cells again (as in activation
checkpointing), but only those that carry gradient: in a trained model a few per cent of them hold all of the
posterior. The [B, T, U, V] tensor never exists. ``band.py`` chooses cells for the forward pass, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.autograd import differentiable_once, in_modes, modes_of, random_state, replayed
from nemo_llm_feedback.asr.likelihood.inputs import clean_rows
from nemo_llm_feedback.asr.likelihood.lattice import ArcScores
from nemo_llm_feedback.asr.likelihood.prediction import prefix_outputs
from nemo_llm_feedback.core.trie import PrefixTrie

MEMORY_BUDGET_MB = 512  # default for the joint's activations and their gradients
_CPU_CHUNK_MB = 8  # measured: larger chunks fall out of the cache, smaller ones pay more launches


class Chunk(NamedTuple):
    """n cells, and the m children of their nodes.

    Attributes:
        frame, node: [n] of each cell.
        place: [n] of the cell's frame in the encoder output with rows and frames flattened.
        cell, child: [m] position in the chunk of the cell that a label arc leaves, and the child that it leads to.
    """

    frame: Tensor
    node: Tensor
    place: Tensor
    cell: Tensor
    child: Tensor


class JointCells:
    """The cells (frame, trie node) of a batch, and the joint that is evaluated in them.

    Projects the encoder output and runs the prediction network, under the present autocast.

    Args:
        encoded: [B, T, D] encoder output.
        lengths: [B] valid frames of each batch row, each ≤ T.
        trie: the prefix trie of the hypotheses, at least one.
        decoder: NeMo's prediction network (``RNNTDecoder`` or ``StatelessTransducerDecoder``).
        joint: NeMo's ``RNNTJoint``; its outputs are labels, blank, then durations.
        memory_budget_mb: the most MiB that the joint's activations and their gradients may take.

    Attributes:
        frames: [B, T, J] encoder output after ``joint.project_encoder``, with gradient.
        prefixes: [K, J] prediction-network output of each node after ``joint.project_prednet``, with gradient.
        row_ok: [B] whether the row's valid frames are finite.
        num_durations: number of duration outputs, behind blank.
        blank: index of blank.
        chunk: the most cells that are evaluated at once.

    Raises:
        ValueError: rows, lengths and trie do not fit together.
    """

    def __init__(
        self,
        encoded: Tensor,
        lengths: Tensor,
        trie: PrefixTrie,
        decoder: Any,
        joint: Any,
        *,
        memory_budget_mb: float,
    ) -> None:
        self.joint, self.trie, self.lengths = joint, trie.to(encoded.device), lengths.to(encoded.device)
        encoded, self.row_ok = clean_rows(encoded, lengths, self.trie)
        self.frames = joint.project_encoder(encoded)
        self.prefixes = joint.project_prednet(prefix_outputs(decoder, self.trie))
        self.num_durations = joint.num_extra_outputs
        self.blank = joint.num_classes_with_blank - self.num_durations - 1
        kind = self.frames.device.type
        # Held at once in the backward: sum, activation and their gradients (J wide), logits and theirs (V wide).
        cell_bytes = 4 * (self.frames.shape[-1] + joint.num_classes_with_blank) * self.frames.element_size()
        budget = min(memory_budget_mb, _CPU_CHUNK_MB) if kind == "cpu" else memory_budget_mb
        self.chunk = max(1, int(budget * 2**20) // cell_bytes)
        self._autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def all_cells(self) -> Tensor:
        """[T, K] whether the frame belongs to the node's utterance."""
        frame = torch.arange(self.frames.shape[1], device=self.lengths.device)[:, None]
        return frame < self.lengths[self.trie.utterance]

    def empty_scores(self, dtype: torch.dtype | None = None) -> ArcScores:
        """Zeros to be filled: float32, float64 for a joint in float64, unless another dtype is asked for."""
        dtype = dtype or torch.promote_types(self.frames.dtype, torch.float32)
        size = (self.frames.shape[1], self.trie.num_nodes)
        blank, label = (self.frames.new_zeros(size, dtype=dtype) for _ in range(2))
        return ArcScores(blank, label, self.frames.new_zeros((self.num_durations, *size), dtype=dtype))

    def logits(self, frames: Tensor, prefixes: Tensor) -> Tensor:
        """[b, t, J] and [b, k, J] → [b, t, k, V] unnormalised outputs, under the autocast of the forward pass."""
        joint, (kind, enabled, dtype) = self.joint, self._autocast
        # On a CPU NeMo's joint otherwise applies one log-softmax over labels and durations together.
        before, joint.log_softmax = joint.log_softmax, False
        try:
            with torch.autocast(kind, dtype=dtype) if enabled else nullcontext():
                return joint.joint_after_projection(frames, prefixes)
        finally:
            joint.log_softmax = before

    def inputs(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """[n, J] frames and [n, J] prefixes of a chunk's cells."""
        return self.frames.flatten(0, 1).index_select(0, chunk.place), self.prefixes.index_select(0, chunk.node)

    def chunk_logits(self, frames: Tensor, prefixes: Tensor) -> Tensor:
        """[n, J] and [n, J] of n cells → [n, V] unnormalised outputs."""
        return self.logits(frames[:, None], prefixes[:, None])[:, 0, 0]

    def chunks(self, chosen: Tensor, size: int | None = None) -> Iterator[Chunk]:
        """The true entries of ``chosen`` [T, K], by frame, at most ``size`` (``chunk`` if None) at a time."""
        trie, size = self.trie, size or self.chunk
        child = (trie.parent >= 0).nonzero()[:, 0]
        child = child[trie.parent[child].argsort(stable=True)]  # the children of a node stand together
        count = torch.bincount(trie.parent[child], minlength=trie.num_nodes)
        first = count.cumsum(0) - count  # node → its first child in that order
        frames, nodes = chosen.nonzero(as_tuple=True)
        for frame, node in zip(frames.split(size), nodes.split(size), strict=True):
            arcs = count[node]
            cell = torch.repeat_interleave(arcs)
            offset = first[node] - (arcs.cumsum(0) - arcs)
            place = trie.utterance[node] * len(chosen) + frame
            yield Chunk(frame, node, place, cell, child[offset[cell] + torch.arange(len(cell), device=cell.device)])

    @torch.no_grad()
    def evaluate(self, chosen: Tensor, into: ArcScores) -> ArcScores:
        """Evaluates the joint in the true entries of ``chosen`` [T, K]; writes the scores of the arcs that leave them.

        No gradient is recorded; returns ``into``.
        """
        for chunk in self.chunks(chosen):
            logits = self.chunk_logits(*self.inputs(chunk))
            log_probs = logits[:, : self.blank + 1].to(into.blank.dtype).log_softmax(-1)
            into.blank[chunk.frame, chunk.node] = log_probs[:, self.blank]
            into.label[chunk.frame[chunk.cell], chunk.child] = log_probs[chunk.cell, self.trie.token[chunk.child]]
            if self.num_durations:
                share = logits[:, self.blank + 1 :].to(into.blank.dtype).log_softmax(-1)
                into.durations[:, chunk.frame, chunk.node] = share.T
        return into


def arc_scores(cells: JointCells, *, evaluated: ArcScores | None = None) -> ArcScores:
    """Scores of all arcs of the lattice.

    Args:
        cells: the cells of the lattice.
        evaluated: the scores where they are known already, −inf for arcs that are left out; then the forward pass
            evaluates nothing. Only for a joint in eval mode.

    Returns:
        The scores in float32 (float64 for float64 input), differentiable once in ``cells.frames``, ``cells.prefixes``
        and the joint's parameters. Cells whose gradient is below the square of the rounding unit of the largest one of
        their utterance are left out of the backward pass; their sum is far below the rounding error of the rest.
    """
    params = tuple(param for param in cells.joint.parameters() if param.requires_grad)
    return ArcScores(*_JointScores.apply(cells.frames, cells.prefixes, cells, evaluated, *params))


class _JointScores(torch.autograd.Function):
    """The evaluation of :func:`arc_scores`; its backward pass evaluates the joint again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, prefixes: Tensor, cells: JointCells, evaluated: ArcScores | None, *params: Tensor
    ) -> Any:
        """The parts of :class:`ArcScores`."""
        ctx.rng = random_state(frames) if cells.joint.training else None
        ctx.modes = modes_of(cells.joint.modules())
        ctx.save_for_backward(frames, prefixes, *params)
        ctx.cells = cells
        return tuple(evaluated or cells.evaluate(cells.all_cells(), cells.empty_scores()))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, blank: Tensor, label: Tensor, durations: Tensor) -> tuple[Tensor | None, ...]:
        """Flow through the arcs → gradients of frames, prefixes and parameters."""
        frames, _, *params = inputs = ctx.saved_tensors
        cells: JointCells = ctx.cells
        flow = ArcScores(blank, label, durations)
        # What flows through a cell in all is the weight of its softmax.
        total = blank.index_add(1, cells.trie.parent.clamp_min(0), label)
        # Random masks repeat only when the chunks do.
        chosen = cells.all_cells() if ctx.rng else _cells_with_gradient(cells, flow)
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        frame_sums = sums[0].view(-1, frames.shape[-1])
        unused: set[int] = set()
        # The caller may have left eval mode by now; dropout in the second evaluation would be another function.
        with in_modes(ctx.modes), replayed(ctx.rng):
            for chunk in cells.chunks(chosen):
                given = [x.detach().requires_grad_() for x in cells.inputs(chunk)]
                with torch.enable_grad():
                    logits = cells.chunk_logits(*given)
                grad = _logits_grad(cells, chunk, logits.detach().to(blank.dtype), flow, total)
                parts = torch.autograd.grad(logits, (*given, *params), grad.to(logits.dtype), allow_unused=True)
                frame_sums.index_add_(0, chunk.place, parts[0].to(frame_sums.dtype))
                sums[1].index_add_(0, chunk.node, parts[1].to(sums[1].dtype))
                for i, part in enumerate(parts[2:], start=2):
                    if part is None:
                        unused.add(i)  # a parameter of the projections, or of a disabled adapter
                    else:
                        sums[i] += part
        grads = [None if i in unused else sums[i].to(x.dtype) for i, x in enumerate(inputs)]
        return grads[0], grads[1], None, None, *grads[2:]


def _logits_grad(cells: JointCells, chunk: Chunk, logits: Tensor, flow: ArcScores, total: Tensor) -> Tensor:
    """[n, V] gradient of the chunk's logits: flow into each output minus its softmax share of the cell's flow."""
    frame, node = chunk.frame, chunk.node
    labels = logits[:, : cells.blank + 1].softmax(-1).mul_(-total[frame, node][:, None])
    labels[:, cells.blank] += flow.blank[frame, node]
    # Children of a node differ in their token, so no place is written twice.
    labels[chunk.cell, cells.trie.token[chunk.child]] += flow.label[frame[chunk.cell], chunk.child]
    if not cells.num_durations:
        return labels
    durations = flow.durations[:, frame, node].T
    share = logits[:, cells.blank + 1 :].softmax(-1)
    return torch.cat([labels, durations - share * durations.sum(-1, keepdim=True)], dim=-1)


def _cells_with_gradient(cells: JointCells, flow: ArcScores) -> Tensor:
    """[T, K] the cells that have more than a negligible gradient."""
    weight = flow.blank.abs().index_add(1, cells.trie.parent.clamp_min(0), flow.label.abs())
    weight += flow.durations.abs().sum(0)
    utterance = cells.trie.utterance
    peak = weight.new_zeros(len(cells.lengths)).scatter_reduce(0, utterance, weight.amax(0), "amax")
    # A NaN must stay visible: it fails "≤", and the cell is then kept.
    return ~(weight <= torch.finfo(weight.dtype).eps ** 2 * peak[utterance])
