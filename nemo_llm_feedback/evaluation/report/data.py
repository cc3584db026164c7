"""What a report is made of, as plain records that a run folder keeps, so that the page can be written again."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pydantic

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.run_folder import package_versions
from nemo_llm_feedback.core.secrets import masked_command
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Comparison, Member, Scoring, System, compare

DATA_NAME = "report_data.json"
_FORMAT = 1


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


@dataclass(frozen=True)
class _Facts:
    """Everything on the page but the results and the training curves, which are read from ``steps.jsonl``."""

    title: str
    subtitle: str
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    changes: tuple[Change, ...] = ()
    surveyed: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    versions: Mapping[str, str] = field(default_factory=package_versions)
    commands: tuple[str, ...] = field(default_factory=lambda: (command_text(sys.argv),))
    notes: tuple[str, ...] = ()
    steps_file: str | None = None


@dataclass(frozen=True)
class ReportData(_Facts):
    """Everything on the page but the training curves.

    Attributes:
        title, subtitle: of the page.
        created: date and time, as shown; now by default.
        changes: utterances without reference whose transcript changed.
        surveyed: how many utterances without reference were compared; 0 = none.
        facts: label → value, the short list at the top.
        settings: the run's settings as YAML.
        versions: package → version.
        commands: that made the report; this process's by default.
        notes: sentences on what was left out.
        steps_file: JSON Lines of the training metrics, or None.
        sets: name → comparison on a set with references; the target domain first.
    """

    sets: Mapping[str, Comparison] = field(default_factory=dict)


@dataclass(frozen=True)
class _Transcripts:
    """A comparison without its scores."""

    rows: tuple[Row, ...]
    systems: tuple[System, ...]
    scoring: Scoring


@dataclass(frozen=True)
class _Saved(_Facts):
    """A report as its file holds it."""

    sets: Mapping[str, _Transcripts] = field(default_factory=dict)
    format: int = _FORMAT


def save_report(report: ReportData, folder: str | Path) -> Path:
    """Writes the data of a report into a run folder; scores are computed again when it is read.

    Returns:
        The path written.
    """
    sets = {name: _Transcripts(c.rows, c.systems, c.scoring) for name, c in report.sets.items()}
    path = Path(folder) / DATA_NAME
    plain = dataclasses.asdict(_Saved(**_facts(report), sets=sets))
    path.write_text(json.dumps(plain, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load_report(folder: str | Path) -> ReportData:
    """Reads what :func:`save_report` wrote, and scores the transcripts.

    Raises:
        ManifestError: the file is missing, damaged or of another version of this package.
    """
    path = Path(folder) / DATA_NAME
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or plain.get("format") != _FORMAT:
            raise ManifestError(f"{path} was written by another version of this package; run the command again.")
        saved = pydantic.TypeAdapter(_Saved).validate_python(plain)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, pydantic.ValidationError) as error:
        raise ManifestError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None
    return ReportData(
        **_facts(saved), sets={name: compare(t.rows, t.systems, t.scoring) for name, t in saved.sets.items()}
    )


def command_text(arguments: Sequence[str]) -> str:
    """A command line that a shell takes, with secrets hidden."""
    return shlex.join(masked_command([Path(arguments[0]).name, *arguments[1:]]))


def _facts(report: _Facts) -> dict[str, Any]:
    return {f.name: getattr(report, f.name) for f in dataclasses.fields(_Facts)}
