"""The data of a report as plain records, kept in the run folder so that the page can be written again."""

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

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.run_folder import package_versions
from nemo_llm_feedback.core.secrets import masked_command
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Comparison, Member, Scoring, System, compare

DATA_NAME = "report_data.json"
_FORMAT = 3


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


def command_text(arguments: Sequence[str]) -> str:
    """A command line that a shell takes, with secrets hidden."""
    return shlex.join(masked_command([Path(arguments[0]).name, *arguments[1:]]))
