"""What a report is made of, as plain records that a run folder keeps, so that the page can be written again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.types import Context
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
class ReportData:
    """Everything on the page but the training curves, which are read from ``steps.jsonl``.

    Attributes:
        title, subtitle: of the page.
        created: date and time, as shown.
        sets: name → comparison on a set with references; the target domain first.
        changes: utterances without reference whose transcript changed.
        surveyed: how many utterances without reference were compared; 0 = none.
        facts: label → value, the short list at the top.
        settings: the run's settings as YAML.
        versions: package → version.
        commands: that made the report.
        notes: sentences on what was left out.
        steps_file: JSON Lines of the training metrics, or None.
    """

    title: str
    subtitle: str
    created: str
    sets: Mapping[str, Comparison] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    surveyed: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    steps_file: str | None = None


def save_report(report: ReportData, folder: str | Path) -> Path:
    """Writes the data of a report into a run folder; scores are computed again when it is read.

    Returns:
        The path written.
    """
    plain = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name not in ("sets", "changes")}
    plain |= {"facts": dict(report.facts), "versions": dict(report.versions), "format": _FORMAT}
    plain["sets"] = {
        name: {
            "rows": [_plain_row(row) for row in c.rows],
            "systems": [_plain_system(system) for system in c.systems],
            "scoring": dataclasses.asdict(c.scoring),
        }
        for name, c in report.sets.items()
    }
    plain["changes"] = [
        {
            "row": _plain_row(change.row),
            "before": change.before,
            "after": change.after,
            "scores": {name: list(pair) for name, pair in change.scores.items()},
            "nbest": _plain_members(change.nbest),
        }
        for change in report.changes
    ]
    path = Path(folder) / DATA_NAME
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
        if not isinstance(plain, dict) or plain.pop("format", None) != _FORMAT:
            raise ManifestError(f"{path} was written by another version of this package; run the command again.")
        sets = {
            name: compare(
                [_row(row) for row in item["rows"]],
                [_system(system) for system in item["systems"]],
                _scoring(item["scoring"]),
            )
            for name, item in plain.pop("sets").items()
        }
        changes = tuple(_change(item) for item in plain.pop("changes"))
        plain |= {name: tuple(plain[name]) for name in ("commands", "notes")}
        return ReportData(sets=sets, changes=changes, **plain)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None


def _plain_row(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(dataclasses.replace(row, data={})), "data": dict(row.data)}


def _plain_system(system: System) -> dict[str, Any]:
    nbest = [_plain_members(members) for members in system.nbest]
    return {"name": system.name, "texts": list(system.texts), "nbest": nbest, "rtfx": system.rtfx}


def _plain_members(members: tuple[Member, ...]) -> list[dict[str, Any]]:
    return [{"text": member.text, "scores": dict(member.scores)} for member in members]


def _members(plain: list[dict[str, Any]]) -> tuple[Member, ...]:
    return tuple(Member(item["text"], item["scores"]) for item in plain)


def _row(plain: dict[str, Any]) -> Row:
    context = Context(plain["context"]["description"], tuple(plain["context"]["terms"]))
    return Row(**{**plain, "context": context})


def _system(plain: dict[str, Any]) -> System:
    nbest = tuple(_members(members) for members in plain["nbest"])
    return System(plain["name"], tuple(plain["texts"]), nbest, plain["rtfx"])


def _scoring(plain: dict[str, Any]) -> Scoring:
    context = Context(plain["context"]["description"], tuple(plain["context"]["terms"]))
    return Scoring(**{**plain, "context": context, "group_by": tuple(plain["group_by"])})


def _change(plain: dict[str, Any]) -> Change:
    scores = {name: (pair[0], pair[1]) for name, pair in plain["scores"].items()}
    return Change(_row(plain["row"]), plain["before"], plain["after"], scores, _members(plain["nbest"]))
