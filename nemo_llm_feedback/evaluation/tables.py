"""Tables of several systems' metrics, with bootstrap intervals and the change against a base system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.evaluation.metrics import CorpusScores, bootstrap, find_metric, paired_difference
from nemo_llm_feedback.evaluation.records import Table, to_plain

_WIDTH = 100  # characters of a terminal's line
_SIGNIFICANT = 0.05
# Below this value of the base (in the metric's unit), or below a quarter of the other value, a relative change tells
# nothing: the difference is shown.
_NEAR_ZERO = 1.0


@dataclass(frozen=True)
class Cell:
    """One metric of one system.

    Attributes:
        value, low, high: pooled value and 95 % interval in the metric's unit; NaN where undefined.
        change: relative change to the base system in %, negative = smaller; None for the base itself, without a base,
            and where the base's value is undefined or near 0.
        p_value: p-value of the paired test against the base; None without such a test.
        difference: value − the base's, in the metric's unit; None where there is no base's value.
    """

    value: float
    low: float
    high: float
    change: float | None = None
    p_value: float | None = None
    difference: float | None = None

    @property
    def against(self) -> str:
        """The relative change to the base, or the difference where the base is near 0; empty if none is known."""
        if self.change is not None:
            return f"{self.change:+.1f} %".replace("-", "−")
        return "" if self.difference is None else f"{self.difference:+.1f} points".replace("-", "−")

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        text = f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"
        if self.against:
            text += f" ({self.against})"
        if self.p_value is not None and self.p_value < _SIGNIFICANT:
            text += "*"
        return text


@dataclass(frozen=True)
class ScoreTable:
    """Scores of several systems on one set of utterances.

    Attributes:
        metrics: keys of `metrics.METRICS`, the columns.
        rows: system name → one cell per metric.
        base: the system that changes are relative to, or None.
        utterances: how many were scored.
        samples, seed: of the bootstrap intervals.
    """

    metrics: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]
    base: str | None
    utterances: int
    samples: int
    seed: int

    @property
    def caption(self) -> str:
        """What the numbers mean, in a sentence."""
        words = f"{self.utterances} utterances; 95 % intervals by bootstrap over utterances ({self.samples} samples)"
        if self.base is not None:
            words += f"; in round brackets the change relative to {self.base} (in points where that is near 0), "
            words += f"* where p < {_SIGNIFICANT} (paired)"
        return words + "."

    @property
    def table(self) -> Table:
        """A row per system, with the caption."""
        rows = [[name, *map(str, cells)] for name, cells in self.rows.items()]
        return Table(["system", *map(column_title, self.metrics)], rows, self.caption)

    def to_text(self) -> str:
        """The table for a terminal; a row per metric where that is narrower and the other way is too wide."""
        text = self.table.to_text()
        if len(self.rows) >= len(self.metrics) or len(text.splitlines()[0]) <= _WIDTH:
            return text
        columns = [map(column_title, self.metrics), *([str(cell) for cell in row] for row in self.rows.values())]
        return Table(["", *self.rows], list(zip(*columns, strict=True)), self.caption).to_text()

    @property
    def systems(self) -> dict[str, dict[str, Any]]:
        """System → metric → all numbers of its cell."""
        return {
            name: {
                m: to_plain(cell) | {"unit": find_metric(m).unit} for m, cell in zip(self.metrics, row, strict=True)
            }
            for name, row in self.rows.items()
        }

    @property
    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        head = {"utterances": self.utterances, "base": self.base, "samples": self.samples, "seed": self.seed}
        return head | {"systems": self.systems}


def table_metrics(scores: CorpusScores) -> list[str]:
    """The metrics worth a column: those whose denominator is not 0."""
    out = ["wer", "cer"]
    out += ["ewer", "u_wer", "entity_recall"] if scores.column("entity_words").sum() else []
    out += ["false_alarms"] if scores.column("term_utterances").sum() else []
    out += ["b_wer", "b_u_wer"] if scores.column("b_words").sum() else []
    return out


def column_title(metric: str) -> str:
    """The head of a metric's column: name, the direction that is better, and unit."""
    m = find_metric(metric)
    return f"{m.title} {'↑' if m.higher_is_better else '↓'} ({m.unit})"


def build_table(
    systems: Mapping[str, CorpusScores],
    *,
    metrics: Sequence[str],
    base: str | None,
    samples: int = 2000,
    seed: int = 0,
) -> ScoreTable:
    """Values, intervals and changes of several systems over the same utterances.

    Args:
        systems: name → scores, in the order of the rows.
        metrics: keys of `metrics.METRICS`, in the order of the columns.
        base: name of the system that the others are compared with, or None for no comparison.
        samples: bootstrap resamples, some thousands.
        seed: seed of the bootstrap.

    Raises:
        ConfigError: no systems, no metrics, an unknown metric or an unknown base.
        ManifestError: systems scored on different references.
    """
    if not systems or not metrics:
        raise ConfigError("a table needs at least one system and one metric")
    if base is not None and base not in systems:
        raise ConfigError(f"unknown base system '{base}': choose from {', '.join(systems)}")
    first = next(iter(systems.values()))
    strangers = [name for name, scores in systems.items() if scores.references != first.references]
    if strangers:
        raise ManifestError(
            f"{', '.join(strangers)}: scored on other references than {next(iter(systems))}; score all systems on the "
            f"same manifest with the same normalisation"
        )
    rows = {}
    for name, scores in systems.items():
        reference = None if base in (None, name) else systems[str(base)]
        rows[name] = tuple(_cell(scores, reference, metric, samples=samples, seed=seed) for metric in metrics)
    return ScoreTable(tuple(metrics), rows, base, len(first.references), samples, seed)


def _cell(scores: CorpusScores, base: CorpusScores | None, metric: str, *, samples: int, seed: int) -> Cell:
    interval = bootstrap(scores, metric, samples=samples, seed=seed)
    cell = Cell(interval.value, interval.low, interval.high)
    if base is None or math.isnan(interval.value) or math.isnan(base.value(metric)):
        return cell
    difference = paired_difference(scores, base, metric, samples=samples, seed=seed)
    before = base.value(metric)
    small = before < _NEAR_ZERO or interval.value > 4 * before
    change = None if small else 100 * difference.value / before
    return replace(cell, change=change, difference=difference.value, p_value=difference.p_value)
