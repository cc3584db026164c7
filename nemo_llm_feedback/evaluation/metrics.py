"""The metrics: WER, CER, entity WER, entity recall and false alarms, B-WER, with bootstrap intervals.

Every metric is a ratio of two counts summed over the corpus. `score_corpus` counts once per utterance; values,
intervals and paired tests are then sums over rows of one integer table. Definitions (ours where the literature has
none). A word is that of ``core.text.words``: in scripts without spaces each character is one.

- **WER, CER**: errors of the minimum edit alignment (jiwer) per reference word, or per character with spaces.
- **EWER, U-WER**: the words of the WER's alignment, split. To EWER go substitutions and deletions of reference
  words inside an entity span and insertions strictly between two words of one span; everything else goes to U-WER, so
  that the errors of both add up to the WER's. The denominator of each is its share of the reference words.
- **Entity recall**: share of entity mentions without any error inside, by the same alignment. Every occurrence of an
  entity string in the reference is a mention; mentions may overlap and each counts.
- **Entity false alarms**: occurrences of listed terms in the hypothesis, leftmost and longest first, without overlap,
  as far as the reference has fewer occurrences of that word sequence. ``false_alarms`` is per 100 utterances that have
  a term list, ``false_alarm_rate`` the share of all term occurrences in the hypotheses.
- **B-WER mode** (Le et al. 2021, arXiv 2104.02194): alignment with costs substitution 4, insertion 3, deletion 3
  (kaldialign); a reference word counts to B if it is in the utterance's list, an inserted word if *it* is in the list;
  the rest is ``b_u_wer``. The published scorer is given the rare words *of the reference* as the list (third column of
  its files), not the biasing list with distractors. Where two alignments cost the same, its choice and kaldialign's
  can differ: never in our fuzz up to 10 % WER, by a few errors in a thousand at 40 %.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.text import words
from nemo_llm_feedback.evaluation.entities import Entity, MissingEntity, locate_all
from nemo_llm_feedback.evaluation.error_counts import align_words, bias_counts, chunk_errors, term_counts, word_counts


@dataclass(frozen=True)
class Metric:
    """One ratio of counts: ``scale`` · Σ numerator / Σ denominator, columns of `COLUMNS`."""

    title: str
    numerator: str
    denominator: str
    unit: str = "%"
    higher_is_better: bool = False
    scale: float = 100.0


METRICS: dict[str, Metric] = {
    "wer": Metric("WER", "word_errors", "words"),
    "cer": Metric("CER", "char_errors", "chars"),
    "ewer": Metric("EWER", "entity_errors", "entity_words"),
    "u_wer": Metric("U-WER", "other_errors", "other_words"),
    "entity_recall": Metric("entity recall", "entities_recalled", "entities", higher_is_better=True),
    "false_alarms": Metric("entity false alarms", "false_alarms", "term_utterances", unit="per 100 utterances"),
    "false_alarm_rate": Metric("entity false-alarm rate", "false_alarms", "hyp_terms"),
    "b_wer": Metric("B-WER", "b_errors", "b_words"),
    "b_u_wer": Metric("U-WER (B-WER mode)", "b_u_errors", "b_u_words"),
    "substitutions": Metric("substitutions", "substitutions", "words"),
    "deletions": Metric("deletions", "deletions", "words"),
    "insertions": Metric("insertions", "insertions", "words"),
}

COLUMNS: tuple[str, ...] = tuple(
    dict.fromkeys(name for metric in METRICS.values() for name in (metric.numerator, metric.denominator))
)
"""The counts that are kept for each utterance."""


@dataclass(frozen=True)
class CorpusScores:
    """Counts of every utterance.

    Attributes:
        references, hypotheses: the normalised texts that were compared, one per row.
        counts: [U, len(COLUMNS)] int64.
        missing: entities that were left out since their reference lacks them.
    """

    references: tuple[str, ...]
    hypotheses: tuple[str, ...]
    counts: NDArray[np.int64]
    missing: tuple[MissingEntity, ...] = ()

    def column(self, name: str) -> NDArray[np.int64]:
        """[U] one count of every utterance; ``name`` from `COLUMNS`."""
        return self.counts[:, COLUMNS.index(name)]

    def ratio(self, metric: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([U] numerators, [U] denominators) of a metric."""
        m = find_metric(metric)
        return self.column(m.numerator), self.column(m.denominator)

    def value(self, metric: str) -> float:
        """The pooled value, in the metric's unit; NaN where nothing in the corpus counts to its denominator."""
        numerator, denominator = self.ratio(metric)
        total = int(denominator.sum())
        return find_metric(metric).scale * int(numerator.sum()) / total if total else float("nan")

    def select(self, rows: Sequence[int]) -> CorpusScores:
        """The scores of some utterances, in the given order: a speaker, a domain, a type."""
        new_row = {row: i for i, row in enumerate(rows)}
        return CorpusScores(
            tuple(self.references[i] for i in rows),
            tuple(self.hypotheses[i] for i in rows),
            self.counts[np.asarray(rows, dtype=np.intp)],
            tuple(MissingEntity(new_row[m.utterance], m.entity) for m in self.missing if m.utterance in new_row),
        )


@dataclass(frozen=True)
class Interval:
    """A system's value, or the first minus the second system's, with its 95 % interval, in the metric's unit.

    NaN where the metric is undefined. ``p_value`` is that of 'no difference' by a two-sided bootstrap test, NaN for
    the value of one system.
    """

    value: float
    low: float
    high: float
    p_value: float = float("nan")


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if name not in METRICS:
        raise ConfigError(f"unknown metric '{name}': choose from {', '.join(METRICS)}")
    return METRICS[name]


def score_corpus(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    normalize: Callable[[str], str],
    entities: Sequence[Sequence[Entity]] | None = None,
    terms: Sequence[Sequence[str]] | None = None,
    bias_words: Sequence[Collection[str]] | None = None,
) -> CorpusScores:
    """Counts the errors of every utterance.

    Args:
        references, hypotheses: one text per utterance; either may be empty.
        normalize: applied to all texts, entities, terms and bias words (see `normalize.get_normalizer`).
        entities: each utterance's entities, strings or word spans; without them EWER and recall are undefined (NaN).
        terms: the term list that each utterance was given, for false alarms; without it they are undefined.
        bias_words: the word list of each utterance, for the B-WER mode; without them B-WER is undefined. What the
            normalisation makes several words of (``Jean-Luc``) stands for each of them.

    Raises:
        ManifestError: no utterances, lists of different lengths, or spans outside their reference.
    """
    _check_lengths(references, hypotheses=hypotheses, entities=entities, terms=terms, bias_words=bias_words)
    # The terms of a run recur in every utterance.
    clean = functools.cache(lambda text: " ".join(normalize(text).split()))
    listed = functools.lru_cache(maxsize=1)(lambda given: tuple(map(clean, given)))
    refs, hyps = [clean(t) for t in references], [clean(t) for t in hypotheses]
    spans, missing = locate_all(references, refs, entities, clean)
    ref_words, hyp_words = [words(t) for t in refs], [words(t) for t in hyps]
    word_alignments = align_words(ref_words, hyp_words)
    char_alignments = jiwer.process_characters(refs, hyps).alignments
    rows = []
    for u, (ref, hyp) in enumerate(zip(ref_words, hyp_words, strict=True)):
        row = word_counts(ref, word_alignments[u], None if entities is None else spans[u])
        row |= {"chars": len(refs[u]), "char_errors": sum(chunk_errors(c) for c in char_alignments[u])}
        if terms is not None:
            row |= term_counts(ref, hyp, listed(tuple(terms[u])))
        if bias_words is not None:
            row |= bias_counts(ref, hyp, {part for word in bias_words[u] for part in words(clean(word))})
        rows.append([row.get(name, 0) for name in COLUMNS])
    return CorpusScores(tuple(refs), tuple(hyps), np.array(rows, dtype=np.int64), tuple(missing))


def bootstrap(scores: CorpusScores, metric: str, *, samples: int, seed: int) -> Interval:
    """95 % interval of a pooled metric by resampling utterances (Bisani and Ney 2004).

    Resamples in which the denominator is 0 are left out.

    Args:
        scores: scores of one system.
        metric: a key of `METRICS`.
        samples: number of resamples, usually some thousands.
        seed: same seed, same interval.
    """
    (values,) = _resample([scores], metric, samples=samples, seed=seed)
    low, high = _percentiles(values)
    return Interval(scores.value(metric), low, high)


def paired_difference(first: CorpusScores, second: CorpusScores, metric: str, *, samples: int, seed: int) -> Interval:
    """Compares two systems on the same utterances, resampled together.

    The p-value is twice the share of resamples on the far side of 0, counting the observed sample as one of them, so
    it is never 0 and is 1 for equal outputs. Where k utterances differ it is at least 2^(1−k), the smallest p-value of
    the exact test by signs: resampling few utterances would claim what they cannot show.

    Args:
        first, second: scores over the same references in the same order.
        metric, samples, seed: as in `bootstrap`.

    Raises:
        ManifestError: the systems were scored on different references.
    """
    if first.references != second.references:
        raise ManifestError(
            f"cannot compare systems that were scored on different references ({len(first.references)} and "
            f"{len(second.references)} utterances): score both on the same manifest with the same normalisation"
        )
    values_a, values_b = _resample([first, second], metric, samples=samples, seed=seed)
    deltas = values_a - values_b
    deltas = deltas[~np.isnan(deltas)]
    low, high = _percentiles(deltas)
    tail = min(int((deltas <= 0).sum()), int((deltas >= 0).sum()))
    parts = zip(first.ratio(metric), second.ratio(metric), strict=True)
    differing = int(np.any([a != b for a, b in parts], axis=0).sum())
    smallest = max(2 * (tail + 1) / (len(deltas) + 1), 2.0 ** (1 - differing))
    p_value = min(1.0, smallest) if len(deltas) else float("nan")
    return Interval(first.value(metric) - second.value(metric), low, high, p_value)


def relative_change(base: CorpusScores, system: CorpusScores, metric: str, *, samples: int, seed: int) -> Interval:
    """The change of a metric from one system to another in % of the first one's value, with its 95 % interval.

    Args:
        base, system: scores over the same references in the same order.
        metric, samples, seed: as in `bootstrap`.

    Raises:
        ManifestError: the systems were scored on different references.
    """
    difference = paired_difference(base, system, metric, samples=samples, seed=seed)
    before, after = _resample([base, system], metric, samples=samples, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        changes = 100 * (after / before - 1)
    low, high = _percentiles(np.where(np.isfinite(changes), changes, np.nan))
    value = base.value(metric)
    return Interval(-100 * difference.value / value if value else float("nan"), low, high, difference.p_value)


def oracle(references: Sequence[str], nbest: Sequence[Sequence[str]], *, normalize: Callable[[str], str]) -> list[str]:
    """The member of every N-best list with fewest word errors: what rescoring or one round of training can reach.

    Args:
        references: one text per utterance.
        nbest: the hypotheses of each utterance, at least one.
        normalize: applied to both sides.

    Returns:
        One member per utterance as given, the first of equals; feed them to `score_corpus`.

    Raises:
        ManifestError: no utterances, lists of different lengths, or an empty N-best list.
    """
    _check_lengths(references, nbest=nbest)
    if empty := [str(u) for u, members in enumerate(nbest) if not members]:
        raise ManifestError(f"no hypotheses for utterance {', '.join(empty)}: every N-best list needs one member")
    best = []
    for reference, members in zip(references, nbest, strict=True):
        true = words(normalize(reference))
        best.append(min(members, key=lambda member: Levenshtein.distance(true, words(normalize(member)))))
    return best


def _check_lengths(references: Sequence[str], **columns: Sequence[object] | None) -> None:
    if not references:
        raise ManifestError("no utterances to score: the manifest or the list of references is empty")
    for name, column in columns.items():
        if column is not None and len(column) != len(references):
            raise ManifestError(f"{len(references)} references but {len(column)} {name}: one entry per utterance")


def _resample(systems: list[CorpusScores], metric: str, *, samples: int, seed: int) -> list[NDArray[np.float64]]:
    """For each system [samples] bootstrap values; the same utterances are drawn for all. NaN where undefined."""
    size = len(systems[0].references)
    columns = np.stack([part for scores in systems for part in scores.ratio(metric)], axis=1).astype(np.float64)
    generator = np.random.default_rng(seed)
    blocks = []
    for start in range(0, samples, 64):  # blocks bound the memory: 64 · U numbers
        block = min(64, samples - start)
        draws = generator.integers(size, size=(block, size)) + size * np.arange(block)[:, None]
        times_drawn = np.bincount(draws.ravel(), minlength=block * size).reshape(block, size)
        blocks.append(times_drawn @ columns)
    numerators, denominators = np.concatenate(blocks).T.reshape(len(systems), 2, -1).swapaxes(0, 1)
    scale = find_metric(metric).scale
    return list(np.where(denominators > 0, scale * numerators / np.maximum(denominators, 1), np.nan))


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, (0.025, 0.975)) if len(defined) else (np.nan, np.nan)
    return float(low), float(high)
