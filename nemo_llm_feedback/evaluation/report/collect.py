"""Collects the data of a report: of an evaluation, of a finished adaptation, or of a run that has not finished."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.run_folder import RUN_FILE, SETTINGS_FILE, STEPS_FILE, package_versions
from nemo_llm_feedback.core.secrets import masked
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, merge_context
from nemo_llm_feedback.evaluation.comparison import Comparison, Member, Scoring, System, compare
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.report.data import Change, ReportData, Run, command_text
from nemo_llm_feedback.evaluation.report.terms import term_changes

# Facts of a run by the label under which the page shows them; the others stand elsewhere on it.
_LABELS = {
    "base": "Base",
    "llm": "Language model",
    "objective": "Objective",
    "reward": "Reward",
    "learning_rate": "Learning rate",
    "boosting_weight": "Boosting weight",
    "pool_rows": "Unlabeled rows",
    "pool_hours": "Hours of audio",
    "steps": "Steps",
    "kept_step": "Kept step",
    "generation": "Its generation",
    "gain": "Held-out gain",
    "share": "Share of the update",
    "ended": "Ended early",
}
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
        facts: what the exported ``.nemo`` holds on its adaptation (``base``, ``llm``, ``kept_step`` …).
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
    terms = [merge_context(context, change.row.context).terms for change in changes]
    found = term_changes([(c.before, c.after) for c in changes], terms, normalizer=normalizer)
    return ReportData(
        title="Adaptation",
        subtitle=f"{facts.get('base') or 'the base model'}, adapted to {context.description or 'unlabeled audio'}",
        sets=sets,
        changes=tuple(changes),
        surveyed=surveyed,
        facts=_shown_facts(facts),
        run=_run(facts, settings, terms=found),
        settings=changed_settings(settings),
        steps_file=str(Path(log_dir) / STEPS_FILE),
    )


def _shown_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Label → value of what is known; a whole update goes without words."""
    known = {label: facts[key] for key, label in _LABELS.items() if facts.get(key) not in (None, "")}
    if facts.get("held_out_rows") == 0 and "Held-out gain" in known:
        known["Gain, on trained rows"] = known.pop("Held-out gain")
    if facts.get("share") == 1.0:
        del known[_LABELS["share"]]
    return {label: f"{value:.4g}" if isinstance(value, float) else str(value) for label, value in known.items()}


def _run(facts: Mapping[str, Any], settings: Mapping[str, Any], **terms: Any) -> Run:
    """The record of a run from its facts, none while it goes on, and its settings."""
    guards, gain = settings.get("guards") or {}, facts.get("gain")
    alpha, beta, asr = facts.get("alpha"), facts.get("beta"), (settings.get("reward") or {}).get("asr_weight", 1.0)
    return Run(
        steps=int(facts.get("steps", 0)),
        kept_step=facts.get("kept_step"),
        gain=math.nan if gain is None else gain,
        held_out=facts.get("held_out_rows") != 0,
        ended=facts.get("ended", ""),
        share=facts.get("share", 1.0),
        refresh_every=int((settings.get("feedback") or {}).get("refresh_every", 0)),
        limits={key.removeprefix("max_"): float(value) for key, value in guards.items() if key.startswith("max_")},
        weights={}
        if alpha is None or beta is None
        else {"llm": alpha, "length": beta} | ({"asr": asr} if asr else {}),
        **terms,
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
        run=_run({}, saved),
        settings=changed_settings(saved),
        versions=run.get("versions") or package_versions(),
        commands=(command_text(run["command"]),) if run.get("command") else (),
        notes=("The run has not finished, so there is no comparison yet; the curves are up to the last logged step.",),
        steps_file=str(folder / STEPS_FILE),
    )


def changed_settings(settings: Mapping[str, Any]) -> str:
    """The settings that differ from the defaults of ``adapt``, as YAML with secrets hidden."""
    if not settings:
        return ""
    defaults: Any = OmegaConf.to_container(compose_config([]), resolve=True, throw_on_missing=False)
    return yaml.safe_dump(masked(_differing(settings, defaults)), sort_keys=False, allow_unicode=True)


def _differing(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of nested mappings whose values are not the defaults'."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value, default = _differing(value, default), {}
        if value != default:
            out[key] = value
    return out
