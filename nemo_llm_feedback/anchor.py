"""Rows of general speech on which the model shall stay what it is: learning without forgetting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_llm_feedback.losses import Term
from nemo_llm_feedback.reference import encode, evaluation_mode, recomputed_layers
from nemo_llm_feedback.trie import PrefixTrie

if TYPE_CHECKING:
    from nemo_llm_feedback.preparation import FeedbackState


def anchor_terms(model: Any, state: FeedbackState, batch: Any) -> tuple[dict[str, Term], dict[str, float]]:
    """The divergence from the starting model on rows of general speech, without augmentation and dropout.

    Args:
        model: the policy.
        state: with the frozen reference and the heads.
        batch: NeMo's batch of four, of the rows that have text.

    Returns:
        A term a head, and the metric ``anchor_kl``: nats an utterance (first head).
    """
    signal, signal_len, tokens, tokens_len = batch
    config = state.config
    trie = PrefixTrie.build(
        [tokens[b, :n].tolist() for b, n in enumerate(tokens_len.tolist())], range(len(signal))
    ).to(signal.device)
    terms: dict[str, Term] = {}
    with evaluation_mode(model):
        with recomputed_layers(model.encoder, active=config.parameters.recompute_encoder):
            encoded, lengths = encode(model, signal, signal_len)
        ref_encoded, _ = state.reference.encode(signal, signal_len)
        for head, frozen in zip(state.heads, state.reference.heads, strict=True):
            mean = head.divergence(encoded, frozen, ref_encoded, lengths, trie).mean()
            weight = state.head_weights[head.name] * config.feedback.supervised_weight
            terms[f"{head.name}/anchor"] = Term(mean, len(signal), weight)
    first = terms[f"{state.heads[0].name}/anchor"]
    return terms, {"anchor_kl": float(first.value.detach())}
