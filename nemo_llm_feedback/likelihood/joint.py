"""The transducer joint over (frame, trie node) cells, reduced at once to the scores that the lattice reads.

The joint's output has one row of V logits per cell. Of these the lattice needs the blank, the labels of the node's
children and, for TDT, the durations. So the cells are evaluated in blocks that fit a memory budget, each block is
normalised and reduced, and its logits are dropped; the backward pass evaluates the blocks again (as in activation
checkpointing) and skips cells that no hypothesis visits. The [B, T, U, V] tensor never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nemo_llm_feedback.likelihood.inputs import check_labels
from nemo_llm_feedback.trie import PrefixTrie


class TransducerJoint(Protocol):
    """What is asked of a joint; NeMo's ``RNNTJoint`` has it."""

    log_softmax: bool | None
    training: bool

    @property
    def num_extra_outputs(self) -> int: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def project_encoder(self, encoder_output: Tensor) -> Tensor: ...

    def project_prednet(self, prednet_output: Tensor) -> Tensor: ...

    def joint_after_projection(self, f: Tensor, g: Tensor) -> Tensor: ...


class ArcScores(NamedTuple):
    """Log-probabilities out of the cells (t, node), each part of the output normalised by itself.

    Attributes:
        blank: [T, K] of blank at (t, k).
        label: [T, K] of token(k) at (t, parent(k)); 0 at roots.
        durations: [M, T, K] of the i-th duration at (t, k); M = 0 for RNN-T. All are 0 at t ≥ T of the utterance.
    """

    blank: Tensor
    label: Tensor
    durations: Tensor


class _Block(NamedTuple):
    """Cells frames × nodes of one utterance, and the children of these nodes."""

    utterance: int
    frames: slice
    nodes: slice
    children: slice


@dataclass(frozen=True, eq=False)
class _Plan:
    joint: TransducerJoint
    parent: Tensor
    token: Tensor
    blocks: tuple[_Block, ...]
    num_durations: int
    autocast: tuple[str, bool, torch.dtype]


def arc_scores(
    encoder: Tensor,
    *,
    prediction: Tensor,
    joint: TransducerJoint,
    trie: PrefixTrie,
    lengths: list[int],
    num_durations: int,
    memory_budget_mb: float,
) -> ArcScores:
    """Scores of all arcs of the lattice.

    Args:
        encoder: [B, T, J] encoder output after ``joint.project_encoder``.
        prediction: [K, J] prediction-network output of each node after ``joint.project_prednet``.
        joint: the joint; only what follows the projections is evaluated here.
        trie: the prefix trie on the tensors' device.
        lengths: valid frames of each batch row, each ≤ T.
        num_durations: number of TDT durations at the end of the joint's output; 0 for RNN-T. Blank is the last label.
        memory_budget_mb: MiB that the logits of one block and their gradients may take; one cell is the minimum.

    Returns:
        The scores in float32 (float64 for float64 input), differentiable once in ``encoder``, ``prediction`` and the
        joint's parameters.
    """
    device_type = encoder.device.type
    autocast = (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
    params = tuple(param for param in joint.parameters() if param.requires_grad)
    with torch.no_grad(), _raw_logits(joint, autocast):
        width = joint.joint_after_projection(encoder[:1, :1], prediction[None, :1]).shape[-1]  # V + 1 + durations
    num_labels = width - num_durations
    check_labels(trie, blank=num_labels - 1, num_classes=num_labels)
    # Held at once in the backward: sum, activation and their gradients (J wide), logits and their gradients (V wide).
    cell_bytes = (4 * encoder.shape[-1] + 4 * width) * encoder.element_size()
    cells = max(1, int(memory_budget_mb * 2**20) // cell_bytes)
    plan = _Plan(joint, trie.parent, trie.token, _blocks(trie, lengths, cells), num_durations, autocast)
    return ArcScores(*_JointScores.apply(encoder, prediction, plan, *params))


class _JointScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, encoder: Tensor, prediction: Tensor, plan: _Plan, *params: Tensor) -> Any:
        dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
        num_frames, num_nodes = encoder.shape[1], prediction.shape[0]
        blank, label, lse = (encoder.new_zeros((num_frames, num_nodes), dtype=dtype) for _ in range(3))
        durations = encoder.new_zeros((plan.num_durations, num_frames, num_nodes), dtype=dtype)
        ctx.rng = _rng_state(encoder) if plan.joint.training else None  # type: ignore[attr-defined]
        for block in plan.blocks:
            logits = _logits(plan, block, encoder, prediction).to(dtype)  # [t, k, V]
            labels, blank_id = _label_part(logits, plan)
            norm = labels.logsumexp(-1)
            at = (block.frames, block.nodes)
            lse[at] = norm
            blank[at] = labels[..., blank_id] - norm
            node, token = _children(plan, block)
            label[block.frames, block.children] = labels[:, node, token] - norm[:, node]
            if plan.num_durations:
                durations[(slice(None), *at)] = logits[..., blank_id + 1 :].log_softmax(-1).permute(2, 0, 1)
        ctx.save_for_backward(encoder, prediction, lse, durations, *params)
        ctx.plan = plan  # type: ignore[attr-defined]
        return blank, label, durations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, blank: Tensor, label: Tensor, durations: Tensor) -> tuple[Tensor | None, ...]:
        encoder, prediction, lse, log_durations, *params = ctx.saved_tensors
        plan: _Plan = ctx.plan
        parent = plan.parent.clamp_min(0)
        # The softmax part of a cell's gradient: what flows through its blank and its children's labels together.
        total = blank.index_add(1, parent, label)
        inputs = (encoder, prediction, *params)
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        with _replay_rng(ctx.rng, encoder):
            for block in plan.blocks:
                at = (block.frames, block.nodes)
                with torch.enable_grad():
                    enc = encoder[block.utterance, block.frames].detach().requires_grad_()
                    pred = prediction[block.nodes].detach().requires_grad_()
                    logits = _logits_of(plan, enc, pred)
                grad = logits.detach().to(lse.dtype, copy=True)
                labels, blank_id = _label_part(grad, plan)
                labels.sub_(lse[at][..., None]).exp_().mul_(-total[at][..., None])
                labels[..., blank_id] += blank[at]
                node, token = _children(plan, block)
                labels[:, node, token] += label[block.frames, block.children]
                if plan.num_durations:
                    flow = durations[(slice(None), *at)].permute(1, 2, 0)
                    share = log_durations[(slice(None), *at)].permute(1, 2, 0).exp()
                    grad[..., blank_id + 1 :] = flow - share * flow.sum(-1, keepdim=True)
                parts = torch.autograd.grad(logits, (enc, pred, *params), grad.to(logits.dtype), allow_unused=True)
                places = (sums[0][block.utterance, block.frames], sums[1][block.nodes], *sums[2:])
                for place, part in zip(places, parts, strict=True):
                    if part is not None:
                        place += part
        grads = [total.to(like.dtype) for total, like in zip(sums, inputs, strict=True)]
        return grads[0], grads[1], None, *grads[2:]


def _logits(plan: _Plan, block: _Block, encoder: Tensor, prediction: Tensor) -> Tensor:
    return _logits_of(plan, encoder[block.utterance, block.frames], prediction[block.nodes])


def _logits_of(plan: _Plan, encoder: Tensor, prediction: Tensor) -> Tensor:
    """[t, J] and [k, J] → [t, k, V] unnormalised joint output."""
    with _raw_logits(plan.joint, plan.autocast):
        return plan.joint.joint_after_projection(encoder[None], prediction[None])[0]


@contextmanager
def _raw_logits(joint: TransducerJoint, autocast: tuple[str, bool, torch.dtype]) -> Iterator[None]:
    """Inside, the joint returns logits under the given autocast setting.

    On a CPU NeMo's joint otherwise applies one log-softmax over labels and durations together.
    """
    before, joint.log_softmax = joint.log_softmax, False
    device_type, enabled, dtype = autocast
    try:
        with torch.autocast(device_type, dtype=dtype, enabled=enabled) if enabled else nullcontext():
            yield
    finally:
        joint.log_softmax = before


def _label_part(logits: Tensor, plan: _Plan) -> tuple[Tensor, int]:
    """The labels-and-blank part of the joint's output, a view, and the index of blank in it (the last)."""
    num_labels = logits.shape[-1] - plan.num_durations
    return logits[..., :num_labels], num_labels - 1


def _children(plan: _Plan, block: _Block) -> tuple[Tensor, Tensor]:
    """Of the children of the block's nodes: [C] position of the parent in the block, [C] token."""
    return plan.parent[block.children] - block.nodes.start, plan.token[block.children]


def _blocks(trie: PrefixTrie, lengths: list[int], cells: int) -> tuple[_Block, ...]:
    """Cuts the cells of each utterance into blocks of at most ``cells`` cells, whole time spans where they fit."""
    parent = trie.parent.cpu()
    blocks = []
    for utterance, start, stop in trie.spans:
        num_frames = lengths[utterance]
        if num_frames == 0:
            continue
        frame_step = min(num_frames, cells)
        node_step = max(1, cells // num_frames)
        for node in range(start, stop, node_step):
            nodes = slice(node, min(node + node_step, stop))
            bounds = torch.searchsorted(parent[start + 1 : stop].contiguous(), torch.tensor([nodes.start, nodes.stop]))
            first, last = (bounds + start + 1).tolist()
            for frame in range(0, num_frames, frame_step):
                frames = slice(frame, min(frame + frame_step, num_frames))
                blocks.append(_Block(utterance, frames, nodes, slice(first, last)))
    return tuple(blocks)


def _rng_state(like: Tensor) -> tuple[Tensor, Tensor | None]:
    on_device = like.device.type == "cuda"
    return torch.get_rng_state(), torch.cuda.get_rng_state(like.device) if on_device else None


@contextmanager
def _replay_rng(state: tuple[Tensor, Tensor | None] | None, like: Tensor) -> Iterator[None]:
    """Inside, random numbers repeat from ``state``, so that dropout masks of the forward pass come again."""
    if state is None:
        yield
        return
    host, device = state
    with torch.random.fork_rng([like.device] if device is not None else []):
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, like.device)
        yield
