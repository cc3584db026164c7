"""Term swaps: transcripts in which a span of words is replaced by a context term that looks like it.

Errors on unknown words are phonetic spellings of the right ones (``capachineo`` for ``cappuccino``), which no beam
turns into the term. The likelihood of any text is exact, so a swap only has to be proposed; the reward decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rapidfuzz import fuzz, process

# A term is compared with spans of at most this many words more than it has: recognisers split unknown words.
_EXTRA_WORDS = 2


def swap_terms(text: str, terms: Sequence[str], *, min_similarity: float, limit: int) -> list[str]:
    """Proposes transcripts with one span replaced by a term.

    Spans and terms are compared by their letters without spaces (normalised indel similarity of rapidfuzz), so that
    ``soy mok`` and ``soy milk`` are as near as they sound. Of all spans a term is tried at its most similar place.

    Args:
        text: a transcript.
        terms: context terms.
        min_similarity: 0 to 100; spans less similar are left alone.
        limit: largest number of proposals.

    Returns:
        Distinct transcripts, most similar first, none equal to ``text``.
    """
    words = text.split()
    if not words or not terms:
        return []
    longest = max(len(term.split()) for term in terms) + _EXTRA_WORDS
    spans = [(i, j) for i in range(len(words)) for j in range(i + 1, min(i + longest, len(words)) + 1)]
    letters = ["".join(words[i:j]) for i, j in spans]
    similarity = process.cdist(
        letters, [term.replace(" ", "") for term in terms], scorer=fuzz.ratio, score_cutoff=min_similarity, workers=1
    )
    widths = np.array([j - i for i, j in spans])
    found: list[tuple[float, str]] = []
    for k, term in enumerate(terms):
        column = np.where(widths <= len(term.split()) + _EXTRA_WORDS, similarity[:, k], 0.0)
        best = int(column.argmax())
        i, j = spans[best]
        if column[best] > 0 and words[i:j] != term.split():
            found.append((float(column[best]), " ".join([*words[:i], *term.split(), *words[j:]])))
    found.sort(key=lambda item: -item[0])
    return list(dict.fromkeys(swapped for _, swapped in found))[:limit]
