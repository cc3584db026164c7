"""Compares several systems on the same utterances: scores overall, by entity type and by group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nemo_llm_feedback.core.errors import ConfigError, ManifestError, list_faults
from nemo_llm_feedback.core.text import NORMALIZER_WORDS, get_normalizer, join_words, words
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, merge_context
from nemo_llm_feedback.evaluation.entities import Span, TypedEntity, entities_or_terms, row_entities, typed_spans
from nemo_llm_feedback.evaluation.metrics import CorpusScores, score_corpus
from nemo_llm_feedback.evaluation.metrics import oracle as find_oracle
from nemo_llm_feedback.evaluation.tables import ScoreTable, build_table, table_metrics

_BROKEN_DOWN = ("wer", "ewer", "entity_recall", "false_alarms")
NO_GROUP = "(none)"
"""Value of a group key in rows that lack it."""


@dataclass(frozen=True)
class Member:
    """One hypothesis of an N-best list with its score parts (``total``, ``asr``, ``llm`` …) and its source, where
    known."""

    text: str
    scores: Mapping[str, float] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class System:
    """The transcripts of one system.

    Attributes:
        name: shown in tables; unique.
        texts: one transcript per row.
        nbest: one N-best list per row, empty for rows without one; empty altogether where there are none.
        rtfx: seconds of audio transcribed per second of wall time, loading of audio included; None if not measured.
    """

    name: str
    texts: tuple[str, ...]
    nbest: tuple[tuple[Member, ...], ...] = ()
    rtfx: float | None = None

    def select(self, rows: Sequence[int]) -> System:
        """The system's transcripts of the rows at these positions."""
        nbest = tuple(self.nbest[i] for i in rows) if self.nbest else ()
        return replace(self, texts=tuple(self.texts[i] for i in rows), nbest=nbest)


@dataclass(frozen=True)
class Scoring:
    """How transcripts are scored.

    Attributes:
        normalizer: text normalisation of both sides, see `normalize.NORMALIZERS`.
        context: the run's context; its terms and each row's are the list for false alarms. Without any term that list
            is all entity strings of the manifest.
        entities_key: manifest key of the entities.
        bias_key: manifest key of each utterance's word list for the B-WER mode; None = no B-WER.
        group_by: manifest keys whose values make groups.
        missing_entities: ``error`` refuses entities that their reference lacks, ``skip`` leaves them out, listed.
        samples, seed: of the bootstrap intervals.
    """

    normalizer: str = "basic"
    context: Context = field(default_factory=Context)
    entities_key: str = "entities"
    bias_key: str | None = None
    group_by: tuple[str, ...] = ()
    missing_entities: str = "error"
    samples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Breakdown:
    """Scores by entity type or by the values of a group key.

    Attributes:
        title: ``entity type``, or the key.
        size_name: what ``groups`` count: ``mentions`` or ``utterances``.
        metrics: columns of the tables.
        groups: value, its size, and the table of all systems.
    """

    title: str
    size_name: str
    metrics: list[str]
    groups: list[tuple[str, int, ScoreTable]]


@dataclass(frozen=True)
class Comparison:
    """Systems scored on the same rows.

    Attributes:
        rows: the U utterances that all systems transcribed.
        systems: in the order given; the first is the base of changes and tests.
        scoring: how they are scored.
        scores: system → counts.
        oracles: system → counts of the member of each N-best with fewest word errors; only of systems that have an
            N-best of every row.
        by_type: entity type → system → counts in which only entities and terms of that type count as such.
        by_group: group key → value → system → counts.
        spans: [U] entity mentions in the normalised references.
        term_lists: [U] the list for false alarms of each row; None without any; ``terms_from`` names their origin.
    """

    rows: tuple[Row, ...]
    systems: tuple[System, ...]
    scoring: Scoring
    scores: dict[str, CorpusScores]
    oracles: dict[str, CorpusScores]
    by_type: dict[str, dict[str, CorpusScores]]
    by_group: dict[str, dict[str, dict[str, CorpusScores]]]
    spans: tuple[tuple[Span, ...], ...]
    term_lists: Sequence[tuple[str, ...]] | None
    terms_from: str

    @property
    def terms(self) -> int:
        """Number of different terms on the lists for false alarms."""
        return len({term for row in self.term_lists or () for term in row})

    @property
    def base(self) -> str:
        """Name of the first system."""
        return self.systems[0].name

    @property
    def missing(self) -> list[str]:
        """The entities that are not in their reference, each with its row."""
        found = self.scores[self.base].missing
        return [f"{self.rows[m.utterance].origin}: '{m.entity}'" for m in found]

    @property
    def basis(self) -> list[str]:
        """The text normalisation, the entities and the term list behind the numbers, in sentences."""
        name, key = self.scoring.normalizer, self.scoring.entities_key
        lines = [f"Text normalisation: {name} ({NORMALIZER_WORDS[name]})."]
        if self.terms and not any(row.data.get(key) for row in self.rows):
            lines.append(f"Entities: the terms that a reference holds, as no row has the key `{key}`.")
        return lines + ([f"False alarms: {self.terms} different terms, {self.terms_from}."] if self.terms else [])

    @property
    def breakdowns(self) -> list[Breakdown]:
        """One for entity types, whose WER would be the same in every line, and one for each group key."""
        found = []
        for title, values in (({"entity type": self.by_type} if self.by_type else {}) | self.by_group).items():
            typed = values is self.by_type
            metrics = [m for m in _BROKEN_DOWN if m in self.metrics and not (typed and m == "wer")]
            groups = []
            for value, scores in values.items():
                first = next(iter(scores.values()))
                size = int(first.column("entities").sum()) if typed else len(first.references)
                groups.append((value, size, self.table(scores, metrics=metrics)))
            found.append(Breakdown(title, "mentions" if typed else "utterances", metrics, groups))
        return found

    @property
    def metrics(self) -> list[str]:
        """The metrics that are defined here, in the order of tables."""
        return table_metrics(next(iter(self.scores.values())))

    def table(self, scores: Mapping[str, CorpusScores] | None = None, *, metrics: Sequence[str] = ()) -> ScoreTable:
        """The table of some scores, all systems' by default, relative to the base where there are several systems."""
        chosen = scores if scores is not None else self.scores
        return build_table(
            chosen,
            metrics=list(metrics) or self.metrics,
            base=self.base if len(chosen) > 1 and self.base in chosen else None,
            samples=self.scoring.samples,
            seed=self.scoring.seed,
        )


def compare(rows: Sequence[Row], systems: Sequence[System], scoring: Scoring) -> Comparison:
    """Scores all systems on the same rows.

    Args:
        rows: with text.
        systems: at least one, each with one text per row.
        scoring: how they are scored.

    Raises:
        ManifestError: no rows, rows without reference, entities of unknown form or not in their reference.
        ConfigError: no system, two of one name, or a key that no row has.
    """
    _check(rows, systems, scoring)
    normalize = get_normalizer(scoring.normalizer)
    lists = [merge_context(scoring.context, row.context).terms for row in rows]
    entities = entities_or_terms(rows, lists, normalize, key=scoring.entities_key)
    terms, source = (lists, "the context's terms") if any(lists) else _all_entities(rows, entities)
    bias = None
    if scoring.bias_key:  # the single words of an utterance's list: the published scorer has no phrases
        listed = row_entities(rows, scoring.bias_key)
        bias = [words(" ".join(_strings(row, found))) for row, found in zip(rows, listed, strict=True)]
    references = [row.text for row in rows]
    plain = [[e.entity for e in row] for row in entities] if any(entities) else None
    score = functools.partial(
        score_corpus, references, normalize=normalize, entities=plain, terms=terms, bias_words=bias
    )
    scores = {system.name: score(system.texts) for system in systems}
    first = scores[systems[0].name]
    if first.missing and scoring.missing_entities == "error":
        absent = [f"{rows[m.utterance].origin}: '{m.entity}' in '{rows[m.utterance].text}'" for m in first.missing]
        head = f"{len(absent)} entities are not in their reference (normalisation: {scoring.normalizer}); "
        fix = "`evaluate --missing-entities skip`, in Python missing_entities='skip', leaves them out:"
        raise ManifestError(list_faults(head + fix, absent))
    oracles = {
        s.name: score(find_oracle(references, [[m.text for m in n] for n in s.nbest], normalize=normalize))
        for s in systems
        if s.nbest and all(s.nbest)
    }
    spans = tuple(
        typed_spans(row.text, ref, found, lambda text: " ".join(normalize(text).split()))
        for row, ref, found in zip(rows, first.references, entities, strict=True)
    )
    return Comparison(
        rows=tuple(rows),
        systems=tuple(systems),
        scoring=scoring,
        scores=scores,
        oracles=oracles,
        by_type=_by_type(rows, systems, entities, terms, normalize),
        by_group={key: _by_group(rows, scores, key) for key in scoring.group_by},
        spans=spans,
        term_lists=terms,
        terms_from=source,
    )


def _check(rows: Sequence[Row], systems: Sequence[System], scoring: Scoring) -> None:
    if not rows:
        raise ManifestError("no utterances to score: the manifest is empty, or every utterance was left out.")
    bare = [row.origin for row in rows if not row.text]
    if len(bare) == len(rows):
        raise ManifestError(
            f"none of the {len(rows)} rows has a reference: error rates need `text` in every row of the manifest."
        )
    if bare:
        raise ManifestError(list_faults(f"{len(bare)} of {len(rows)} rows have no reference `text`:", bare))
    names = [system.name for system in systems]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"systems need different names, and at least one system: got {', '.join(names) or 'none'}.")
    keys = [*scoring.group_by, *([scoring.bias_key] if scoring.bias_key else [])]
    if scoring.entities_key != "entities":
        keys.append(scoring.entities_key)
    known = dict.fromkeys(key for row in rows for key in row.data)
    faults = [key for key in keys if key not in known]
    if faults:
        raise ConfigError(f"no row of the manifest has the key {', '.join(faults)}; there are: {', '.join(known)}.")


def _all_entities(
    rows: Sequence[Row], entities: Sequence[Sequence[TypedEntity]]
) -> tuple[list[tuple[str, ...]] | None, str]:
    """The list for false alarms of each row without a context, and where it is from."""
    pool = tuple(dict.fromkeys(t for row, listed in zip(rows, entities, strict=True) for t in _strings(row, listed)))
    return ([pool] * len(rows), "all entities of the manifest") if pool else (None, "")


def _strings(row: Row, entities: Sequence[TypedEntity]) -> list[str]:
    found = words(row.text)
    return [e.entity if isinstance(e.entity, str) else join_words(found[slice(*e.entity)]) for e in entities]


def _by_type(
    rows: Sequence[Row],
    systems: Sequence[System],
    entities: Sequence[Sequence[TypedEntity]],
    terms: Sequence[Sequence[str]] | None,
    normalize: Callable[[str], str],
) -> dict[str, dict[str, CorpusScores]]:
    """A type's terms are those of the list that the manifest has as an entity of that type somewhere."""
    out = {}
    for name in sorted({e.type for row in entities for e in row} - {""}):
        typed = [[e for e in row if e.type == name] for row in entities]
        known = {normalize(text) for row, found in zip(rows, typed, strict=True) for text in _strings(row, found)}
        listed = None if terms is None else [[t for t in row if normalize(t) in known] for row in terms]
        plain = [[e.entity for e in row] for row in typed]
        score = functools.partial(score_corpus, [row.text for row in rows], normalize=normalize, entities=plain)
        out[name] = {s.name: score(s.texts, terms=listed) for s in systems}
    return out


def _by_group(rows: Sequence[Row], scores: Mapping[str, CorpusScores], key: str) -> dict[str, dict[str, CorpusScores]]:
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        value = row.data.get(key)
        members.setdefault(NO_GROUP if value in (None, "") else str(value), []).append(i)
    return {value: {name: s.select(members[value]) for name, s in scores.items()} for value in sorted(members)}
