"""Which terms of a long list the LLM gets to read, and which terms a text mentions.

A catalogue of thousands of terms fits no prompt. Of such a list a group's prompt gets the terms that look or sound
like something in the group's hypotheses, and some others, so that being listed is no sign of being right. The choice
depends on the group's texts as a set: it is the same for every member, and for every order of them.

Likeness is 0 to 100: the normalised indel similarity (rapidfuzz) of term and span written without spaces, averaged
with that of their Metaphone codes (jellyfish) where both have one; scripts without a Metaphone code are compared by
their letters alone. Spans are of as many words as the term, one fewer or one more, since recognisers split and join
unknown words; in scripts written without spaces every character counts as a word.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jellyfish
import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz, process

from nemo_llm_feedback.core.text import UNSPACED, basic

DISTRACTOR_SHARE = 0.25
_UNIT = re.compile(rf"{UNSPACED.pattern}|[^\s{UNSPACED.pattern[1:-1]}]+")


class Mention(NamedTuple):
    """A term in a text: characters [start, end) and the term as it is listed."""

    start: int
    end: int
    term: str


def rank_terms(
    terms: Sequence[str], texts: Iterable[str], *, max_terms: int, distractors: float = DISTRACTOR_SHARE
) -> tuple[str, ...]:
    """Chooses the terms of a long list that a group's prompt shows.

    Args:
        terms: the list; equal ones are one.
        texts: the group's transcripts.
        max_terms: how many to keep; a list that is not longer is returned as it is.
        distractors: share of them that is taken from the rest of the list at equal distances.

    Returns:
        The likest terms, likest first and equal ones in the list's order, with the distractors, in the list's order,
        spread evenly among them: what a prompt that is still too long keeps has its share of distractors, too.
    """
    if len(terms) <= max_terms:
        return tuple(terms)
    terms = tuple(dict.fromkeys(terms))
    num_others = min(round(max_terms * distractors), max_terms - 1)
    order = np.argsort(-likeness(terms, texts), kind="stable").tolist()
    near, rest = order[: max_terms - num_others], sorted(order[max_terms - num_others :])
    others = [rest[(2 * n + 1) * len(rest) // (2 * num_others)] for n in range(min(num_others, len(rest)))]
    others = list(dict.fromkeys(others))
    places = [(n + 1) / len(column) for column in (near, others) for n in range(len(column))]
    mixed = [term for _, term in sorted(zip(places, near + others, strict=True), key=lambda item: item[0])]
    return tuple(terms[n] for n in mixed)


def likeness(terms: Sequence[str], texts: Iterable[str]) -> NDArray[np.float32]:
    """Returns [len(terms)] the likeness, 0 to 100, of each term and the likest span of any of the texts."""
    units = {tuple(_units(basic(text))) for text in texts}
    best = np.zeros(len(terms), dtype=np.float32)
    for size, members in _by_size(tuple(terms)).items():
        sizes = range(max(1, size - 1), size + 2)
        spans = {text[i : i + n] for text in units for n in sizes for i in range(len(text) - n + 1)}
        written = sorted({_spelling(span) for span in spans})
        if not written:
            continue
        found = _ratios([m.spelling for m in members], [spelling for spelling, _ in written])
        sounds = _ratios([m.sound for m in members], [sound for _, sound in written])
        audible = np.outer([bool(m.sound) for m in members], [bool(sound) for _, sound in written])
        found = np.where(audible, (found + sounds) / 2, found)
        best[[m.place for m in members]] = found.max(axis=1)
    return best.round(2)


def find_terms(text: str, terms: Sequence[str]) -> list[Mention]:
    """Returns the mentions of listed terms in a text, leftmost and longest first, without overlap.

    Letter case does not matter; words must match whole, except in scripts written without spaces.
    """
    listed = _by_first_unit(tuple(terms))
    units = [(unit.casefold(), start) for unit, start in _positions(text)]
    found, i = [], 0
    while i < len(units):
        match = None
        for words, term in listed.get(units[i][0], ()):
            if tuple(unit for unit, _ in units[i : i + len(words)]) == words:
                match = (len(words), term)
                break
        if match is None:
            i += 1
            continue
        last, start = units[i + match[0] - 1]
        found.append(Mention(units[i][1], start + len(last), match[1]))
        i += match[0]
    return found


class _Term(NamedTuple):
    place: int
    spelling: str
    sound: str


@functools.lru_cache(maxsize=16)
def _by_size(terms: tuple[str, ...]) -> dict[int, list[_Term]]:
    """Terms by their number of words (or characters of scripts without spaces)."""
    sizes: dict[int, list[_Term]] = {}
    for place, term in enumerate(terms):
        units = tuple(_units(basic(term)))
        sizes.setdefault(len(units), []).append(_Term(place, *_spelling(units)))
    return sizes


@functools.lru_cache(maxsize=16)
def _by_first_unit(terms: tuple[str, ...]) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    listed: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for term in terms:
        words = tuple(unit.casefold() for unit, _ in _positions(term))
        if words:
            listed.setdefault(words[0], []).append((words, term))
    return {first: sorted(entries, key=lambda entry: -len(entry[0])) for first, entries in listed.items()}


def _units(text: str) -> list[str]:
    return [unit for unit, _ in _positions(text)]


def _positions(text: str) -> list[tuple[str, int]]:
    """The words of a text (characters where it has no spaces) without outer punctuation, and where they begin."""
    found = []
    for match in _UNIT.finditer(text):
        inner = [n for n, char in enumerate(match.group()) if _is_word(char)]
        if inner:
            found.append((match.group()[inner[0] : inner[-1] + 1], match.start() + inner[0]))
    return found


def _is_word(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


@functools.lru_cache(maxsize=65536)
def _sound(word: str) -> str:
    return jellyfish.metaphone(word)


@functools.lru_cache(maxsize=65536)
def _spelling(units: tuple[str, ...]) -> tuple[str, str]:
    """A span written without spaces, and its sound; "" where one of its words has none."""
    sounds = [_sound(unit) for unit in units]
    return "".join(units), "".join(sounds) if all(sounds) else ""


def _ratios(one: Sequence[str], two: Sequence[str]) -> NDArray[np.float32]:
    """[len(one), len(two)] normalised indel similarity, 0 to 100."""
    return process.cdist(one, two, scorer=fuzz.ratio, dtype=np.float32, workers=1)
