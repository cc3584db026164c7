"""Counts the errors of one utterance from its alignment: word errors, their split by entity spans, false terms, B-WER.

The definitions are in the docstring of `metrics`; the names of the counts are its `COLUMNS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import jiwer
import kaldialign
import numpy as np
from numpy.typing import NDArray

from nemo_llm_feedback.core.text import join_words, occurrences, term_spans


def align_words(refs: list[list[str]], hyps: list[list[str]]) -> list[list[jiwer.AlignmentChunk]]:
    """jiwer's minimum edit alignment of each pair of word lists."""
    return jiwer.process_words([" ".join(ref) for ref in refs], [" ".join(hyp) for hyp in hyps]).alignments


def chunk_errors(chunk: jiwer.AlignmentChunk) -> int:
    """Edits of one run of equal operations."""
    if chunk.type == "equal":
        return 0
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def word_counts(
    ref: list[str], alignment: list[jiwer.AlignmentChunk], spans: set[tuple[int, int]] | None
) -> dict[str, int]:
    """WER counts, and their split by entity spans unless ``spans`` is None."""
    totals = Counter[str]()
    for chunk in alignment:
        totals[chunk.type] += chunk_errors(chunk)
    counts = {
        "words": len(ref),
        "word_errors": totals.total(),
        "substitutions": totals["substitute"],
        "deletions": totals["delete"],
        "insertions": totals["insert"],
    }
    if spans is None:
        return counts
    inside = np.zeros(len(ref), dtype=bool)
    within = np.zeros(len(ref) + 1, dtype=bool)  # within[p]: the gap before word p has words of one span on both sides
    for start, end in spans:
        inside[start:end] = True
        within[start + 1 : end] = True
    wrong, inserted = _marks(len(ref), alignment)
    entity_errors = int(wrong[inside].sum() + inserted[within].sum())
    return counts | {
        "entity_words": int(inside.sum()),
        "entity_errors": entity_errors,
        "other_words": len(ref) - int(inside.sum()),
        "other_errors": totals.total() - entity_errors,
        "entities": len(spans),
        "entities_recalled": sum(recalled_spans(len(ref), alignment, spans)),
    }


def recalled_spans(
    num_words: int, alignment: list[jiwer.AlignmentChunk], spans: Iterable[tuple[int, int]]
) -> list[bool]:
    """Whether each span of a reference of ``num_words`` words has no error inside; the rule of entity recall."""
    wrong, inserted = _marks(num_words, alignment)
    return [not (wrong[start:end].any() or inserted[start + 1 : end].any()) for start, end in spans]


def _marks(num_words: int, alignment: list[jiwer.AlignmentChunk]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """[W] reference words that are substituted or deleted, and [W + 1] words inserted before reference word p."""
    wrong = np.zeros(num_words, dtype=bool)
    inserted = np.zeros(num_words + 1, dtype=np.int64)
    for chunk in alignment:
        if chunk.type == "insert":
            inserted[chunk.ref_start_idx] += chunk_errors(chunk)
        elif chunk.type != "equal":
            wrong[chunk.ref_start_idx : chunk.ref_end_idx] = True
    return wrong, inserted


def term_counts(ref: list[str], hyp: list[str], terms: Sequence[str]) -> dict[str, int]:
    """Term occurrences of the hypothesis, and those beyond what the reference has."""
    found = heard_terms(ref, hyp, terms).values()
    totals = {"hyp_terms": sum(heard for heard, _ in found), "false_alarms": sum(false for _, false in found)}
    return {"term_utterances": 1, **totals} if any(terms) else {}


def heard_terms(ref: list[str], hyp: list[str], terms: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Each term of the hypothesis → its occurrences, leftmost and longest first, and those beyond the reference's."""
    found = Counter(tuple(hyp[start:end]) for start, end, _ in term_spans(hyp, terms))
    return {join_words(p): (n, max(0, n - len(occurrences(ref, list(p))))) for p, n in found.items()}


def bias_counts(ref: list[str], hyp: list[str], listed: set[str]) -> dict[str, int]:
    """B-WER and its U-WER of one utterance."""
    gap = ""  # no word is empty
    # Of kaldialign's equally cheap alignments, that of the swapped and reversed sequences is nearest to the published
    # scorer's: both then prefer to insert early (measured by a fuzz against that scorer's order of choice).
    pairs = kaldialign.align(hyp[::-1], ref[::-1], gap, sclite_mode=True)
    counts = dict.fromkeys(("b_words", "b_errors", "b_u_words", "b_u_errors"), 0)
    for hyp_word, ref_word in pairs:
        kind = "b" if (ref_word or hyp_word) in listed else "b_u"
        counts[f"{kind}_words"] += ref_word != gap
        counts[f"{kind}_errors"] += ref_word != hyp_word
    return counts
