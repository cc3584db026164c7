"""KL divergence between the outputs of two models along given audio: how far a policy has moved from a reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_llm_feedback.asr.likelihood.autograd import Modes, in_modes, modes_of
from nemo_llm_feedback.asr.likelihood.joint import Chunk, JointCells
from nemo_llm_feedback.asr.likelihood.lattice import ArcScores, lattice_log_prob

# Cells that the reference's paths visit less often are left out: together they hold next to nothing of the sum.
_MIN_OCCUPANCY = 1e-3


def ctc_divergence(log_probs: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """Σ_t KL( p_ref(· | x, t) ‖ p(· | x, t) ), over labels and blank.

    Args:
        log_probs: [B, T, V+1] the policy's log-probabilities (natural log, normalised).
        reference: [B, T, V+1] the reference's log-probabilities of the same audio.
        lengths: [B] valid frames.

    Returns:
        [B] nats per utterance, ≥ 0, with gradient in ``log_probs``.
    """
    valid = torch.arange(log_probs.shape[1], device=log_probs.device)[None, :] < lengths.to(log_probs.device)[:, None]
    # Frames of the padding are taken out before they can make a NaN of the sum's gradient.
    policy = torch.where(valid[..., None], log_probs, torch.zeros_like(log_probs))
    frozen = torch.where(valid[..., None], reference, torch.zeros_like(reference)).detach()
    return _kl(frozen, policy).masked_fill(~valid, 0.0).sum(1)


def transducer_divergence(policy: JointCells, reference: JointCells, *, durations: Sequence[int] = ()) -> Tensor:
    """Σ over cells (t, u) of γ_ref(t, u) · KL( p_ref(· | t, u) ‖ p(· | t, u) ): the divergence that is met along the
    reference's alignments of a text.

    γ_ref(t, u) is the reference's probability of passing through the cell, given that it emits the text (forward and
    backward variables, Graves 2012, arXiv:1211.3711). The outputs of a cell are labels and blank, with TDT also the
    durations, which are independent of them, so that their KL is added. The outputs of both models are held for one
    chunk of cells at a time, within the policy's memory budget, and computed again in the backward pass.

    Args:
        policy: the policy's cells, with gradient; the trie has one hypothesis per row, in the rows' order: the text
            whose alignments are followed.
        reference: the reference's cells, of the same audio, trie and architecture.
        durations: TDT's durations in frames, as in ``transducer_log_prob``; empty for RNN-T.

    Returns:
        [B] nats per utterance, ≥ 0, with gradient in the policy's frames, prediction network and joint; 0 where the
        audio is too short for the text. Cells with γ_ref under 0.001 are left out.
    """
    every = reference.all_cells()
    scores = reference.evaluate(every, reference.empty_scores())
    occupancy = _occupancy(scores, reference, tuple(durations)).masked_fill(~every, 0.0)
    chosen = occupancy > _MIN_OCCUPANCY
    frame, node = chosen.nonzero(as_tuple=True)
    run = functools.partial(_chunk_kl, policy, reference, modes_of(policy.joint.modules()))
    # The backward holds twice what the likelihood's does: the logits of two models, their softmaxes, the gradients.
    chunks = policy.chunks(chosen, max(1, policy.chunk // 2))
    found = torch.cat([checkpoint(run, chunk, use_reentrant=False) for chunk in chunks])
    weighted = found * occupancy[frame, node].to(found.dtype)
    return weighted.new_zeros(len(policy.lengths)).index_add(0, policy.trie.utterance[node], weighted)


def _occupancy(scores: ArcScores, cells: JointCells, durations: tuple[int, ...]) -> Tensor:
    """[T, K] probability that the reference's path of the row's text leaves the cell (t, u); a derivative of log p."""
    leaves = ArcScores(*(part.detach().requires_grad_() for part in scores))
    with torch.enable_grad():
        log_prob = lattice_log_prob(leaves, trie=cells.trie, lengths=cells.lengths, durations=durations)
        feasible = torch.where(log_prob.isfinite(), log_prob, torch.zeros_like(log_prob)).sum()
        flow = torch.autograd.grad(feasible, (leaves.blank, leaves.label))
    return flow[0].index_add(1, cells.trie.parent.clamp_min(0), flow[1])


def _chunk_kl(policy: JointCells, reference: JointCells, modes: Modes, chunk: Chunk) -> Tensor:
    """[n] KL of the outputs of a chunk's cells, with the policy's modules in the given modes."""
    with torch.no_grad():
        target = _outputs(reference, chunk)
    with in_modes(modes):  # the second run happens in the backward, when the model may be in train mode again
        found = _outputs(policy, chunk)
    return torch.stack([_kl(a, b) for a, b in zip(target, found, strict=True)]).sum(0)


def _outputs(cells: JointCells, chunk: Chunk) -> list[Tensor]:
    """[n, V+1] log-probabilities of labels and blank in a chunk's cells and, of a TDT model, [n, M] of durations."""
    logits = cells.chunk_logits(*cells.inputs(chunk))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    parts = logits[:, : cells.blank + 1], logits[:, cells.blank + 1 :]
    return [part.log_softmax(-1) for part in parts if part.shape[1]]


def _kl(reference: Tensor, policy: Tensor) -> Tensor:
    """KL(reference ‖ policy) over the last dimension of log-probabilities."""
    return (reference.exp() * (reference - policy)).sum(-1)
