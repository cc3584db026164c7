"""Marks the words of transcripts for the report: errors, entities, and what changed between two systems."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemo_llm_feedback.core.text import join_words, words
from nemo_llm_feedback.evaluation.entities import Span
from nemo_llm_feedback.evaluation.error_counts import align_words, chunk_errors, recalled_spans


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


def align(reference: str, text: str, spans: Sequence[Span] = ()) -> Aligned:
    """Marks the words of a transcript by its minimum edit alignment (jiwer) with the reference.

    Args:
        reference, text: normalised.
        spans: entity mentions of the reference.
    """
    ref, hyp = words(reference), words(text)
    (chunks,) = align_words([ref], [hyp])
    marks: list[tuple[bool, str]] = [(False, "")] * len(ref)
    for span in spans:
        for i in range(span.start, span.end):
            names = dict.fromkeys([*filter(None, marks[i][1].split(", ")), *span.types])
            marks[i] = (True, ", ".join(names))
    marked: list[tuple[str, str, bool, str]] = []
    at: list[list[str]] = [[] for _ in ref]  # at[i]: the words in the place of reference word i
    for chunk in chunks:
        said, theirs = hyp[chunk.hyp_start_idx : chunk.hyp_end_idx], range(chunk.ref_start_idx, chunk.ref_end_idx)
        if chunk.type == "insert":
            p = chunk.ref_start_idx
            inside = any(span.start < p < span.end for span in spans)
            marked += [(word, "ins", *(marks[p] if inside else (False, ""))) for word in said]
            if inside:
                at[p - 1] += said
        elif chunk.type == "delete":
            marked += [(ref[i], "del", *marks[i]) for i in theirs]
        else:
            kind = "ok" if chunk.type == "equal" else "sub"
            marked += [(word, kind, *marks[i]) for i, word in zip(theirs, said, strict=True)]
            at[theirs.start : theirs.stop] = [[word] for word in said]
    recalled = recalled_spans(len(ref), chunks, [(span.start, span.end) for span in spans])
    heard = [join_words(list(itertools.chain.from_iterable(at[span.start : span.end]))) for span in spans]
    return Aligned(_merge(marked), sum(map(chunk_errors, chunks)), tuple(recalled), tuple(heard))


def changed_words(before: str, after: str) -> int:
    """Word edits between two transcripts."""
    return sum(map(chunk_errors, align_words([words(before)], [words(after)])[0]))


def diff_pieces(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Two transcripts with their differences marked: what went in the first, what came in the second."""
    old: list[tuple[str, str, bool, str]] = []
    new: list[tuple[str, str, bool, str]] = []
    first, second = words(before), words(after)
    for c in align_words([first], [second])[0]:
        went, came = ("ok", "ok") if c.type == "equal" else ("old", "new")
        old += [(word, went, False, "") for word in first[c.ref_start_idx : c.ref_end_idx]]
        new += [(word, came, False, "") for word in second[c.hyp_start_idx : c.hyp_end_idx]]
    return _merge(old), _merge(new)


def _merge(marked: Iterable[tuple[str, str, bool, str]]) -> tuple[Piece, ...]:
    """Neighbouring (word, kind, entity, types) with the same marks as one piece."""
    runs = itertools.groupby(marked, key=lambda word: word[1:])
    return tuple(Piece(join_words([word for word, *_ in run]), *marks) for marks, run in runs)
