"""The transducer joint over (frame, trie node) cells, reduced at once to the scores that the lattice reads.

The joint's output has one row of V logits per cell. Of these the lattice needs the blank, the labels of the node's
children and, for TDT, the durations. So the cells are evaluated in blocks that fit a memory budget, each block is
normalised and reduced, and its logits are dropped. The backward pass evaluates cells again (as in activation
checkpointing), but only those that carry gradient: in a trained model a few per cent of them hold all of the
posterior. The [B, T, U, V] tensor never exists.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_llm_feedback.likelihood.lattice import ArcScores
from nemo_llm_feedback.likelihood.once import differentiable_once
from nemo_llm_feedback.trie import PrefixTrie


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


class _Block(NamedTuple):
    """Cells frames × nodes of one utterance, and the children of these nodes."""

    utterance: int
    frames: slice
    nodes: slice
    children: slice


@dataclass(frozen=True, eq=False)
class _Setting:
    """The parts of a call that carry no gradient."""

    joint: TransducerJoint
    trie: PrefixTrie
    parents: list[int]  # the trie's parents on the host
    lengths: list[int]
    cells: int  # the most cells in a block
    autocast: tuple[str, bool, torch.dtype]

    @property
    def num_durations(self) -> int:
        return self.joint.num_extra_outputs

    @property
    def blank(self) -> int:
        return self.joint.num_classes_with_blank - self.num_durations - 1


def arc_scores(
    encoder: Tensor,
    *,
    prediction: Tensor,
    joint: TransducerJoint,
    trie: PrefixTrie,
    lengths: list[int],
    memory_budget_mb: float,
) -> ArcScores:
    """Scores of all arcs of the lattice.

    Args:
        encoder: [B, T, J] encoder output after ``joint.project_encoder``.
        prediction: [K, J] prediction-network output of each node after ``joint.project_prednet``.
        joint: the joint; only what follows the projections is evaluated here.
        trie: the prefix trie on the tensors' device.
        lengths: valid frames of each batch row, each ≤ T.
        memory_budget_mb: the most MiB that a block and its gradients may take; one cell is the minimum.

    Returns:
        The scores in float32 (float64 for float64 input), differentiable once in ``encoder``, ``prediction`` and the
        joint's parameters. Cells whose gradient is below the square of the rounding unit of the largest one of their
        utterance are left out of the backward pass; their sum is far below the rounding error of the rest.
    """
    device_type = encoder.device.type
    autocast = (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
    # Held at once in the backward: sum, activation and their gradients (J wide), logits and their gradients (V wide).
    cell_bytes = 4 * (encoder.shape[-1] + joint.num_classes_with_blank) * encoder.element_size()
    if device_type == "cpu":
        memory_budget_mb = min(memory_budget_mb, _CPU_BLOCK_MB)
    cells = max(1, int(memory_budget_mb * 2**20) // cell_bytes)
    setting = _Setting(joint, trie, trie.parent.tolist(), lengths, cells, autocast)
    params = tuple(param for param in joint.parameters() if param.requires_grad)
    return ArcScores(*_JointScores.apply(encoder, prediction, setting, *params))


class _JointScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder: Tensor, prediction: Tensor, setting: _Setting, *params: Tensor) -> Any:
        wide = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        num_frames, num_nodes = encoder.shape[1], prediction.shape[0]
        blank, label = (encoder.new_zeros((num_frames, num_nodes), dtype=wide) for _ in range(2))
        durations = encoder.new_zeros((setting.num_durations, num_frames, num_nodes), dtype=wide)
        ctx.rng = _rng_state(encoder) if setting.joint.training else None
        ctx.modes = [(module, module.training) for module in setting.joint.modules()]
        for block in _all_blocks(setting):
            at = (block.frames, block.nodes)
            logits = _logits(setting, encoder[block.utterance, block.frames], prediction[block.nodes]).to(wide)
            log_probs = logits[..., : setting.blank + 1].log_softmax(-1)
            blank[at] = log_probs[..., setting.blank]
            node, token = _children(setting, block)
            label[block.frames, block.children] = log_probs[:, node, token]
            if setting.num_durations:
                durations[(slice(None), *at)] = logits[..., setting.blank + 1 :].log_softmax(-1).permute(2, 0, 1)
        ctx.save_for_backward(encoder, prediction, *params)
        ctx.setting = setting
        return blank, label, durations

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, blank: Tensor, label: Tensor, durations: Tensor) -> tuple[Tensor | None, ...]:
        encoder, prediction, *params = inputs = ctx.saved_tensors
        setting: _Setting = ctx.setting
        flow = ArcScores(blank, label, durations)
        # What flows through a cell in all is the weight of its softmax.
        total = blank.index_add(1, setting.trie.parent.clamp_min(0), label)
        # Random masks repeat only when the blocks do.
        blocks = _all_blocks(setting) if ctx.rng else _blocks_with_gradient(setting, flow)
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        unused: set[int] = set()
        # The caller may have left eval mode by now; dropout in the second evaluation would be another function.
        with _as_in_forward(ctx.modes), _replayed(ctx.rng, encoder):
            for block in blocks:
                with torch.enable_grad():
                    enc = encoder[block.utterance, block.frames].detach().requires_grad_()
                    pred = prediction[block.nodes].detach().requires_grad_()
                    logits = _logits(setting, enc, pred)
                grad = _logits_grad(setting, block, logits.detach().to(blank.dtype), flow, total)
                parts = torch.autograd.grad(logits, (enc, pred, *params), grad.to(logits.dtype), allow_unused=True)
                places = (sums[0][block.utterance, block.frames], sums[1][block.nodes], *sums[2:])
                for i, (place, part) in enumerate(zip(places, parts, strict=True)):
                    if part is None:
                        unused.add(i)  # a parameter of the projections, or of a disabled adapter
                    else:
                        place += part
        grads = [None if i in unused else sums[i].to(x.dtype) for i, x in enumerate(inputs)]
        return grads[0], grads[1], None, *grads[2:]


def _logits(setting: _Setting, encoder: Tensor, prediction: Tensor) -> Tensor:
    """[t, J] and [k, J] → [t, k, V] unnormalised joint output, under the autocast setting of the forward pass."""
    joint = setting.joint
    device_type, enabled, dtype = setting.autocast
    # On a CPU NeMo's joint otherwise applies one log-softmax over labels and durations together.
    before, joint.log_softmax = joint.log_softmax, False
    try:
        with torch.autocast(device_type, dtype=dtype) if enabled else nullcontext():
            return joint.joint_after_projection(encoder[None], prediction[None])[0]
    finally:
        joint.log_softmax = before


def _logits_grad(setting: _Setting, block: _Block, logits: Tensor, flow: ArcScores, total: Tensor) -> Tensor:
    """[t, k, V] gradient of the block's logits: flow into each output minus its softmax share of the cell's flow."""
    at = (block.frames, block.nodes)
    labels = logits[..., : setting.blank + 1].softmax(-1).mul_(-total[at][..., None])
    labels[..., setting.blank] += flow.blank[at]
    node, token = _children(setting, block)
    labels[:, node, token] += flow.label[block.frames, block.children]  # children of a node differ in their token
    if not setting.num_durations:
        return labels
    durations = flow.durations[(slice(None), *at)].permute(1, 2, 0)
    share = logits[..., setting.blank + 1 :].softmax(-1)
    return torch.cat([labels, durations - share * durations.sum(-1, keepdim=True)], dim=-1)


def _children(setting: _Setting, block: _Block) -> tuple[Tensor, Tensor]:
    """Of the children of the block's nodes: [C] position of the parent in the block, [C] token."""
    return setting.trie.parent[block.children] - block.nodes.start, setting.trie.token[block.children]


def _all_blocks(setting: _Setting) -> Iterator[_Block]:
    """Blocks that hold every cell t < T of every utterance."""
    windows = [(0, setting.lengths[row]) for row, start, stop in setting.trie.spans for _ in range(start, stop)]
    return _blocks(setting, windows)


def _blocks_with_gradient(setting: _Setting, flow: ArcScores) -> Iterator[_Block]:
    """Blocks that hold every cell that has more than a negligible gradient."""
    weight = flow.blank.abs().index_add(1, setting.trie.parent.clamp_min(0), flow.label.abs())
    weight += flow.durations.abs().sum(0)
    utterance = setting.trie.utterance
    peak = weight.new_zeros(len(setting.lengths)).scatter_reduce(0, utterance, weight.amax(0), "amax")
    # A NaN must stay visible: it fails "≤", and the whole column is then kept.
    active = ~(weight <= torch.finfo(weight.dtype).eps ** 2 * peak[utterance])
    first = active.to(torch.uint8).argmax(0)
    stop = len(active) - active.flip(0).to(torch.uint8).argmax(0)
    stop = torch.where(active.any(0), stop, first)
    return _blocks(setting, list(zip(first.tolist(), stop.tolist(), strict=True)))


def _blocks(setting: _Setting, windows: list[tuple[int, int]]) -> Iterator[_Block]:
    """Covers the frames first … stop − 1 of each node by blocks of at most ``setting.cells`` cells."""
    parents = setting.parents
    for row, start, stop in setting.trie.spans:
        node = start
        while node < stop:
            end, first, last = _merge(setting, windows, node, stop)
            children = slice(bisect_left(parents, node, start + 1, stop), bisect_left(parents, end, start + 1, stop))
            step = max(1, setting.cells // (end - node))
            for frame in range(first, last, step):
                yield _Block(row, slice(frame, min(frame + step, last)), slice(node, end), children)
            node = end


def _merge(setting: _Setting, windows: list[tuple[int, int]], node: int, stop: int) -> tuple[int, int, int]:
    """One past the last of the nodes that share a block with ``node``, and the frames of that block.

    A neighbour joins while the block stays within its limit and the cells that this adds to the nodes' own windows
    take less time than the launch of one more block.
    """
    overhead = _LAUNCH_CELLS.get(setting.autocast[0], _LAUNCH_CELLS["cuda"])
    first, last = windows[node]
    end = node + 1
    while end < stop and last > first:
        low, high = windows[end]
        low, high = (min(first, low), max(last, high)) if high > low else (first, last)
        area = (high - low) * (end + 1 - node)
        own = (last - first) * (end - node) + windows[end][1] - windows[end][0]
        if area > setting.cells or area - own > overhead:
            break
        first, last, end = low, high, end + 1
    return end, first, last


# Cells that the joint evaluates in the time that a block takes to launch: about 0.4 ms on one CPU core, at some 3 µs a
# cell; on CUDA an estimate from the launch times and matrix rate of an H100, not measured.
_LAUNCH_CELLS = {"cpu": 128, "cuda": 16384}

_CPU_BLOCK_MB = 8  # measured: larger blocks fall out of the cache, smaller ones pay more launches


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
