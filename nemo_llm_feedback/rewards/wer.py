"""Labelled RL: minus the word errors against the row's own text (minimum word error rate training)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.text import get_normalizer, occurrences, words
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.rewards.base import register


@register("wer")
class WerReward:
    """R(h) = −(E + (w − 1)·E_entity) in words (characters in scripts without spaces), against the row's text.

    E is the edit distance; E_entity are the edits of a minimum alignment on words of the text inside an occurrence of
    one of the context's terms, and insertions between two words of one (the numerator of entity WER). Errors and not
    their rate: the mean over utterances is then that of the corpus's WER (Prabhavalkar et al. 2018, arXiv 1712.01818).
    Members of a group without text are NaN.

    Args:
        entity_weight: w ≥ 0; 1 = plain word errors.
        normalizer: name of the run's text normalisation, under which terms are looked for.

    Raises:
        RewardError: a weight below 0.
    """

    name = "wer"

    def __init__(self, *, entity_weight: float = 1.0, normalizer: str = "basic") -> None:
        if not entity_weight >= 0:
            raise RewardError(f"entity_weight={entity_weight} of reward wer must be at least 0.")
        self._weight, self._normalize = entity_weight, get_normalizer(normalizer)

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], also as the part ``wer``; with a weight the part ``entity_errors``, negative, too."""
        counts = [self._errors(group) for group in groups]
        errors, entity = (pad_groups([[-float(pair[k]) for pair in row] for row in counts]) for k in (0, 1))
        values = errors + (self._weight - 1) * entity
        return RewardOutput(values, {"wer": values} | ({"entity_errors": entity} if self._weight != 1 else {}))

    def _errors(self, group: HypothesisGroup) -> list[tuple[float, float]]:
        """Errors of each member, and those of them on entities; NaN without a text."""
        text = words(group.reference)
        if not text:
            return [(math.nan, math.nan)] * len(group)
        terms = [words(self._normalize(term)) for term in group.context.terms]
        spans = [span for term in terms for span in occurrences(text, term)]
        inside = {p for start, end in spans for p in range(start, end)}
        within = {p for start, end in spans for p in range(start + 1, end)}
        found = []
        for member in group.texts:
            edits = Levenshtein.editops(text, words(member))
            entity = sum(edit.src_pos in (within if edit.tag == "insert" else inside) for edit in edits)
            found.append((float(len(edits)), float(entity)))
        return found
