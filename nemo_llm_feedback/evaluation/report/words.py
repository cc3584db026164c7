"""Transcripts as marked words: errors against the reference, entities, and what changed between two systems."""

from __future__ import annotations

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
        own, theirs = hyp[chunk.hyp_start_idx : chunk.hyp_end_idx], range(chunk.ref_start_idx, chunk.ref_end_idx)
        if chunk.type == "insert":
            p = chunk.ref_start_idx
            inside = 0 < p < len(ref) and any(span.start < p < span.end for span in spans)
            words += [(word, "ins", *(marks[p] if inside else (False, ""))) for word in own]
            if inside:
                at[p - 1] += own
        elif chunk.type == "delete":
            words += [(ref[i], "del", *marks[i]) for i in theirs]
        else:
            kind = "ok" if chunk.type == "equal" else "sub"
            for i, word in zip(theirs, own, strict=True):
                words.append((word, kind, *marks[i]))
                at[i].append(word)
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
    old, new = before.split(), after.split()
    left: list[tuple[str, str, bool, str]] = []
    right: list[tuple[str, str, bool, str]] = []
    for chunk in jiwer.process_words([before], [after]).alignments[0]:
        same = chunk.type == "equal"
        left += [(w, "ok" if same else "old", False, "") for w in old[chunk.ref_start_idx : chunk.ref_end_idx]]
        right += [(w, "ok" if same else "new", False, "") for w in new[chunk.hyp_start_idx : chunk.hyp_end_idx]]
    return _merge(left), _merge(right)


def _entity_marks(size: int, spans: Sequence[Span]) -> list[tuple[bool, str]]:
    marks: list[tuple[bool, str]] = [(False, "")] * size
    for span in spans:
        for i in range(span.start, span.end):
            names = dict.fromkeys([*filter(None, marks[i][1].split(", ")), *span.types])
            marks[i] = (True, ", ".join(names))
    return marks


def _merge(words: Iterable[tuple[str, str, bool, str]]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for word, kind, entity, types in words:
        last = pieces[-1] if pieces else None
        if last is not None and (last.kind, last.entity, last.types) == (kind, entity, types):
            pieces[-1] = Piece(f"{last.text} {word}", kind, entity, types)
        else:
            pieces.append(Piece(word, kind, entity, types))
    return tuple(pieces)
