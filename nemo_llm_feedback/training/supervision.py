"""Supervised losses beside NeMo's: pseudo-labelled batches, and an exact loss where NeMo has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head
from nemo_llm_feedback.core.config import ObjectiveConfig
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.hypotheses.nbest import NBestBatch

NemoBatch = tuple[Tensor, Tensor, Tensor, Tensor]


def pseudo_labelled_batch(
    config: ObjectiveConfig, audio: Audio, nbest: NBestBatch, *, head: str
) -> tuple[NemoBatch | None, dict[str, float]]:
    """The utterances of a batch with one pseudo-label each, as NeMo's loaders would give them.

    Args:
        config: ``label`` chooses by frozen model, by reward, or names the source whose transcripts are learned;
            ``min_confidence`` filters.
        audio: B utterances.
        nbest: their hypotheses.
        head: the head whose scores choose.

    Returns:
        NeMo's batch of four (None when no label passed the filter or all are empty), and metrics: mean ``confidence``
        and ``kept_fraction`` of the utterances.
    """
    scores = (nbest.rewards if config.label == "reward" else nbest.ref_logp)[head]
    kept, labels, confidences = [], [], []
    for b, members in enumerate(nbest.hypotheses):
        allowed = [n for n, member in enumerate(members) if not config.source or config.source in member.sources]
        row = scores[b, allowed]
        if not allowed or not torch.isfinite(row).all():
            continue
        share = torch.softmax(row, dim=0)
        best = allowed[int(share.argmax())]
        confidences.append(float(share.max()))
        if confidences[-1] >= config.min_confidence and members[best].tokens:
            kept.append(b)
            labels.append(torch.tensor(members[best].tokens))
    metrics = {"confidence": sum(confidences) / max(len(confidences), 1), "kept_fraction": len(kept) / len(nbest)}
    if not kept:
        return None, metrics
    device = audio.signal.device
    tokens_len = torch.tensor([len(y) for y in labels], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True).to(device)
    longest = int(audio.signal_len[kept].max())
    return (audio.signal[kept][:, :longest], audio.signal_len[kept], padded, tokens_len), metrics


def exact_supervised_step(model: Any, heads: Sequence[Head], batch: Any) -> dict[str, Any]:
    """NeMo's supervised step with the exact log-likelihood as the transducer loss.

    Augmentation, train mode and the mix with a hybrid's CTC loss are the stock step's; what the stock loss adds to the
    likelihood (FastEmit, TDT's sigma and omega) is not there.

    Args:
        model: a transducer or hybrid.
        heads: its heads, transducer first.
        batch: NeMo's batch of four.

    Returns:
        ``{"loss": mean over rows of −log p(text | audio)}`` in nats, hybrids mixed by ``aux_ctc.ctc_loss_weight``.
    """
    signal, signal_len, tokens, tokens_len = batch
    encoded, lengths = model.forward(input_signal=signal, input_signal_length=signal_len)
    labels = [[tokens[b, :n].tolist()] for b, n in enumerate(tokens_len.tolist())]
    losses = {head.name: -_finite_mean(head.score(encoded, lengths, labels)) for head in heads}
    weight = float(getattr(model, "ctc_loss_weight", 0.0)) if "ctc" in losses else 0.0
    loss = losses["transducer"] * (1 - weight) + (losses["ctc"] * weight if weight else 0.0)
    return {"loss": loss, "log": {"train_loss": loss.detach()}}


def _finite_mean(logp: Tensor) -> Tensor:
    """Mean over feasible rows: a text that the audio is too short for teaches nothing, as with ``zero_infinity``."""
    finite = torch.isfinite(logp)
    return torch.where(finite, logp, torch.zeros_like(logp)).sum() / finite.sum().clamp(min=1)
