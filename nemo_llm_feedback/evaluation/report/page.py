"""Writes the page: every value goes through jinja2's autoescape, everything it needs is inside the file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nemo_llm_feedback.core.text import NORMALIZER_WORDS
from nemo_llm_feedback.evaluation.comparison import Comparison
from nemo_llm_feedback.evaluation.metrics import CorpusScores, PairedDifference, find_metric, paired_difference
from nemo_llm_feedback.evaluation.report.audio import MAX_PLAYERS, data_uri
from nemo_llm_feedback.evaluation.report.data import ReportData
from nemo_llm_feedback.evaluation.report.plots import Plot, bars, curves, read_numbers
from nemo_llm_feedback.evaluation.report.utterances import Card, Listing, list_utterances
from nemo_llm_feedback.evaluation.tables import Cell, Table

_TEMPLATES = Path(__file__).parent / "templates"
_GROUP_METRICS = ("wer", "ewer", "entity_recall", "false_alarms")
_TITLES = {"ewer": "Entity WER", "wer": "WER", "cer": "CER", "false_alarms": "Entity false alarms"}
_BAR_METRICS = ("ewer", "wer", "u_wer", "cer", "entity_recall", "false_alarms", "b_wer", "b_u_wer")


@dataclass(frozen=True)
class Headline:
    """The number at the top: one metric of the base and of the second system on one set."""

    metric: str
    title: str
    unit: str
    set_name: str
    base: Cell
    other: Cell | None
    base_name: str
    other_name: str
    difference: PairedDifference | None

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``same`` by the paired test at 5 %."""
        if self.difference is None or not self.difference.p_value < 0.05:
            return "same"
        down = self.difference.delta < 0
        return "better" if down != find_metric(self.metric).higher_is_better else "worse"


@dataclass(frozen=True)
class Breakdown:
    """One table of a type or a group key: (value, size, table) in order."""

    title: str
    size_name: str
    metrics: tuple[str, ...]
    groups: tuple[tuple[str, int, Table], ...]


@dataclass(frozen=True)
class SetView:
    """One set as the page shows it."""

    name: str
    table: Table
    bars: tuple[Plot, ...]
    breakdowns: tuple[Breakdown, ...]
    oracles: tuple[tuple[str, Cell, float], ...]
    sentences: tuple[str, ...]


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
    sets = tuple(_set_view(name, comparison) for name, comparison in report.sets.items())
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = _environment().get_template("report.html.j2").render(
        report=report,
        sets=sets,
        headlines=_headlines(report.sets),
        curves=curves(_with_base(read_numbers(report.steps_file), report.sets)),
        listing=listing,
        groups=_entity_groups(listing),
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


def _headlines(sets: Mapping[str, Comparison]) -> list[Headline]:
    """Entity WER and WER of the first set, then WER of the others; WER and CER where there are no entities."""
    out = []
    for k, (name, comparison) in enumerate(sets.items()):
        entities = "ewer" in comparison.metrics
        metrics = (["ewer", "wer"] if entities else ["wer", "cer"]) if k == 0 else ["wer"]
        if k == 0 and "false_alarms" in comparison.metrics:
            metrics.append("false_alarms")
        table = comparison.table(metrics=metrics)
        names = [system.name for system in comparison.systems]
        for m, metric in enumerate(metrics):
            other = names[1] if len(names) > 1 else None
            difference = _difference(comparison, metric, other) if other else None
            out.append(
                Headline(
                    metric,
                    _TITLES.get(metric, find_metric(metric).title),
                    "%" if find_metric(metric).unit == "%" else f" {find_metric(metric).unit}",
                    name,
                    table.rows[names[0]][m],
                    table.rows[other][m] if other else None,
                    names[0],
                    other or "",
                    difference,
                )
            )
    return out


def _difference(comparison: Comparison, metric: str, other: str) -> PairedDifference:
    scoring = comparison.scoring
    return paired_difference(
        comparison.scores[other],
        comparison.scores[comparison.base],
        metric,
        samples=scoring.samples,
        seed=scoring.seed,
    )


def _set_view(name: str, comparison: Comparison) -> SetView:
    table = comparison.table()
    cells = {metric: {s: row[m] for s, row in table.rows.items()} for m, metric in enumerate(table.metrics)}
    drawn = [metric for metric in _BAR_METRICS if metric in cells]
    scoring = comparison.scoring
    oracles = []
    if comparison.oracles:
        best = comparison.table(comparison.oracles, metrics=["wer"])
        lengths = {s.name: sum(map(len, s.nbest)) / len(s.nbest) for s in comparison.systems if s.nbest}
        oracles = [(system, row[0], lengths[system]) for system, row in best.rows.items()]
    changes = (
        f"; before each value the change relative to {table.base}, * where p < 0.05 (paired)" if table.base else ""
    )
    sentences = [
        f"{table.utterances} utterances; below each value its 95 % interval by bootstrap over utterances "
        f"({table.samples} samples){changes}.",
        f"Text normalisation: {scoring.normalizer} ({NORMALIZER_WORDS[scoring.normalizer]}).",
    ]
    if comparison.terms:
        sentences.append(f"False alarms: {comparison.terms} different terms, {comparison.terms_from}.")
    missing = comparison.scores[comparison.base].missing
    if missing:
        listed = "; ".join(f"{comparison.rows[m.utterance].origin}: “{m.entity}”" for m in missing[:20])
        sentences.append(f"{len(missing)} entities are not in their reference and were left out: {listed}.")
    return SetView(
        name,
        table,
        tuple(bars(metric, cells[metric]) for metric in drawn),
        tuple(_breakdowns(comparison)),
        tuple(oracles),
        tuple(sentences),
    )


def _breakdowns(comparison: Comparison) -> list[Breakdown]:
    out = []
    if comparison.by_type:
        metrics = [m for m in _GROUP_METRICS if m in comparison.metrics and m != "wer"]
        groups = comparison.by_type.items()
        sized = [(v, int(_first(s).column("entities").sum()), comparison.table(s, metrics=metrics)) for v, s in groups]
        out.append(Breakdown("entity type", "mentions", tuple(metrics), tuple(sized)))
    for key, values in comparison.by_group.items():
        metrics = [m for m in _GROUP_METRICS if m in comparison.metrics]
        sized = [(v, len(_first(s).references), comparison.table(s, metrics=metrics)) for v, s in values.items()]
        out.append(Breakdown(key, "utterances", tuple(metrics), tuple(sized)))
    return out


def _first(scores: Mapping[str, CorpusScores]) -> CorpusScores:
    return next(iter(scores.values()))


def _entity_groups(listing: Listing) -> list[dict[str, Any]]:
    return [
        {"set": name, "fixed": listing.fixed[name], "broken": listing.broken[name]}
        for name in listing.fixed
        if listing.fixed[name] or listing.broken[name]
    ]


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
