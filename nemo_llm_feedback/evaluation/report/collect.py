"""Collects the data of a report: of an evaluation, of a finished adaptation, or of a run that has not finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.run_folder import RUN_FILE, SETTINGS_FILE, STEPS_FILE, package_versions
from nemo_llm_feedback.core.secrets import masked
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Comparison, Member, Scoring, System, compare
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.report.data import Change, ReportData, command_text

_ELSEWHERE = ("plugin", "context_sha256")  # among the versions, and in the settings themselves
_GROUP_KEYS = ("domain", "speaker", "voice")
_MAX_GROUPS = 20


def evaluation_report(comparison: Comparison, *, left_out: Sequence[str] = ()) -> ReportData:
    """The report of one evaluation.

    Args:
        comparison: the systems, scored.
        left_out: what a system failed on, one sentence per row.
    """
    names = [system.name for system in comparison.systems]
    seconds = sum(row.duration for row in comparison.rows)
    facts = {
        "Systems": ", ".join(names),
        "Utterances": str(len(comparison.rows)),
        "Audio": f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds else "",
        "Speed (RTFx)": ", ".join(f"{s.name} {s.rtfx:.0f}×" for s in comparison.systems if s.rtfx is not None),
    }
    return ReportData(
        title="Evaluation",
        subtitle=(" against " if len(names) == 2 else ", ").join(names),
        sets={"evaluation set": comparison},
        facts={label: value for label, value in facts.items() if value},
        notes=tuple(f"Left out of all systems: {item}" for item in left_out),
    )


def adaptation_report(
    *,
    log_dir: str | Path,
    rows: Mapping[str, Sequence[Row]],
    before: Mapping[str, CorpusScores],
    after: Mapping[str, CorpusScores],
    context: Context,
    normalizer: str,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    nbest: Mapping[str, Sequence[tuple[Member, ...]]] | None = None,
    changes: Sequence[Change] = (),
    surveyed: int = 0,
) -> ReportData:
    """The report of a finished adaptation.

    Args:
        log_dir: folder of the run, with ``steps.jsonl`` where it was logged.
        rows: validation set → its rows; empty without validation.
        before, after: validation set → scores of the base and of the adapted model over these rows.
        context: the run's context; its terms are the list for false alarms.
        normalizer: name of the run's text normalisation.
        facts: ``base``, ``llm``, ``objective``, ``steps`` and further facts; nested values and None are left
            out.
        settings: the composed configuration as plain containers; values of secret keys are hidden.
        nbest: validation set → the adapted model's N-best of each row, empty where none was made.
        changes: utterances without reference whose transcript changed.
        surveyed: utterances without reference that were compared.
    """
    sets = {}
    for name, labelled in rows.items():
        values = {key: {str(row.data[key]) for row in labelled if key in row.data} for key in _GROUP_KEYS}
        groups = tuple(key for key, found in values.items() if 2 <= len(found) <= _MAX_GROUPS)
        scoring = Scoring(normalizer=normalizer, context=context, missing_entities="skip", group_by=groups)
        adapted = System("adapted", after[name].hypotheses, tuple((nbest or {}).get(name, ())))
        sets[name] = compare(labelled, [System("base", before[name].hypotheses), adapted], scoring)
    shown = {
        "Language model" if key == "llm" else key.replace("_", " ").capitalize(): str(value)
        for key, value in facts.items()
        if isinstance(value, (str, int, float)) and key not in _ELSEWHERE
    }
    return ReportData(
        title="Adaptation",
        subtitle=f"{facts.get('base') or 'the base model'}, adapted to {context.description or 'unlabeled audio'}",
        sets=sets,
        changes=tuple(changes),
        surveyed=surveyed,
        facts=shown,
        settings=settings_text(settings),
        steps_file=str(Path(log_dir) / STEPS_FILE),
    )


def unfinished_report(run_dir: str | Path) -> ReportData:
    """The report of a run folder that has training curves only: the run is going on or was stopped.

    Raises:
        ManifestError: the folder has no curves either.
    """
    folder = Path(run_dir)
    if not (folder / STEPS_FILE).is_file():
        raise ManifestError(
            f"{run_dir} has neither report_data.json nor {STEPS_FILE}: give the folder of an `adapt` run "
            "(with its date, e.g. runs/adapted/2026-01-31_12-00-00)."
        )
    saved, run = (
        yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (folder / SETTINGS_FILE, folder / RUN_FILE)
    )
    return ReportData(
        title="Adaptation in progress",
        subtitle=folder.name,
        facts={"Run folder": folder.name},
        settings=settings_text(saved),
        versions=run.get("versions") or package_versions(),
        commands=(command_text(run["command"]),) if run.get("command") else (),
        notes=("The run has not finished, so there is no comparison yet; the curves are up to the last logged step.",),
        steps_file=str(folder / STEPS_FILE),
    )


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, with secrets hidden."""
    return yaml.safe_dump(masked(settings), sort_keys=False, allow_unicode=True) if settings else ""
