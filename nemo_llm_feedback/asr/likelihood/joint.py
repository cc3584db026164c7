"""The transducer joint over (frame, trie node) cells, reduced at once to the scores that the lattice reads.

The joint's output has one row of V logits per cell. Of these the lattice needs the blank, the labels of the node's
children and, for TDT, the durations. So the cells are evaluated in chunks that fit a memory budget, each chunk is
normalised and reduced, and its logits are dropped. The backward pass evaluates cells again (as in activation
checkpointing), but only those that carry gradient: in a trained model a few per cent of them hold all of the
posterior. The [B, T, U, V] tensor never exists. ``band.py`` chooses cells for the forward pass, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.autograd import differentiable_once
from nemo_llm_feedback.asr.likelihood.lattice import ArcScores
from nemo_llm_feedback.core.trie import PrefixTrie


class TransducerJoint(Protocol):
    """What is asked of a joint; NeMo's ``RNNTJoint`` has it. Its outputs are labels, blank, then durations."""

    log_softmax: bool | None
    training: bool

    @property
    def num_classes_with_blank(self) -> int: ...  # all outputs, durations included

    @property
    def num_extra_outputs(self) -> int: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def project_encoder(self, encoder_output: Tensor) -> Tensor: ...

    def project_prednet(self, prednet_output: Tensor) -> Tensor: ...

    def joint_after_projection(self, f: Tensor, g: Tensor) -> Tensor: ...


class _Chunk(NamedTuple):
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


@dataclass(frozen=True, eq=False)
class JointSetting:
    """The parts of a call that carry no gradient.

    Attributes:
        joint: only what follows the projections is evaluated here.
        trie: on the tensors' device.
        lengths: valid frames of each batch row.
        cells: the most cells in a chunk.
        autocast: device type, whether autocast is on, its dtype, as in the forward pass.
    """

    joint: TransducerJoint
    trie: PrefixTrie
    lengths: list[int]
    cells: int
    autocast: tuple[str, bool, torch.dtype]

    @classmethod
    def of(
        cls, encoder: Tensor, *, joint: TransducerJoint, trie: PrefixTrie, lengths: list[int], memory_budget_mb: float
    ) -> JointSetting:
        """The setting for [B, T, J] projected encoder output under the present autocast."""
        device_type = encoder.device.type
        autocast = (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
        # Held at once in the backward: sum, activation and their gradients (J wide), logits and theirs (V wide).
        cell_bytes = 4 * (encoder.shape[-1] + joint.num_classes_with_blank) * encoder.element_size()
        if device_type == "cpu":
            memory_budget_mb = min(memory_budget_mb, _CPU_CHUNK_MB)
        cells = max(1, int(memory_budget_mb * 2**20) // cell_bytes)
        return cls(joint, trie, lengths, cells, autocast)

    @property
    def num_durations(self) -> int:
        """Outputs behind blank."""
        return self.joint.num_extra_outputs

    @property
    def blank(self) -> int:
        """Index of blank."""
        return self.joint.num_classes_with_blank - self.num_durations - 1

    def all_cells(self, num_frames: int) -> Tensor:
        """[T, K] whether the frame belongs to the node's utterance."""
        device = self.trie.parent.device
        limit = torch.tensor(self.lengths, device=device)[self.trie.utterance]
        return torch.arange(num_frames, device=device)[:, None] < limit

    def empty_scores(self, encoder: Tensor) -> ArcScores:
        """Zeros to be filled: float32, float64 for float64 input."""
        wide = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        size = (encoder.shape[1], self.trie.num_nodes)
        blank, label = (encoder.new_zeros(size, dtype=wide) for _ in range(2))
        return ArcScores(blank, label, encoder.new_zeros((self.num_durations, *size), dtype=wide))


def arc_scores(
    encoder: Tensor, *, prediction: Tensor, setting: JointSetting, evaluated: ArcScores | None = None
) -> ArcScores:
    """Scores of all arcs of the lattice.

    Args:
        encoder: [B, T, J] encoder output after ``joint.project_encoder``.
        prediction: [K, J] prediction-network output of each node after ``joint.project_prednet``.
        setting: the rest of the call; its lengths are each ≤ T.
        evaluated: the scores where they are known already, −inf for arcs that are left out; then the forward pass
            evaluates nothing. Only for a joint in eval mode.

    Returns:
        The scores in float32 (float64 for float64 input), differentiable once in ``encoder``, ``prediction`` and the
        joint's parameters. Cells whose gradient is below the square of the rounding unit of the largest one of their
        utterance are left out of the backward pass; their sum is far below the rounding error of the rest.
    """
    params = tuple(param for param in setting.joint.parameters() if param.requires_grad)
    return ArcScores(*_JointScores.apply(encoder, prediction, setting, evaluated, *params))


@torch.no_grad()
def evaluate(setting: JointSetting, encoder: Tensor, prediction: Tensor, *, cells: Tensor, into: ArcScores) -> None:
    """Evaluates the joint in cells and writes the scores of the arcs that leave them.

    Args:
        setting, encoder, prediction: as in ``arc_scores``; no gradient is recorded.
        cells: [T, K] which ones.
        into: is written to.
    """
    flat = encoder.flatten(0, 1)
    for chunk in _chunks(setting, cells):
        logits = _chunk_logits(setting, flat.index_select(0, chunk.place), prediction.index_select(0, chunk.node))
        log_probs = logits[:, : setting.blank + 1].to(into.blank.dtype).log_softmax(-1)
        into.blank[chunk.frame, chunk.node] = log_probs[:, setting.blank]
        into.label[chunk.frame[chunk.cell], chunk.child] = log_probs[chunk.cell, setting.trie.token[chunk.child]]
        if setting.num_durations:
            share = logits[:, setting.blank + 1 :].to(into.blank.dtype).log_softmax(-1)
            into.durations[:, chunk.frame, chunk.node] = share.T


class _JointScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        encoder: Tensor,
        prediction: Tensor,
        setting: JointSetting,
        evaluated: ArcScores | None,
        *params: Tensor,
    ) -> Any:
        ctx.rng = _rng_state(encoder) if setting.joint.training else None
        ctx.modes = [(module, module.training) for module in setting.joint.modules()]
        scores = evaluated or setting.empty_scores(encoder)
        if evaluated is None:
            evaluate(setting, encoder, prediction, cells=setting.all_cells(encoder.shape[1]), into=scores)
        ctx.save_for_backward(encoder, prediction, *params)
        ctx.setting = setting
        return tuple(scores)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, blank: Tensor, label: Tensor, durations: Tensor) -> tuple[Tensor | None, ...]:
        encoder, prediction, *params = inputs = ctx.saved_tensors
        setting: JointSetting = ctx.setting
        flow = ArcScores(blank, label, durations)
        # What flows through a cell in all is the weight of its softmax.
        total = blank.index_add(1, setting.trie.parent.clamp_min(0), label)
        # Random masks repeat only when the chunks do.
        cells = setting.all_cells(encoder.shape[1]) if ctx.rng else _cells_with_gradient(setting, flow)
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        frames, frame_sums = encoder.flatten(0, 1), sums[0].view(-1, encoder.shape[-1])
        unused: set[int] = set()
        # The caller may have left eval mode by now; dropout in the second evaluation would be another function.
        with _as_in_forward(ctx.modes), _replayed(ctx.rng, encoder):
            for chunk in _chunks(setting, cells):
                enc = frames.index_select(0, chunk.place).requires_grad_()
                pred = prediction.detach().index_select(0, chunk.node).requires_grad_()
                with torch.enable_grad():
                    logits = _chunk_logits(setting, enc, pred)
                grad = _logits_grad(setting, chunk, logits.detach().to(blank.dtype), flow, total)
                parts = torch.autograd.grad(logits, (enc, pred, *params), grad.to(logits.dtype), allow_unused=True)
                frame_sums.index_add_(0, chunk.place, parts[0].to(frame_sums.dtype))
                sums[1].index_add_(0, chunk.node, parts[1].to(sums[1].dtype))
                for i, part in enumerate(parts[2:], start=2):
                    if part is None:
                        unused.add(i)  # a parameter of the projections, or of a disabled adapter
                    else:
                        sums[i] += part
        grads = [None if i in unused else sums[i].to(x.dtype) for i, x in enumerate(inputs)]
        return grads[0], grads[1], None, None, *grads[2:]


def _chunk_logits(setting: JointSetting, encoder: Tensor, prediction: Tensor) -> Tensor:
    """[n, J] and [n, J] of n cells → [n, V] logits."""
    return joint_logits(setting, encoder[:, None], prediction[:, None])[:, 0, 0]


def joint_logits(setting: JointSetting, encoder: Tensor, prediction: Tensor) -> Tensor:
    """[b, t, J] and [b, k, J] → [b, t, k, V] unnormalised joint output, under the forward pass's autocast setting."""
    joint = setting.joint
    device_type, enabled, dtype = setting.autocast
    # On a CPU NeMo's joint otherwise applies one log-softmax over labels and durations together.
    before, joint.log_softmax = joint.log_softmax, False
    try:
        with torch.autocast(device_type, dtype=dtype) if enabled else nullcontext():
            return joint.joint_after_projection(encoder, prediction)
    finally:
        joint.log_softmax = before


def _logits_grad(setting: JointSetting, chunk: _Chunk, logits: Tensor, flow: ArcScores, total: Tensor) -> Tensor:
    """[n, V] gradient of the chunk's logits: flow into each output minus its softmax share of the cell's flow."""
    frame, node = chunk.frame, chunk.node
    labels = logits[:, : setting.blank + 1].softmax(-1).mul_(-total[frame, node][:, None])
    labels[:, setting.blank] += flow.blank[frame, node]
    # Children of a node differ in their token, so no place is written twice.
    labels[chunk.cell, setting.trie.token[chunk.child]] += flow.label[frame[chunk.cell], chunk.child]
    if not setting.num_durations:
        return labels
    durations = flow.durations[:, frame, node].T
    share = logits[:, setting.blank + 1 :].softmax(-1)
    return torch.cat([labels, durations - share * durations.sum(-1, keepdim=True)], dim=-1)


def _cells_with_gradient(setting: JointSetting, flow: ArcScores) -> Tensor:
    """[T, K] the cells that have more than a negligible gradient."""
    weight = flow.blank.abs().index_add(1, setting.trie.parent.clamp_min(0), flow.label.abs())
    weight += flow.durations.abs().sum(0)
    utterance = setting.trie.utterance
    peak = weight.new_zeros(len(setting.lengths)).scatter_reduce(0, utterance, weight.amax(0), "amax")
    # A NaN must stay visible: it fails "≤", and the cell is then kept.
    return ~(weight <= torch.finfo(weight.dtype).eps ** 2 * peak[utterance])


def _chunks(setting: JointSetting, cells: Tensor) -> Iterator[_Chunk]:
    """The true entries of [T, K] ``cells``, by frame, at most ``setting.cells`` at a time."""
    trie = setting.trie
    child = (trie.parent >= 0).nonzero()[:, 0]
    child = child[trie.parent[child].argsort(stable=True)]  # the children of a node stand together
    count = torch.bincount(trie.parent[child], minlength=trie.num_nodes)
    first = count.cumsum(0) - count  # node → its first child in that order
    frames, nodes = cells.nonzero(as_tuple=True)
    for frame, node in zip(frames.split(setting.cells), nodes.split(setting.cells), strict=True):
        arcs = count[node]
        cell = torch.repeat_interleave(arcs)
        offset = first[node] - (arcs.cumsum(0) - arcs)
        place = trie.utterance[node] * len(cells) + frame
        yield _Chunk(frame, node, place, cell, child[offset[cell] + torch.arange(len(cell), device=cell.device)])


_CPU_CHUNK_MB = 8  # measured: larger chunks fall out of the cache, smaller ones pay more launches


def _rng_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(like.device) if like.is_cuda else None


@contextmanager
def _as_in_forward(modes: list[tuple[Any, bool]]) -> Iterator[None]:
    """Inside, modules are in the train or eval mode that they had in the forward pass."""
    now = [(module, module.training) for module, _ in modes]
    for module, training in modes:
        module.training = training
    try:
        yield
    finally:
        for module, training in now:
            module.training = training


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None] | None, like: Tensor) -> Iterator[None]:
    """Inside, random numbers repeat from ``state``, so that the dropout masks of the forward pass come again."""
    if state is None:
        yield
        return
    host, device = state
    with torch.random.fork_rng([like.device] if device is not None else []):
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, like.device)
        yield
