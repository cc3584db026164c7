"""What was made of words and terms, for the report: errors, entities, and what changed between two systems."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nemo_llm_feedback.core.text import get_normalizer, join_words, words
from nemo_llm_feedback.evaluation.comparison import Comparison
from nemo_llm_feedback.evaluation.entities import Span
from nemo_llm_feedback.evaluation.error_counts import align_words, chunk_errors, heard_terms, recalled_spans


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


@dataclass
class TermRow:
    """One term over all utterances of a set; counts by system are of the first two systems, or of the only one.

    Attributes:
        text: the normalised term.
        row: position of the utterance to look at: the first that the last system misses, else the first of all.
        right: mentions without an error inside, by system.
        false_alarms: occurrences beyond the reference's, by system.
        spoken: mentions in the references.
        missed_as: what the last system has in place of a mention that it missed ("" = nothing) → how often.
    """

    text: str
    row: int
    right: list[int]
    false_alarms: list[int]
    spoken: int = 0
    missed_as: Counter[str] = field(default_factory=Counter)

    @property
    def gain(self) -> int:
        """Mentions that the last system has right beyond the first."""
        return self.right[-1] - self.right[0]


def term_rows(comparison: Comparison, aligned: Sequence[Sequence[Aligned]]) -> list[TermRow]:
    """The terms that were spoken or falsely heard: most gained first, then most often spoken.

    Mentions are the entities of the references, false alarms those of the set's term lists, as in the metrics.

    Args:
        comparison: the set.
        aligned: [U][S] each system's transcript of each utterance against its reference.
    """
    names, normalizer = [system.name for system in comparison.systems][:2], comparison.scoring.normalizer
    found: dict[str, TermRow] = {}

    def _row(text: str, u: int) -> TermRow:
        return found.setdefault(text, TermRow(text, u, [0] * len(names), [0] * len(names)))

    for u, reference in enumerate(comparison.scores[comparison.base].references):
        spoken = words(reference)
        for k, span in enumerate(comparison.spans[u]):
            term = _row(join_words(spoken[span.start : span.end]), u)
            term.spoken += 1
            for s in range(len(names)):
                term.right[s] += aligned[u][s].recalled[k]
            last = aligned[u][len(names) - 1]
            if not last.recalled[k]:
                term.row = term.row if term.missed_as else u
                term.missed_as[last.heard[k]] += 1
        listed = _normalised(comparison.term_lists[u] if comparison.term_lists else (), normalizer)
        for s, name in enumerate(names):
            heard = heard_terms(spoken, words(comparison.scores[name].hypotheses[u]), listed)
            for text, (_, false) in heard.items():
                if false:
                    _row(text, u).false_alarms[s] += false
    return sorted(found.values(), key=lambda t: (-t.gain, -t.spoken, -sum(t.false_alarms), t.text))


def term_changes(
    pairs: Sequence[tuple[str, str]], terms: Sequence[Sequence[str]], *, normalizer: str
) -> dict[str, tuple[int, int]]:
    """Term → how often it is in the transcripts before and after; those with a change, most appeared first.

    Args:
        pairs: (before, after) of each utterance.
        terms: the term list of each utterance.
        normalizer: name of the text normalisation of both.
    """
    normalize = get_normalizer(normalizer)
    before, after = Counter[str](), Counter[str]()
    for (old, new), listed in zip(pairs, terms, strict=True):
        clean = _normalised(tuple(listed), normalizer)
        for count, text in ((before, old), (after, new)):
            count.update({term: n for term, (n, _) in heard_terms([], words(normalize(text)), clean).items()})
    changed = {term: (before[term], after[term]) for term in before | after if before[term] != after[term]}
    return dict(sorted(changed.items(), key=lambda item: (item[1][0] - item[1][1], item[0])))


@functools.lru_cache(maxsize=64)
def _normalised(terms: tuple[str, ...], normalizer: str) -> list[str]:
    """Terms as the normalised texts have them; most utterances share their list."""
    normalize = get_normalizer(normalizer)
    return [" ".join(normalize(term).split()) for term in terms]
