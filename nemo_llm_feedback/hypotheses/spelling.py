"""Spells the user's texts (terms, labels, corrections) with labels that the checkpoint has, never the unknown one."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from nemo_llm_feedback.asr.heads import UNKNOWN, Labels, Vocabulary
from nemo_llm_feedback.core.text import plain_marks

UNKNOWN_SIGNS = ("⁇", *UNKNOWN)
"""What decoders write for the unknown label."""

_MOST_WORDS = 1 << 16  # that are kept with their labels


def spelled(text: str, vocabulary: Vocabulary) -> str | None:
    """The text in the checkpoint's letters: as it is where they suffice, else letter by letter in the other case.

    Punctuation and symbols that the checkpoint lacks become spaces (``Jean-Luc`` → ``jean luc``).

    Args:
        text: as the user wrote it.
        vocabulary: the head's labels.

    Returns:
        The spelling; None where a letter or digit cannot be written, or nothing is left.
    """
    written = _written(text, vocabulary)
    return None if written is None else written[0]


@lru_cache(maxsize=1 << 14)  # term swaps repeat within a group and from one refresh to the next
def written_labels(text: str, vocabulary: Vocabulary) -> Labels | None:
    """The labels of a text that was not decoded; None if the vocabulary cannot express it."""
    written = _written(text, vocabulary)
    return None if written is None else written[1]


def _written(text: str, vocabulary: Vocabulary) -> tuple[str, Labels] | None:
    """The spelling of a text with its labels."""
    labels = _labels(text, vocabulary)
    if labels is not None:
        return text, labels
    written = []
    for char in plain_marks(text):
        found = next((form for form in _forms(char) if _writes(form, vocabulary)), None)
        if found is None and unicodedata.category(char)[0] in "LMN":
            return None
        written.append(found or " ")
    result = " ".join("".join(written).split())
    labels = _labels(result, vocabulary)
    return None if labels is None else (result, labels)


@lru_cache(maxsize=256)
def spelled_terms(terms: tuple[str, ...], vocabulary: Vocabulary) -> tuple[str, ...]:
    """The terms in the checkpoint's letters, each once, without those that it cannot write."""
    found = (spelled(term, vocabulary) for term in terms)
    return tuple(dict.fromkeys(term for term in found if term))


def unwritable(texts: Iterable[str], vocabulary: Vocabulary) -> list[str]:
    """The texts that the checkpoint cannot write, each once, with the characters that it lacks."""
    found = []
    for text in dict.fromkeys(texts):
        if spelled(text, vocabulary) is None:
            letters = dict.fromkeys(c for c in plain_marks(text) if unicodedata.category(c)[0] in "LMN")
            lacking = [c for c in letters if not any(_writes(form, vocabulary) for form in _forms(c))]
            found.append(f"{text} ({' '.join(lacking)})" if lacking else text)
    return found


def without_unknown(labels: Iterable[int], vocabulary: Vocabulary) -> Labels:
    """A label sequence without the unknown label."""
    labels, unknown = tuple(labels), vocabulary.unknown
    return labels if unknown.isdisjoint(labels) else tuple(label for label in labels if label not in unknown)


def _labels(text: str, vocabulary: Vocabulary) -> Labels | None:
    if not vocabulary.by_word:
        return _checked(text, vocabulary)
    known = _known_words(vocabulary)
    if len(known) > _MOST_WORDS:
        known.clear()
    found: list[int] = []
    for word in text.split():
        if word not in known:
            known[word] = _checked(word, vocabulary)
        labels = known[word]
        if labels is None:
            return None
        found += labels
    return tuple(found) or None


@lru_cache(maxsize=8)
def _known_words(vocabulary: Vocabulary) -> dict[str, Labels | None]:
    """Word → labels: swapped texts share all their words but a few with others."""
    return {}


def _checked(text: str, vocabulary: Vocabulary) -> Labels | None:
    """The labels of a text that stand for its letters and nothing else."""
    labels = tuple(vocabulary.text_to_ids(text))
    if not labels or len(without_unknown(labels, vocabulary)) < len(labels):
        return None
    # Word-piece tokenizers put spaces around punctuation.
    return labels if "".join(vocabulary.ids_to_text(labels).split()) == "".join(text.split()) else None


def _forms(char: str) -> tuple[str, ...]:
    """A character, and in the other case; İ alone has a lower form of two characters, i and a dot."""
    return char, char.lower()[0], char.upper()


@lru_cache(maxsize=65536)
def _writes(char: str, vocabulary: Vocabulary) -> bool:
    return char.isspace() or _labels(char, vocabulary) is not None
