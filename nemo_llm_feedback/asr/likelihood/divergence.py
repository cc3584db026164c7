"""How far a policy has moved from a reference on given audio: KL divergence of their outputs along the audio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.inputs import clean_rows
from nemo_llm_feedback.asr.likelihood.joint import JointSetting, TransducerJoint, evaluate, joint_logits
from nemo_llm_feedback.asr.likelihood.lattice import ArcScores, lattice_log_prob
from nemo_llm_feedback.asr.likelihood.prediction import PredictionNetwork, prefix_outputs
from nemo_llm_feedback.core.trie import PrefixTrie

# Cells that the reference's paths visit less often are left out: together they hold next to nothing of the sum.
_MIN_OCCUPANCY = 1e-3


class TransducerParts(NamedTuple):
    """A transducer as the divergence needs it.

    Attributes:
        frames: [B, T, D] encoder output.
        decoder: NeMo's prediction network.
        joint: NeMo's joint.
    """

    frames: Tensor
    decoder: PredictionNetwork
    joint: TransducerJoint


def ctc_divergence(log_probs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """Σ_t KL( p_ref(· | x, t) ‖ p(· | x, t) ), over labels and blank.

    Args:
        log_probs: [B, T, V+1] of the policy, normalised.
        reference: [B, T, V+1] of the reference, of the same audio.
        lengths: [B] valid frames.

    Returns:
        [B] nats an utterance, ≥ 0, with gradient in ``log_probs``.
    """
    valid = torch.arange(log_probs.shape[1], device=log_probs.device)[None, :] < lengths.to(log_probs.device)[:, None]
    # Frames of the padding are taken out before they can make a NaN of the sum's gradient.
    policy = torch.where(valid[..., None], log_probs, torch.zeros_like(log_probs))
    frozen = torch.where(valid[..., None], reference, torch.zeros_like(reference)).detach()
    return _kl(frozen, policy).masked_fill(~valid, 0.0).sum(1)


def transducer_divergence(
    policy: TransducerParts,
    reference: TransducerParts,
    lengths: Tensor,
    trie: PrefixTrie,
    *,
    durations: Sequence[int] = (),
    memory_budget_mb: float = 256,
) -> Tensor:
    """Σ over cells (t, u) of γ_ref(t, u) · KL( p_ref(· | t, u) ‖ p(· | t, u) ): the divergence that is met along the
    reference's alignments of a text.

    γ_ref(t, u) is the reference's probability of passing through the cell, given that it writes the text (forward and
    backward variables, Graves 2012, arXiv:1211.3711). The outputs of a cell are labels and blank, with TDT also the
    durations, which are independent of them, so that their KL is added.

    Args:
        policy: with gradient.
        reference: of the same audio and architecture.
        lengths: [B] valid frames.
        trie: one hypothesis a row, in the rows' order: the text that leads through the lattice.
        durations: of a TDT model, as in ``tdt_log_prob``; empty = RNN-T.
        memory_budget_mb: for the reference's pass over all cells.

    Returns:
        [B] nats an utterance, ≥ 0, with gradient in the policy's frames, prediction network and joint; 0 where the
        audio is too short for the text. Cells with γ_ref under 0.001 are left out.
    """
    frozen, host_lengths, _ = clean_rows(reference.frames, lengths, trie)
    moving, _, _ = clean_rows(policy.frames, lengths, trie)
    with torch.no_grad():
        ref_frames = reference.joint.project_encoder(frozen)
        ref_nodes = reference.joint.project_prednet(prefix_outputs(reference.decoder, trie))
        setting = JointSetting.of(
            ref_frames, joint=reference.joint, trie=trie, lengths=host_lengths, memory_budget_mb=memory_budget_mb
        )
        scores = setting.empty_scores(ref_frames)
        cells = setting.all_cells(ref_frames.shape[1])
        evaluate(setting, ref_frames, ref_nodes, cells=cells, into=scores)
    occupancy = _occupancy(scores, lengths, trie, tuple(durations)).masked_fill(~cells, 0.0)
    frame, node = (occupancy > _MIN_OCCUPANCY).nonzero(as_tuple=True)
    place = trie.utterance[node] * ref_frames.shape[1] + frame
    frames = policy.joint.project_encoder(moving)
    nodes = policy.joint.project_prednet(prefix_outputs(policy.decoder, trie))
    own = JointSetting.of(frames, joint=policy.joint, trie=trie, lengths=host_lengths, memory_budget_mb=1)
    with torch.no_grad():
        target = _cell_logits(setting, ref_frames, ref_nodes, place, node)
    divergence = _cell_kl(target, _cell_logits(own, frames, nodes, place, node), num_durations=len(durations))
    weighted = divergence * occupancy[frame, node].to(divergence.dtype)
    return weighted.new_zeros(len(lengths)).index_add(0, trie.utterance[node], weighted)


def _occupancy(scores: ArcScores, lengths: Tensor, trie: PrefixTrie, durations: tuple[int, ...]) -> Tensor:
    """[T, K] probability that the reference's path of the row's text leaves the cell (t, u); a derivative of log p."""
    leaves = ArcScores(*(part.detach().requires_grad_() for part in scores))
    with torch.enable_grad():
        log_prob = lattice_log_prob(leaves, trie=trie, lengths=lengths.to(scores.blank.device), durations=durations)
        feasible = torch.where(log_prob.isfinite(), log_prob, torch.zeros_like(log_prob)).sum()
        flow = torch.autograd.grad(feasible, (leaves.blank, leaves.label))
    return flow[0].index_add(1, trie.parent.clamp_min(0), flow[1])


def _cell_logits(setting: JointSetting, frames: Tensor, nodes: Tensor, place: Tensor, node: Tensor) -> Tensor:
    """[n, V] logits of n cells."""
    chosen = frames.flatten(0, 1).index_select(0, place)[:, None], nodes.index_select(0, node)[:, None]
    logits = joint_logits(setting, *chosen)[:, 0, 0]
    return logits if logits.dtype == torch.float64 else logits.float()


def _cell_kl(reference: Tensor, policy: Tensor, *, num_durations: int) -> Tensor:
    """[n] KL of the cells' outputs from [n, V] logits, the durations being the last of them."""
    labels = policy.shape[1] - num_durations
    parts = [(reference[:, :labels], policy[:, :labels])]
    if num_durations:
        parts.append((reference[:, labels:], policy[:, labels:]))
    return torch.stack([_kl(a.log_softmax(-1), b.log_softmax(-1)) for a, b in parts]).sum(0)


def _kl(reference: Tensor, policy: Tensor) -> Tensor:
    """KL(reference ‖ policy) over the last dimension of log-probabilities."""
    return (reference.exp() * (reference - policy)).sum(-1)
