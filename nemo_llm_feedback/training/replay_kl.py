"""The loss of replay rows, general speech on which the model shall stay what it is (learning without forgetting).

Li and Hoiem 2016, arXiv 1606.09282: the KL divergence from the starting model's outputs is held down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.look_ahead import looking_ahead
from nemo_llm_feedback.asr.reference import encode_both, evaluation_mode, recomputed_layers
from nemo_llm_feedback.training.losses import LossSum
from nemo_llm_feedback.training.state import Feedback


def replay_kl(model: Any, feedback: Feedback, batch: Any) -> LossSum:
    """The divergence from the starting model, without dropout.

    Args:
        model: the policy.
        feedback: state with the frozen reference and the heads.
        batch: NeMo's batch of four: signal [B, S], signal_len [B], tokens [B, U], tokens_len [B]; where a row has no
            text, the reference's transcript takes its place.

    Returns:
        A term per head, nats per utterance, and the metric ``replay_kl`` (first head).
    """
    signal, signal_len, tokens, tokens_len = batch
    settings, loss = feedback.config, LossSum()
    with evaluation_mode(model):
        with (
            recomputed_layers(model.encoder, active=settings.parameters.recompute_encoder),
            looking_ahead(model.look_ahead(), model.encoder, feedback.reference.encoder),
        ):
            encoded, ref_encoded, lengths = encode_both(
                model, feedback.reference, signal, signal_len, augment=bool(settings.feedback.replay_augment)
            )
        labels = _labels(feedback, tokens, tokens_len, ref_encoded, lengths)
        for head, frozen in zip(feedback.heads, feedback.reference.heads, strict=True):
            mean = head.divergence(encoded, frozen, ref_encoded, lengths, labels).mean()
            loss.add(f"{head.name}/replay_kl", mean, count=len(signal), weight=feedback.head_weights[head.name])
    first = loss.terms[f"{feedback.heads[0].name}/replay_kl"].value
    loss.log({"replay_kl": first.detach()}, count=len(signal))  # type: ignore[union-attr]
    return loss


@torch.no_grad()
def _labels(
    feedback: Feedback, tokens: Tensor, tokens_len: Tensor, ref_encoded: Tensor, lengths: Tensor
) -> list[list[int]]:
    """The labels of each row: its text's, or what the reference writes (read by transducers only)."""
    labels = [tokens[b, :n].tolist() for b, n in enumerate(tokens_len.tolist())]
    bare = [b for b, row in enumerate(labels) if not row]
    if bare:
        most = feedback.config.proposals.max_symbols
        written = feedback.reference.heads[0].greedy(ref_encoded[bare], lengths[bare], max_symbols=most)
        for b, found in zip(bare, written, strict=True):
            labels[b] = list(found)
    return labels
