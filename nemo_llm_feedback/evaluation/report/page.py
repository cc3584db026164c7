"""Writes the page: every value goes through jinja2's autoescape, everything it needs is inside the file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nemo_llm_feedback.evaluation.comparison import Comparison
from nemo_llm_feedback.evaluation.metrics import PairedDifference, find_metric, paired_difference
from nemo_llm_feedback.evaluation.report.audio import MAX_PLAYERS, data_uri
from nemo_llm_feedback.evaluation.report.data import ReportData
from nemo_llm_feedback.evaluation.report.plots import bars, curves, read_numbers
from nemo_llm_feedback.evaluation.report.utterances import Card, Listing, list_utterances

_TEMPLATES = Path(__file__).parent / "templates"
_TITLES = {"ewer": "Entity WER", "wer": "WER", "cer": "CER", "false_alarms": "Entity false alarms"}
_BAR_METRICS = ("ewer", "wer", "u_wer", "cer", "entity_recall", "false_alarms", "b_wer", "b_u_wer")


def write_report(report: ReportData, path: str | Path, *, audio: bool = True) -> Path:
    """Writes the report as one HTML file that needs no network.

    Args:
        report: the data.
        path: where; folders are made.
        audio: put the audio of the ≤ 50 most changed utterances into the file.

    Returns:
        The path written.
    """
    listing = list_utterances(report.sets, report.changes)
    players = _players(listing.cards) if audio else {}
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = _environment().get_template("report.html.j2").render(
        report=report,
        sets=[_set_view(name, comparison) for name, comparison in report.sets.items()],
        headlines=_headlines(report.sets),
        curves=curves(_with_base(read_numbers(report.steps_file), report.sets)),
        listing=listing,
        set_names=list(dict.fromkeys(card.set_name for card in listing.cards)),
        players=players,
        audio_note=_audio_note(listing, players, audio),
        css=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )  # fmt: skip
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "metric": find_metric,
        "signed": lambda value, digits=1: f"{value:+.{digits}f}".replace("-", "−"),
        "number": lambda value, digits=1: "–" if value != value else f"{value:.{digits}f}".replace("-", "−"),
        "p": lambda value: "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}",
        "svg": Markup,  # drawings are ours; matplotlib escapes the names in them
    }
    return environment


def _with_base(steps: list[dict[str, float]], sets: Mapping[str, Comparison]) -> list[dict[str, float]]:
    """The logged steps, and before them the base's scores as step 0; nothing where nothing was logged."""
    start = {"step": 0.0}
    for name, comparison in sets.items():
        base = comparison.scores[comparison.base]
        start |= {f"val/{name}/{m}": base.value(m) for m in ("wer", "ewer") if m in comparison.metrics}
    logged = {name for step in steps for name in step}
    return [{name: value for name, value in start.items() if name in logged}, *steps]


def _headlines(sets: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """Entity WER and WER of the first set, then WER of the others; WER and CER where there are no entities."""
    out = []
    for k, (name, comparison) in enumerate(sets.items()):
        metrics = ["wer"]
        if k == 0:
            metrics = ["ewer", "wer"] if "ewer" in comparison.metrics else ["wer", "cer"]
            metrics += ["false_alarms"] if "false_alarms" in comparison.metrics else []
        table = comparison.table(metrics=metrics)
        base, *others = table.rows
        for m, metric in enumerate(metrics):
            difference = _difference(comparison, metric, others[0]) if others else None
            out.append(
                {
                    "title": _TITLES.get(metric, find_metric(metric).title),
                    "unit": "%" if find_metric(metric).unit == "%" else f" {find_metric(metric).unit}",
                    "set_name": name,
                    "base": table.rows[base][m],
                    "other": table.rows[others[0]][m] if others else None,
                    "difference": difference,
                    "verdict": _verdict(metric, difference),
                }
            )
    return out


def _difference(comparison: Comparison, metric: str, other: str) -> PairedDifference:
    scores, scoring = comparison.scores, comparison.scoring
    base = scores[comparison.base]
    return paired_difference(scores[other], base, metric, samples=scoring.samples, seed=scoring.seed)


def _verdict(metric: str, difference: PairedDifference | None) -> str:
    """``better``, ``worse`` or ``same`` by the paired test at 5 %."""
    if difference is None or not difference.p_value < 0.05:
        return "same"
    return "better" if (difference.delta < 0) != find_metric(metric).higher_is_better else "worse"


def _set_view(name: str, comparison: Comparison) -> dict[str, Any]:
    """One set as the page shows it."""
    table = comparison.table()
    cells = {metric: {s: row[m] for s, row in table.rows.items()} for m, metric in enumerate(table.metrics)}
    oracles = comparison.table(comparison.oracles, metrics=["wer"]).rows if comparison.oracles else {}
    sizes = {s.name: sum(map(len, s.nbest)) / len(s.nbest) for s in comparison.systems if s.nbest}
    changes = (
        f"; before each value the change relative to {table.base}, * where p < 0.05 (paired)" if table.base else ""
    )
    sentences = [
        f"{table.utterances} utterances; below each value its 95 % interval by bootstrap over utterances "
        f"({table.samples} samples){changes}.",
        *comparison.basis,
    ]
    if missing := comparison.missing:
        listed = "; ".join(missing[:20])
        sentences.append(f"{len(missing)} entities are not in their reference and were left out: {listed}.")
    return {
        "name": name,
        "table": table,
        "bars": [bars(metric, cells[metric]) for metric in _BAR_METRICS if metric in cells],
        "breakdowns": comparison.breakdowns,
        "oracles": [(system, row[0], sizes[system]) for system, row in oracles.items()],
        "sentences": sentences,
    }


def _players(cards: Sequence[Card]) -> dict[str, str]:
    """Card → its audio, for the most changed ones."""
    wanted = [card for card in cards if card.change][:MAX_PLAYERS]
    return {card.id: uri for card in wanted if (uri := data_uri(card.row)) is not None}


def _audio_note(listing: Listing, players: Mapping[str, str], audio: bool) -> str:
    if not audio:
        return "Audio was left out (--no-audio)."
    wanted = min(MAX_PLAYERS, sum(bool(card.change) for card in listing.cards))
    gone = f" The audio of {wanted - len(players)} could not be read." if wanted > len(players) else ""
    return f"The {len(players)} most changed utterances can be played.{gone}" if players or gone else ""
