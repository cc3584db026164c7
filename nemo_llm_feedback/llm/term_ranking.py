"""Picks the terms of a long list that are most like the hypotheses, and finds the terms that a text mentions.

A prompt cannot hold a catalogue of thousands of terms. Of such a list a group's prompt gets the terms that look or
sound like something in the group's hypotheses, and some others, so that a listed term is not right just because it is
listed. The choice depends on the group's texts as a set: it is the same for every member, and for every order of them.

Likeness is 0 to 100: the normalised indel similarity (rapidfuzz) of term and span written without spaces, averaged
with that of their Metaphone codes (jellyfish) where both have one; scripts without a Metaphone code are compared by
their letters alone. Spans are of as many words as the term, one fewer or one more, since recognisers split and join
unknown words; in scripts written without spaces every character counts as a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jellyfish
import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz, process

from nemo_llm_feedback.core.text import folded_words, term_spans

_DISTRACTORS = 0.25  # share of the kept terms that is taken from the rest of the list at equal distances


class Mention(NamedTuple):
    """A listed term in a text.

    Attributes:
        start: index of the mention's first character.
        end: index behind its last character.
        term: the term in its listed spelling.
    """

    start: int
    end: int
    term: str


def rank_terms(terms: Sequence[str], texts: Iterable[str], *, max_terms: int) -> tuple[str, ...]:
    """Chooses the terms of a long list that a group's prompt shows.

    Args:
        terms: the list; equal ones count once.
        texts: the group's transcripts.
        max_terms: number of terms to keep; a list that is not longer is returned as it is.

    Returns:
        The likest terms, likest first and equal ones in the list's order, with distractors (a quarter of all, from the
        rest of the list at equal distances, in its order) spread evenly among them, so that a prompt that is still too
        long and is cut keeps its share of distractors.
    """
    if len(terms) <= max_terms:
        return tuple(terms)
    terms = tuple(dict.fromkeys(terms))
    num_others = min(round(max_terms * _DISTRACTORS), max_terms - 1)
    order = np.argsort(-likeness(terms, texts), kind="stable").tolist()
    near, rest = order[: max_terms - num_others], sorted(order[max_terms - num_others :])
    places = [(2 * n + 1) * len(rest) // (2 * num_others) for n in range(min(num_others, len(rest)))]
    others = [rest[place] for place in dict.fromkeys(places)]
    spread = [((n + 1) / len(column), term) for column in (near, others) for n, term in enumerate(column)]
    return tuple(terms[n] for _, n in sorted(spread, key=lambda item: item[0]))


def likeness(terms: Sequence[str], texts: Iterable[str]) -> NDArray[np.float32]:
    """Returns the likeness [len(terms)], 0 to 100, of each term to the likest span of any of the texts."""
    units = {_units(text) for text in texts}
    best = np.zeros(len(terms), dtype=np.float32)
    for size, members in _by_size(tuple(terms)).items():
        places, spellings, sounds = map(list, zip(*members, strict=True))
        sizes = range(max(1, size - 1), size + 2)
        spans = {text[i : i + n] for text in units for n in sizes for i in range(len(text) - n + 1)}
        if not spans:
            continue
        span_spellings, span_sounds = map(list, zip(*sorted({_spelling(span) for span in spans}), strict=True))
        found = _ratios(spellings, span_spellings)
        audible = np.outer(list(map(bool, sounds)), list(map(bool, span_sounds)))
        found = np.where(audible, (found + _ratios(sounds, span_sounds)) / 2, found)
        best[places] = found.max(axis=1)
    return best.round(2)


def find_terms(text: str, terms: Sequence[str]) -> list[Mention]:
    """Returns the mentions of listed terms in a text, leftmost and longest first, without overlap.

    Both are compared in the form of ``core.text.basic``: letter case, hyphens and the kind of apostrophes do not
    matter. Words must match whole; in scripts written without spaces every character is one.
    """
    units = folded_words(text)
    found = term_spans([word for word, _, _ in units], terms, split=_units)
    return [Mention(units[start][1], units[end - 1][2], term) for start, end, term in found]


@functools.lru_cache(maxsize=16)
def _by_size(terms: tuple[str, ...]) -> dict[int, list[tuple[int, str, str]]]:
    """(index, spelling, sound) of terms by their number of words, or of characters where there are no spaces."""
    sizes: dict[int, list[tuple[int, str, str]]] = {}
    for place, term in enumerate(terms):
        units = _units(term)
        sizes.setdefault(len(units), []).append((place, *_spelling(units)))
    return sizes


def _units(text: str) -> tuple[str, ...]:
    return tuple(word for word, _, _ in folded_words(text))


_sound = functools.lru_cache(maxsize=65536)(jellyfish.metaphone)


@functools.lru_cache(maxsize=65536)
def _spelling(units: tuple[str, ...]) -> tuple[str, str]:
    """A span written without spaces, and its Metaphone code; "" where one of its words has none."""
    sounds = [_sound(unit) for unit in units]
    return "".join(units), "".join(sounds) if all(sounds) else ""


def _ratios(one: Sequence[str], two: Sequence[str]) -> NDArray[np.float32]:
    """Normalised indel similarity [len(one), len(two)], 0 to 100, of all pairs of texts."""
    return process.cdist(one, two, scorer=fuzz.ratio, dtype=np.float32, workers=1)
