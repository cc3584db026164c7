"""Tables of systems × metrics with bootstrap intervals: plain text, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.evaluation.metrics import CorpusScores, bootstrap, find_metric, paired_difference

_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """One metric of one system.

    Attributes:
        value, low, high: pooled value and 95 % interval in the metric's unit; NaN where undefined.
        change: relative change to the base system in %, negative = smaller; None for the base itself, without a base,
            and where the base's value is 0 or undefined.
        p_value: of the paired test against the base; None where there is no such test.
    """

    value: float
    low: float
    high: float
    change: float | None = None
    p_value: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        text = f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"
        if self.change is not None:
            text += f" ({self.change:+.1f} %".replace("-", "−") + ")"
        if self.p_value is not None and self.p_value < _SIGNIFICANT:
            text += "*"
        return text


@dataclass(frozen=True)
class Table:
    """Scores of several systems on one set of utterances; ``str`` gives the plain-text form.

    Attributes:
        metrics: keys of `metrics.METRICS`, the columns.
        rows: system name → one cell a metric.
        base: the system that changes are relative to, or None.
        utterances: how many were scored.
        samples, seed: of the bootstrap.
    """

    metrics: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]
    base: str | None
    utterances: int
    samples: int
    seed: int

    def __str__(self) -> str:
        return self.to_text()

    @property
    def caption(self) -> str:
        """What the numbers are, in words."""
        words = f"{self.utterances} utterances; 95 % intervals by bootstrap over utterances ({self.samples} samples)"
        if self.base is not None:
            words += f"; in round brackets the change relative to {self.base}, * where p < {_SIGNIFICANT} (paired)"
        return words + "."

    def to_text(self) -> str:
        """Aligned columns for a terminal, with the caption below."""
        return f"{align(self._grid())}\n\n{self.caption}"

    def to_markdown(self) -> str:
        """A GitHub table, with the caption below."""
        header, *body = [[_escape(cell) for cell in line] for line in self._grid()]
        rule = ["---"] + ["---:"] * len(self.metrics)
        return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body]) + f"\n\n{self.caption}"

    def to_json(self) -> str:
        """All numbers in full precision; undefined ones are null."""
        systems = {
            name: {
                metric: {key: _null(value) for key, value in asdict(cell).items()} | {"unit": find_metric(metric).unit}
                for metric, cell in zip(self.metrics, cells, strict=True)
            }
            for name, cells in self.rows.items()
        }
        head = {"utterances": self.utterances, "base": self.base, "samples": self.samples, "seed": self.seed}
        return json.dumps(head | {"systems": systems}, indent=2, ensure_ascii=False, allow_nan=False)

    def _grid(self) -> list[list[str]]:
        return [["system", *map(column_title, self.metrics)]] + [
            [name, *map(str, cells)] for name, cells in self.rows.items()
        ]


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


def align(grid: Sequence[Sequence[str]]) -> str:
    """Lines of equal columns for a terminal; the first line is the header and gets a rule below it."""
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    lines = [grid[0], ["-" * width for width in widths], *grid[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def build_table(
    systems: Mapping[str, CorpusScores], *, metrics: Sequence[str], base: str | None, samples: int, seed: int
) -> Table:
    """Values, intervals and changes of several systems over the same utterances.

    Args:
        systems: name → scores, in the order of the rows.
        metrics: keys of `metrics.METRICS`, in the order of the columns.
        base: name of the system that the others are compared with, or None for no comparison.
        samples: bootstrap resamples, some thousands.
        seed: of the bootstrap.

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
    return Table(tuple(metrics), rows, base, len(first.references), samples, seed)


def _cell(scores: CorpusScores, base: CorpusScores | None, metric: str, *, samples: int, seed: int) -> Cell:
    interval = bootstrap(scores, metric, samples=samples, seed=seed)
    cell = Cell(interval.value, interval.low, interval.high)
    if base is None or math.isnan(interval.value) or math.isnan(base.value(metric)):
        return cell
    difference = paired_difference(scores, base, metric, samples=samples, seed=seed)
    before = base.value(metric)
    change = 100 * difference.delta / before if before else None
    return Cell(cell.value, cell.low, cell.high, change, difference.p_value)


def _escape(text: str) -> str:
    """Keeps a name with a bar or a line break inside its cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def _null(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
