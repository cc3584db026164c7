"""The evaluate job: compares checkpoints or ready transcripts on one labelled manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.config import ProposalConfig, read_terms
from nemo_llm_feedback.core.console import progress, quiet
from nemo_llm_feedback.core.errors import ConfigError, ManifestError, list_faults
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.text_files import stem
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.audio import unreadable
from nemo_llm_feedback.data.manifests import Row, read_manifest
from nemo_llm_feedback.evaluation.comparison import Breakdown, Comparison, Member, Scoring, System, compare
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.predictions import read_predictions, rows_of_predictions
from nemo_llm_feedback.evaluation.records import Table
from nemo_llm_feedback.evaluation.tables import column_title


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        comparison: scores of all systems on the same utterances.
        left_out: ``utterance: system: reason`` of the rows that a system failed on; left out of all systems.
        total: rows of the manifest, those left out included.
    """

    comparison: Comparison
    left_out: tuple[str, ...]
    total: int


@quiet()
def evaluate(
    models: str | Path | Sequence[str | Path] = (),
    manifest: str | Path | None = None,
    *,
    predictions: Sequence[str | Path] = (),
    head: str = "auto",
    batch_size: int = 16,
    oracle: int = 0,
    device: str = "cpu",
    **scoring_settings: Any,
) -> Evaluation:
    """Scores checkpoints, decoded greedily, and ready transcripts on a labelled manifest; the command ``evaluate``.

    Args:
        models: ``.nemo`` files or pretrained names; changes are relative to the first system.
        manifest: NeMo manifest with text and, optionally, entities and ``context``; None takes the rows and their text
            from the first predictions file.
        predictions: JSON Lines files with ``pred_text``.
        head: ``ctc``, ``transducer`` or ``auto``.
        batch_size: utterances per batch.
        oracle: beam size of the N-best whose oracle is scored (with terms also of the boosted beam); 0 = none.
        device: where models run, ``cpu`` or ``cuda:0`` …
        scoring_settings: see :func:`make_scoring`.

    Returns:
        ``.comparison`` has the systems with all their scores; as text: :func:`evaluation_text`.

    Raises:
        CheckpointError, ManifestError, ConfigError: unusable input, before any model is loaded; or a model that fails
            on every row.
    """
    scoring = make_scoring(**scoring_settings)
    nemos = [str(path) for path in ([models] if isinstance(models, (str, Path)) else models)]
    files = [str(path) for path in predictions]
    if nemos:
        from nemo_llm_feedback.training.models import locate

        nemos = [str(locate(name)) for name in nemos]
    names = system_names([*nemos, *files])
    rows = _rows(nemos, manifest, files)
    ready = [read_predictions(path, rows, name=names[path], same_texts=manifest is None) for path in files]
    if not nemos:
        return Evaluation(compare(rows, ready, scoring), (), len(rows))
    failed = unreadable(rows)
    if len(failed) == len(rows):
        raise ManifestError(f"no audio of {manifest} can be read, e.g. {failed[0]}")
    # Every fault of the manifest shows before the first model is loaded.
    compare(rows, [System("references", tuple(row.text for row in rows))], scoring)
    usable = [i for i in range(len(rows)) if i not in failed]
    decoded = []
    for path in nemos:
        given = [rows[i] for i in usable]
        system, failures = _decode(path, given, names[path], scoring, head, batch_size, oracle, device)
        failed |= {usable[k]: f"{given[k].origin}: {names[path]}: {why}" for k, why in failures.items()}
        decoded.append(system)
    kept = [i for i in range(len(rows)) if i not in failed]
    places = [k for k, i in enumerate(usable) if i not in failed]
    systems = [system.select(places) for system in decoded] + [system.select(kept) for system in ready]
    comparison = compare([rows[i] for i in kept], systems, scoring)
    return Evaluation(comparison, tuple(failed[i] for i in sorted(failed)), len(rows))


def make_scoring(
    *,
    normalizer: str = "basic",
    description: str = "",
    terms: Sequence[str] | str | Path = (),
    terms_file: str | Path | None = None,
    **settings: Any,
) -> Scoring:
    """How transcripts are scored.

    Args:
        normalizer: name of the text normalisation of both sides.
        description: the domain in words, for the report.
        terms: terms whose false alarms are counted, or the path of a file with them.
        terms_file: a file with further terms.
        settings: further fields of `Scoring`, e.g. ``samples=2000``.

    Raises:
        ConfigError: unknown normalisation, or a terms file that cannot be read.
    """
    get_normalizer(normalizer)
    listed = read_terms(terms) if isinstance(terms, (str, Path)) else list(terms)
    listed += read_terms(terms_file) if terms_file else []
    return Scoring(normalizer=normalizer, context=Context(description, tuple(dict.fromkeys(listed))), **settings)


def evaluation_text(evaluation: Evaluation) -> str:
    """The tables, and everything that was left out, for a terminal."""
    comparison = evaluation.comparison
    lines = [comparison.table().to_text(), *_statements(evaluation)]
    if comparison.oracles or any(s.rtfx is not None for s in comparison.systems):
        lines += ["", *_extras(comparison)]
    lines += map(_breakdown_text, comparison.breakdowns)
    return "\n".join(lines)


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers in full precision, for JSON."""
    comparison = evaluation.comparison

    def tables(groups: Mapping[str, Mapping[str, CorpusScores]]) -> dict[str, Any]:
        """Value → system → numbers."""
        return {value: comparison.table(scores).systems for value, scores in groups.items()}

    return comparison.table().record | {
        "manifest_rows": evaluation.total,
        "left_out": list(evaluation.left_out),
        "missing_entities": comparison.missing,
        "normalizer": comparison.scoring.normalizer,
        "false_alarm_terms": {"number": comparison.terms, "from": comparison.terms_from},
        "rtfx": {s.name: s.rtfx for s in comparison.systems},
        "oracle": comparison.table(comparison.oracles).systems if comparison.oracles else {},
        "by_type": tables(comparison.by_type),
        "by_group": {key: tables(groups) for key, groups in comparison.by_group.items()},
    }


def system_names(paths: Sequence[str]) -> dict[str, str]:
    """A short, different name for each file: its stem, with its suffix where two differ in that alone, and with as
    many parent folders as it takes.

    Raises:
        ConfigError: a file is given twice.
    """
    files = {str(path): Path(path).expanduser().absolute() for path in paths}
    if len(set(files.values())) < len(paths):
        raise ConfigError(f"every system needs another file, got {', '.join(map(str, paths))}.")
    stems = Counter((file.parent, stem(file)) for file in files.values())
    last = {path: stem(file) if stems[file.parent, stem(file)] == 1 else file.name for path, file in files.items()}
    parts = {path: (*file.parent.parts, last[path]) for path, file in files.items()}

    def _name(own: tuple[str, ...]) -> str:
        """The shortest end of a path that no other one has."""
        ends = (own[-length:] for length in range(1, len(own) + 1))
        return "/".join(next(end for end in ends if sum(o[-len(end) :] == end for o in parts.values()) == 1))

    return {path: _name(own) for path, own in parts.items()}


def _rows(models: Sequence[str], manifest: str | Path | None, predictions: Sequence[str]) -> list[Row]:
    if not models and not predictions:
        raise ConfigError("nothing to evaluate: give .nemo files, or transcripts with --predictions FILE.")
    if models:
        from nemo_llm_feedback.asr.checkpoints import supported_class
        from nemo_llm_feedback.asr.nemo_file import read_config

        for path in models:
            supported_class(read_config(path), origin=path)
    if manifest:
        return read_manifest(manifest)
    if models:
        raise ConfigError("models need audio: give --manifest FILE.")
    return rows_of_predictions(predictions[0])


def _decode(
    path: str, rows: list[Row], name: str, scoring: Scoring, head: str, batch_size: int, oracle: int, device: str
) -> tuple[System, dict[int, str]]:
    from nemo_llm_feedback.asr.checkpoints import restored
    from nemo_llm_feedback.evaluation.transcribe import decode_rows

    model = restored(path, map_location=device)
    config = None
    if oracle:
        boosted = oracle if scoring.context.terms or any(row.context.terms for row in rows) else 0
        config = ProposalConfig(beam=oracle, boosted=boosted, term_swap=0, max_members=2 * oracle + 1)
    with progress(name, len(rows)) as on_batch:
        decoded = decode_rows(
            model,
            rows,
            head=head,
            batch_size=batch_size,
            nbest=config,
            run_context=scoring.context,
            skip_failing=True,
            on_batch=on_batch,
        )
    if len(decoded.failures) == len(rows):
        raise ManifestError(f"{name} failed on all {len(rows)} rows, e.g. {next(iter(decoded.failures.values()))}")
    nbest = tuple(tuple(Member(text, {"asr": logp}) for text, logp in members) for members in decoded.nbest)
    return System(name, decoded.texts, nbest, decoded.rtfx), decoded.failures


def _statements(evaluation: Evaluation) -> list[str]:
    """What the numbers rest on, and what was left out."""
    lines = evaluation.comparison.basis
    if missing := evaluation.comparison.missing:
        lines.append(list_faults(f"{len(missing)} entities are not in their reference and are left out:", missing))
    if left_out := evaluation.left_out:
        head = f"{len(left_out)} of {evaluation.total} utterances failed and are left out of ALL systems:"
        lines.append(list_faults(head, left_out))
    return lines


def _extras(comparison: Comparison) -> list[str]:
    """Per system its speed and the oracle of its N-best."""
    lines = []
    for system in comparison.systems:
        parts = []
        if system.rtfx is not None:
            parts.append(f"RTFx {system.rtfx:.1f}")
        if system.name in comparison.oracles:
            metrics = ["wer", *(["ewer"] if "ewer" in comparison.metrics else [])]
            cells = comparison.table({system.name: comparison.oracles[system.name]}, metrics=metrics).rows[system.name]
            parts += [f"oracle {metric.upper()} {cell}" for metric, cell in zip(metrics, cells, strict=True)]
            parts.append(f"mean N {sum(map(len, system.nbest)) / len(system.nbest):.1f}")
        lines += [f"{system.name}: " + ", ".join(parts)] if parts else []
    return lines


def _breakdown_text(found: Breakdown) -> str:
    """One table of value × system."""
    rows: list[list[Any]] = []
    for value, size, table in found.groups:
        for k, (system, cells) in enumerate(table.rows.items()):
            rows.append([*((value, size) if k == 0 else ("", "")), system, *map(str, cells)])
    return "\n" + Table([found.title, found.size_name, "system", *map(column_title, found.metrics)], rows).to_text()
