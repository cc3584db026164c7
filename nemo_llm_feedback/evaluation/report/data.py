"""The data of a report as plain records, kept in the run folder so that the page can be written again."""

from __future__ import annotations

import dataclasses
import json
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
_FORMAT = 2


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
class ReportData:
    """Everything on the page except the training curves, which are read from ``steps.jsonl``.

    Attributes:
        title, subtitle: shown on top of the page.
        created: date and time, as shown; now by default.
        sets: name → comparison on a set with references; the target domain first.
        changes: utterances without reference whose transcript changed.
        surveyed: how many utterances without reference were compared; 0 = none.
        facts: label → value, the short list at the top.
        settings: the run's settings as YAML.
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
        plain |= {name: tuple(plain[name]) for name in ("commands", "notes")}
        return ReportData(**plain, sets={name: compare(*transcripts) for name, transcripts in sets.items()})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, pydantic.ValidationError) as error:
        raise ManifestError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None


def command_text(arguments: Sequence[str]) -> str:
    """A command line that a shell takes, with secrets hidden."""
    return shlex.join(masked_command([Path(arguments[0]).name, *arguments[1:]]))
