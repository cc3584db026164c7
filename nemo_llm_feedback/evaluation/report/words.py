"""Transcripts as marked words: errors against the reference, entities, and what changed between two systems."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jiwer

from nemo_llm_feedback.evaluation.entities import Span
from nemo_llm_feedback.evaluation.error_counts import chunk_errors, recalled_spans


@dataclass(frozen=True)
class Piece:
    """Neighbouring words with the same marks.

    Attributes:
        text: the words.
        kind: ``ok``, ``sub`` (another word than the reference's), ``ins`` (no such word in the reference) or ``del``
            (a word of the reference that is missing here); between two systems ``old`` or ``new``.
        entity: whether the words belong to an entity; ``types`` names its types.
    """

    text: str
    kind: str = "ok"
    entity: bool = False
    types: str = ""


@dataclass(frozen=True)
class Aligned:
    """One transcript against its reference.

    Attributes:
        pieces: the transcript with marks.
        errors: word errors.
        recalled: of each entity span, whether it has no error inside.
        heard: of each entity span, the words that stand in its place.
    """

    pieces: tuple[Piece, ...]
    errors: int
    recalled: tuple[bool, ...]
    heard: tuple[str, ...]


def reference_pieces(reference: str, spans: Sequence[Span]) -> tuple[Piece, ...]:
    """The reference with its entities marked."""
    marks = _entity_marks(len(reference.split()), spans)
    return _merge((word, "ok", *marks[i]) for i, word in enumerate(reference.split()))


def align(reference: str, text: str, spans: Sequence[Span] = ()) -> Aligned:
    """Marks a transcript by its minimum edit alignment (jiwer) with the reference.

    Args:
        reference, text: normalised.
        spans: entity mentions of the reference.
    """
    ref, hyp = reference.split(), text.split()
    chunks = jiwer.process_words([reference], [text]).alignments[0]
    marks = _entity_marks(len(ref), spans)
    words: list[tuple[str, str, bool, str]] = []
    at: list[list[str]] = [[] for _ in ref]  # at[i]: the words in the place of reference word i
    for chunk in chunks:
        said, theirs = hyp[chunk.hyp_start_idx : chunk.hyp_end_idx], range(chunk.ref_start_idx, chunk.ref_end_idx)
        if chunk.type == "insert":
            p = chunk.ref_start_idx
            inside = any(span.start < p < span.end for span in spans)
            words += [(word, "ins", *(marks[p] if inside else (False, ""))) for word in said]
            if inside:
                at[p - 1] += said
        elif chunk.type == "delete":
            words += [(ref[i], "del", *marks[i]) for i in theirs]
        else:
            kind = "ok" if chunk.type == "equal" else "sub"
            words += [(word, kind, *marks[i]) for i, word in zip(theirs, said, strict=True)]
            at[theirs.start : theirs.stop] = [[word] for word in said]
    edges = [(span.start, span.end) for span in spans]
    return Aligned(
        pieces=_merge(words),
        errors=sum(map(chunk_errors, chunks)),
        recalled=tuple(recalled_spans(len(ref), chunks, edges)),
        heard=tuple(" ".join(word for words_at in at[start:end] for word in words_at) for start, end in edges),
    )


def changed_words(before: str, after: str) -> int:
    """Word edits between two transcripts."""
    return sum(map(chunk_errors, jiwer.process_words([before], [after]).alignments[0]))


def diff_pieces(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Two transcripts with their differences marked: what went in the first, what came in the second."""
    chunks = jiwer.process_words([before], [after]).alignments[0]
    old, new = before.split(), after.split()
    sides = [(old[c.ref_start_idx : c.ref_end_idx], new[c.hyp_start_idx : c.hyp_end_idx], c.type) for c in chunks]
    return (
        _merge((w, "ok" if kind == "equal" else "old", False, "") for words, _, kind in sides for w in words),
        _merge((w, "ok" if kind == "equal" else "new", False, "") for _, words, kind in sides for w in words),
    )


def _entity_marks(size: int, spans: Sequence[Span]) -> list[tuple[bool, str]]:
    marks: list[tuple[bool, str]] = [(False, "")] * size
    for span in spans:
        for i in range(span.start, span.end):
            names = dict.fromkeys([*filter(None, marks[i][1].split(", ")), *span.types])
            marks[i] = (True, ", ".join(names))
    return marks


def _merge(words: Iterable[tuple[str, str, bool, str]]) -> tuple[Piece, ...]:
    """Neighbouring (word, kind, entity, types) with the same marks as one piece."""
    runs = itertools.groupby(words, key=lambda word: word[1:])
    return tuple(Piece(" ".join(word for word, *_ in run), *marks) for marks, run in runs)
