"""Writes the report as one HTML file: what it shows is in ``report.html.j2``, and every value is escaped there."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import soundfile
from markupsafe import Markup

from nemo_llm_feedback.core.errors import DecodingError
from nemo_llm_feedback.data.audio import read_audio
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Comparison
from nemo_llm_feedback.evaluation.metrics import find_metric, paired_difference
from nemo_llm_feedback.evaluation.records import check_writable
from nemo_llm_feedback.evaluation.report.data import ReportData, Run
from nemo_llm_feedback.evaluation.report.plots import curves, read_numbers
from nemo_llm_feedback.evaluation.report.utterances import list_utterances

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_PLAYERS = 50
_RATE = 16000
_MAX_SECONDS = 40.0


def write_report(report: ReportData, path: str | Path, *, audio: bool = True) -> Path:
    """Writes the report as one HTML file that needs no network.

    Args:
        report: the data.
        path: where; folders are made.
        audio: put the audio of the ≤ 50 most changed utterances into the file.

    Returns:
        The path written.

    Raises:
        ConfigError: the file cannot be written.
    """
    run, steps = report.run, read_numbers(report.steps_file)
    listing = list_utterances(report.sets, report.changes, run.weights if run else None)
    played = [card for card in listing.cards if card.change][:_MAX_PLAYERS]
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = _environment().get_template("report.html.j2").render(
        report=report,
        curves=curves(_with_base(steps, report.sets), run),
        guards=guard_rows(steps, run) if run else [],
        paired_difference=paired_difference,
        listing=listing,
        set_names=list(dict.fromkeys(card.set_name for card in listing.cards)),
        players={card.id: _data_uri(card.row) for card in played} if audio else None,
        css=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )  # fmt: skip
    target = check_writable(path)
    target.write_text(page, encoding="utf-8")
    return target


class GuardRow(NamedTuple):
    """What a guard measured: at the kept step (NaN = not measured there), and furthest from no change."""

    name: str
    kept: float
    furthest: float
    limit: float | None


def guard_rows(steps: Sequence[Mapping[str, float]], run: Run) -> list[GuardRow]:
    """One row for each quantity that was measured on held-out utterances.

    Args:
        steps: the lines of ``steps.jsonl``.
        run: its kept step and limits.
    """
    found: dict[str, dict[float, float]] = {}
    for line in steps:
        for name, value in line.items():
            if name.startswith("held_out/"):
                found.setdefault(name.removeprefix("held_out/"), {})[line["step"]] = value
    rows = []
    for name, values in found.items():
        unchanged = 1.0 if name == "length_ratio" else 0.0
        furthest = max(values.values(), key=lambda value: abs(value - unchanged))
        rows.append(GuardRow(name, values.get(run.kept_step or 0, math.nan), furthest, run.limits.get(name)))
    return rows


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
        "source": lambda name: {"boosted": "boosted beam"}.get(name, name.replace("_", " ")),
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


def _data_uri(row: Row) -> str | None:
    """The row's audio as 16 kHz mono MP3 (FLAC where libsndfile writes no MP3) in a ``data:`` address.

    At most the first 40 s. All browsers play both formats; Ogg is silent in Safari before 18.4.

    Returns:
        The address, or None where the file is gone or cannot be read.
    """
    try:
        length = min(row.duration, _MAX_SECONDS)  # 0, of ready transcripts without one: to the end of the file
        mono = read_audio(row.audio, offset=row.offset, duration=length, sample_rate=_RATE)[
            : int(_MAX_SECONDS * _RATE)
        ]
    except DecodingError:
        return None
    kind = "MP3" if "MP3" in soundfile.available_formats() else "FLAC"
    buffer = io.BytesIO()
    soundfile.write(buffer, mono, _RATE, format=kind)
    mime = "audio/mpeg" if kind == "MP3" else "audio/flac"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
