"""Writes the report as one HTML file: what it shows is in ``report.html.j2``, and every value is escaped there."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from nemo_llm_feedback.evaluation.comparison import Comparison
from nemo_llm_feedback.evaluation.metrics import find_metric, paired_difference
from nemo_llm_feedback.evaluation.report.audio import MAX_PLAYERS, data_uri
from nemo_llm_feedback.evaluation.report.data import ReportData
from nemo_llm_feedback.evaluation.report.plots import bars, curves, read_numbers
from nemo_llm_feedback.evaluation.report.utterances import list_utterances

_TEMPLATES = Path(__file__).parent / "templates"


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
    played = [card for card in listing.cards if card.change][:MAX_PLAYERS]
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = _environment().get_template("report.html.j2").render(
        report=report,
        curves=curves(_with_base(read_numbers(report.steps_file), report.sets)),
        bars=bars,
        paired_difference=paired_difference,
        listing=listing,
        set_names=list(dict.fromkeys(card.set_name for card in listing.cards)),
        players={card.id: data_uri(card.row) for card in played} if audio else None,
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
        "svg": Markup,  # the drawings are made here; matplotlib escapes the names in them
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
