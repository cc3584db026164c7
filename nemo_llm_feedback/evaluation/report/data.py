"""What a report shows, of an evaluation or of a run; kept in the run folder, so that the page can be written again."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import yaml

from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.config.run import plain
from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.run_folder import RUN_FILE, SETTINGS_FILE, STEPS_FILE, package_versions
from nemo_llm_feedback.core.secrets import masked, masked_command
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, merge_context
from nemo_llm_feedback.evaluation.comparison import Comparison, Member, Scoring, System, compare
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.report.words import term_changes

DATA_NAME = "report_data.json"
_FORMAT = 3
# Facts of a run by the label under which the page shows them; the others stand elsewhere on it.
_LABELS = {
    "base": "Base",
    "llm": "Language model",
    "objective": "Objective",
    "reward": "Reward",
    "learning_rate": "Learning rate",
    "boosting_weight": "Boosting weight",
    "pool_rows": "Rows learned from",
    "pool_hours": "Hours of audio",
    "steps": "Steps",
    "kept_step": "Kept step",
    "generation": "Its generation",
    "gain": "Held-out gain",
    "share": "Share of the update",
    "decoder_type": "Head",
    "look_ahead": "Attention context",
    "ended": "Ended early",
}
_GROUP_KEYS = ("domain", "speaker", "voice")
_MAX_GROUPS = 20


@dataclass(frozen=True)
class Change:
    """An utterance without reference whose transcript changed.

    Attributes:
        row: its manifest row.
        before, after: the transcripts.
        scores: score part (``asr``, ``llm``, ``length``, ``reward`` …) → its value for before and after.
        nbest: candidates with their score parts, where known.
    """

    row: Row
    before: str
    after: str
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    nbest: tuple[Member, ...] = ()


class _Transcripts(NamedTuple):
    """A comparison without its scores, as the file holds it."""

    rows: tuple[Row, ...]
    systems: tuple[System, ...]
    scoring: Scoring


@dataclass(frozen=True)
class Run:
    """What the page shows of a run beside its curves.

    Attributes:
        steps: optimizer steps so far.
        kept_step: the step whose weights are exported; None while the run goes on.
        gain: held-out gain of these weights, in the reward's unit; NaN without a reward.
        teacher: over whose transcripts it is.
        held_out: whether the utterances that are measured were kept from training.
        ended: why training ended before its last step; empty if it did not.
        share: share of the update that is exported.
        refresh_every: steps for which proposed hypotheses are kept; 0 = not known.
        limits: what a guard measures (the name after ``held_out/`` in the log) → its limit.
        weights: score part → its weight in the reward; empty where the reward is another sum.
        terms: term → how often it is in the transcripts without reference, before and after; those with a change.
    """

    steps: int = 0
    kept_step: int | None = None
    gain: float = math.nan
    teacher: str = "the base"
    held_out: bool = True
    ended: str = ""
    share: float = 1.0
    refresh_every: int = 0
    limits: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """Everything on the page except the training curves, which are read from ``steps.jsonl``.

    Attributes:
        title, subtitle: shown on top of the page.
        created: date and time, as shown; now by default.
        sets: name → comparison on a set with references; the target domain first.
        changes: utterances without reference whose transcript changed.
        surveyed: how many utterances without reference were compared; 0 = none.
        facts: label → value, the short list at the top.
        run: what is known of the run; None for an evaluation.
        settings: the run's settings that differ from the defaults, as YAML.
        versions: package → version.
        commands: command lines that made the report; this process's by default.
        notes: sentences on what was left out.
        steps_file: JSON Lines of the training metrics, or None.
    """

    title: str
    subtitle: str
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    sets: Mapping[str, Comparison] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    surveyed: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    run: Run | None = None
    settings: str = ""
    versions: Mapping[str, str] = field(default_factory=package_versions)
    commands: tuple[str, ...] = field(default_factory=lambda: (command_text(sys.argv),))
    notes: tuple[str, ...] = ()
    steps_file: str | None = None


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
    pool: Sequence[tuple[Row, str, str]] = (),
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
        pool: all utterances without reference that were compared, each with its transcripts before and after.
    """
    sets = {}
    for name, labelled in rows.items():
        values = {key: {str(row.data[key]) for row in labelled if key in row.data} for key in _GROUP_KEYS}
        groups = tuple(key for key, found in values.items() if 2 <= len(found) <= _MAX_GROUPS)
        scoring = Scoring(normalizer=normalizer, context=context, missing_entities="skip", group_by=groups)
        adapted = System("adapted", after[name].hypotheses, tuple((nbest or {}).get(name, ())))
        sets[name] = compare(labelled, [System("base", before[name].hypotheses), adapted], scoring)
    terms = [merge_context(context, row.context).terms for row, _, _ in pool]
    found = term_changes([(old, new) for _, old, new in pool], terms, normalizer=normalizer)
    return ReportData(
        title="Adaptation",
        subtitle=f"{facts.get('base') or 'the base model'}, adapted to {context.description or 'unlabeled audio'}",
        sets=sets,
        changes=tuple(changes),
        surveyed=len(pool),
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
    elif facts.get("generation") and "Held-out gain" in known:
        known["Held-out gain over its teacher"] = known.pop("Held-out gain")
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
        teacher="its generation's teacher" if facts.get("generation") else "the base",
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
            "(e.g. nemo_experiments/adapted/version_0)."
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
    return yaml.safe_dump(masked(_differing(settings, plain(compose_config([])))), sort_keys=False, allow_unicode=True)


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


def command_text(arguments: Sequence[str]) -> str:
    """A command line that a shell takes, with secrets hidden."""
    return shlex.join(masked_command([Path(arguments[0]).name, *arguments[1:]]))


def save_report(report: ReportData, folder: str | Path) -> Path:
    """Writes the data of a report into a run folder; scores are computed again when it is read.

    Returns:
        The path written.
    """
    sets: Any = {name: _Transcripts(c.rows, c.systems, c.scoring) for name, c in report.sets.items()}
    plain = dataclasses.asdict(dataclasses.replace(report, sets=sets))
    path = Path(folder) / DATA_NAME
    path.write_text(json.dumps({"format": _FORMAT, **plain}, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load_report(folder: str | Path) -> ReportData:
    """Reads what :func:`save_report` wrote, and scores the transcripts.

    Raises:
        ManifestError: the file is missing, damaged or of another version of this package.
    """
    path = Path(folder) / DATA_NAME
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or plain.pop("format", None) != _FORMAT:
            raise ManifestError(f"{path} was written by another version of this package; run the command again.")
        sets = pydantic.TypeAdapter(dict[str, _Transcripts]).validate_python(plain.pop("sets"))
        plain["changes"] = pydantic.TypeAdapter(tuple[Change, ...]).validate_python(plain["changes"])
        plain["run"] = pydantic.TypeAdapter(Run | None).validate_python(plain["run"])
        plain |= {name: tuple(plain[name]) for name in ("commands", "notes")}
        return ReportData(**plain, sets={name: compare(*transcripts) for name, transcripts in sets.items()})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, pydantic.ValidationError) as error:
        raise ManifestError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None
