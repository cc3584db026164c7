"""Rows of general speech on which the model shall stay what it is: learning without forgetting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.reference import encode_both, evaluation_mode, recomputed_layers
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.training.losses import Term

if TYPE_CHECKING:
    from nemo_llm_feedback.training.setup import FeedbackState


def anchor_terms(model: Any, state: FeedbackState, batch: Any) -> tuple[dict[str, Term], dict[str, float]]:
    """The divergence from the starting model on rows of general speech, without dropout.

    Args:
        model: the policy.
        state: with the frozen reference and the heads.
        batch: NeMo's batch of four; where a row has no text, the reference's own takes its place.

    Returns:
        A term a head, and the metric ``anchor_kl``: nats an utterance (first head).
    """
    signal, signal_len, tokens, tokens_len = batch
    config = state.config
    terms: dict[str, Term] = {}
    with evaluation_mode(model):
        with recomputed_layers(model.encoder, active=config.parameters.recompute_encoder):
            encoded, ref_encoded, lengths = encode_both(
                model, state.reference, signal, signal_len, augment=config.feedback.replay_augment
            )
        texts = _texts(state, tokens, tokens_len, ref_encoded, lengths)
        trie = PrefixTrie.build(texts, range(len(signal))).to(signal.device)
        for head, frozen in zip(state.heads, state.reference.heads, strict=True):
            mean = head.divergence(encoded, frozen, ref_encoded, lengths, trie).mean()
            weight = state.head_weights[head.name] * config.feedback.replay_weight
            terms[f"{head.name}/anchor"] = Term(mean, len(signal), weight)
    first = terms[f"{state.heads[0].name}/anchor"]
    return terms, {"anchor_kl": float(first.value.detach())}


@torch.no_grad()
def _texts(
    state: FeedbackState, tokens: Tensor, tokens_len: Tensor, ref_encoded: Tensor, lengths: Tensor
) -> list[list[int]]:
    """The labels of each row, [B] lists: its text's, or what the reference writes (read by transducers only)."""
    texts = [tokens[b, :n].tolist() for b, n in enumerate(tokens_len.tolist())]
    bare = [b for b, text in enumerate(texts) if not text]
    if bare:
        symbols = state.config.proposals.max_symbols
        written = state.reference.heads[0].greedy(ref_encoded[bare], lengths[bare], max_symbols=symbols)
        for b, labels in zip(bare, written, strict=True):
            texts[b] = list(labels)
    return texts
