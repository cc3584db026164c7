"""The report's tables of terms: what was made of every mention, and which terms came and went without references."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_llm_feedback.core.text import get_normalizer, join_words, words
from nemo_llm_feedback.evaluation.comparison import Comparison
from nemo_llm_feedback.evaluation.error_counts import heard_terms
from nemo_llm_feedback.evaluation.report.words import Aligned


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
