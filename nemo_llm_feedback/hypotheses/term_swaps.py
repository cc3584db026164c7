"""Term swaps: transcripts in which a span of words is replaced by a context term that looks like it.

Errors on unknown words are phonetic spellings of the right ones (``capachineo`` for ``cappuccino``), which no beam
turns into the term. The likelihood of any text is exact, so a swap only has to be proposed; the reward decides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from rapidfuzz import fuzz, process

from nemo_llm_feedback.core.text import UNSPACED, basic, word_spans

# A term is compared with spans of at most this many words more than it has: recognisers split unknown words.
_EXTRA_WORDS = 2


def swap_terms(text: str, terms: Sequence[str], *, min_similarity: float, limit: int) -> list[str]:
    """Proposes transcripts with one span replaced by a term.

    Spans and terms are compared by their letters without spaces, case and punctuation (normalised indel similarity of
    rapidfuzz), so that ``soy mok`` and ``Soy-Milk`` are as near as they sound. Of all spans a term is tried at its
    most similar place; in scripts without spaces spans are of characters, and the most similar one of the
    term's length is tried as well.

    Args:
        text: a transcript.
        terms: context terms, spelled as they should be written.
        min_similarity: 0 to 100; spans less similar are left alone.
        limit: largest number of proposals.

    Returns:
        Distinct transcripts, most similar first, none of the same words as ``text``; its punctuation around the span
        stays.
    """
    places, sizes = _bare_spans(text), list(map(_size, terms))
    if not places or not terms:
        return []
    longest = max(sizes) + _EXTRA_WORDS
    spans = [(i, j) for i in range(len(places)) for j in range(i + 1, min(i + longest, len(places)) + 1)]
    folded = [_letters(text[start:end]) for start, end in places]
    letters = ["".join(folded[i:j]) for i, j in spans]
    similarity = process.cdist(
        letters, list(map(_letters, terms)), scorer=fuzz.ratio, score_cutoff=min_similarity, workers=1
    )
    widths, lengths = np.array([j - i for i, j in spans])[:, None], np.array(sizes)
    allowed = np.where(widths <= lengths + _EXTRA_WORDS, similarity, 0.0)  # [spans, terms]
    same = np.where(widths == lengths, similarity, 0.0)
    found: list[tuple[float, str]] = []
    nearest = allowed.argmax(axis=0).tolist()
    for k in np.flatnonzero(allowed.max(axis=0) > 0).tolist():
        term, tried = terms[k], {nearest[k]}
        if UNSPACED.match(term):
            # Wrong characters are mostly as many as the right ones, where the likest span may lack one.
            tried.add(int(same[:, k].argmax()))
        for best in tried:
            start, end = places[spans[best][0]][0], places[spans[best][1] - 1][1]
            if allowed[best, k] > 0 and basic(text[start:end]) != basic(term):
                found.append((float(allowed[best, k]), f"{text[:start]}{term}{text[end:]}"))
    found.sort(key=lambda item: -item[0])
    return list(dict.fromkeys(swapped for _, swapped in found))[:limit]


def _bare_spans(text: str) -> list[tuple[int, int]]:
    """The spans of the words without punctuation around them, which stays when a word is replaced."""
    found = []
    for start, end in word_spans(text):
        if not (text[start].isalnum() and text[end - 1].isalnum()):
            inner = [i for i in range(start, end) if text[i].isalnum()] or [start, end - 1]
            start, end = inner[0], inner[-1] + 1
        found.append((start, end))
    return found


@functools.lru_cache(maxsize=1 << 16)
def _size(term: str) -> int:
    """Words of a term, which every hypothesis is compared with."""
    return len(word_spans(term))


@functools.lru_cache(maxsize=1 << 16)
def _letters(text: str) -> str:
    return basic(text).replace(" ", "")
