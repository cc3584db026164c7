"""Draws the report's bars and training curves with matplotlib, as SVG in the colours of the style sheet."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_llm_feedback.core.run_folder import read_steps
from nemo_llm_feedback.evaluation.metrics import find_metric
from nemo_llm_feedback.evaluation.tables import ScoreTable

# matplotlib needs real colours: each is replaced in the SVG by a variable of the style sheet.
_INK, _MUTED, _LINE, _ACCENT = "#010203", "#040506", "#070809", "#0a0b0c"
_SERIES = ("#0d0e0f", "#101112", "#131415", "#161718", "#191a1b", "#1c1d1e")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _ACCENT: "accent"} | {
    color: f"series-{k}" for k, color in enumerate(_SERIES)
}
# Beside these a salt for the ids, which must differ between the drawings of a page: equal input gives an equal file.
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # real text, in the page's font
    "text.parse_math": False,  # a system may be called $x$
    "font.size": 10.5,
    "font.family": "sans-serif",
}
_WIDTH = 4.0
_MAX_POINTS = 400
_SMOOTHED = 24  # points from which a curve is noise around a mean


@dataclass(frozen=True)
class Plot:
    """A drawing with its heading and the sentence below it."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart of the training curves.

    Attributes:
        title, note: heading and explanation.
        keys: regular expression of a metric's name → label in the legend; "" = what the expression's group matches.
        change: draw the change since the first (smoothed) value, so that series of different size share an axis.
        rule: a horizontal line, e.g. 1 for a ratio.
        smooth: draw the running mean over the raw values, where there are many.
    """

    title: str
    note: str
    keys: Mapping[str, str]
    change: bool = False
    rule: float | None = None
    smooth: bool = True


_PANELS = Path(__file__).parent / "templates" / "panels.yaml"


def read_numbers(path: str | Path | None) -> list[dict[str, float]]:
    """The finite numbers of each line of a ``steps.jsonl`` that names its step; none without a file."""
    lines = read_steps(Path(path)) if path is not None else []
    return [
        {k: float(v) for k, v in line.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for line in lines
        if isinstance(line.get("step"), (int, float))
    ]


def curves(steps: Sequence[Mapping[str, float]]) -> list[Plot]:
    """One plot for each panel that has values."""
    panels = (Panel(**settings) for settings in yaml.safe_load(_PANELS.read_text(encoding="utf-8")))
    return [plot for panel in panels if (plot := _curve(panel, steps)) is not None]


def bars(metric: str, table: ScoreTable) -> Plot:
    """Horizontal bars of one metric by system, with 95 % intervals; undefined values have no bar.

    Args:
        metric: a key of `metrics.METRICS`, one of the table's.
        table: systems × metrics.
    """
    m = find_metric(metric)
    cells = {system: row[table.metrics.index(metric)] for system, row in table.rows.items()}
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"bars {metric}"}):
        figure = Figure(figsize=(_WIDTH, 0.5 + 0.4 * len(cells)), layout="constrained")
        axes = figure.add_subplot()
        top = max([c.high for c in cells.values() if c.high > 0] or [1.0])
        for y, cell in enumerate(cells.values()):
            if math.isnan(cell.value):
                continue
            axes.barh(y, cell.value, height=0.62, color=_SERIES[y % len(_SERIES)], alpha=0.9)
            axes.plot([cell.low, cell.high], [y, y], color=_INK, linewidth=1.2, solid_capstyle="butt")
            axes.text(max(cell.high, cell.value) + top * 0.03, y, f"{cell.value:.1f}", va="center", color=_INK)
        axes.set_yticks(range(len(cells)), [n if len(n) <= 18 else f"{n[:9]}…{n[-8:]}" for n in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.set_xlim(0, top * 1.18)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        _frame(axes, grid="x")
        direction = "higher is better" if m.higher_is_better else "lower is better"
        return Plot(m.title, _svg(figure, f"{m.title} by system"), f"{m.unit}, {direction}")


def _curve(panel: Panel, steps: Sequence[Mapping[str, float]]) -> Plot | None:
    series = _series(panel, steps)
    if not series:
        return None
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": panel.title}):
        figure = Figure(figsize=(_WIDTH, 2.4), layout="constrained")
        axes = figure.add_subplot()
        if panel.rule is not None:
            axes.axhline(panel.rule, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for k, (label, (x, y)) in enumerate(series.items()):
            color = _SERIES[(k + 1) % len(_SERIES)]
            if panel.smooth and len(y) >= _SMOOTHED:
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
                axes.plot(x, _running_mean(y), color=color, linewidth=1.8, label=label)
            else:
                axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.2, label=label)
        if len(series) > 1 or "" in panel.keys.values():
            axes.legend(frameon=False, loc="best", labelcolor=_INK, handlelength=1.4, borderaxespad=0.2)
        axes.set_xlabel("step", color=_MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.02, y=0.12)
        _frame(axes, grid="y")
        thin = panel.smooth and any(len(y) >= _SMOOTHED for _, y in series.values())
        return Plot(panel.title, _svg(figure, panel.title), panel.note + " Thin: each step." * thin)


def _series(panel: Panel, steps: Sequence[Mapping[str, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label → ([S] steps, [S] values), thinned to what a small drawing can show."""
    names = list(dict.fromkeys(name for step in steps for name in step))
    out = {}
    for pattern, label in panel.keys.items():
        for name in names:
            match = re.fullmatch(pattern, name)
            points = [(step["step"], step[name]) for step in steps if name in step] if match else []
            if match and points:
                x, y = np.array(points[:: max(1, len(points) // _MAX_POINTS)]).T
                out[label or match.group(1)] = (x, y - _running_mean(y)[0] if panel.change else y)
    return out


def _running_mean(y: np.ndarray) -> np.ndarray:
    """[S] mean over a window of a twelfth of the curve around each point, narrower at the ends."""
    half = max(1, len(y) // 24)
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return np.asarray((total[high] - total[low]) / (high - low))


def _frame(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_LINE)
    axes.tick_params(colors=_MUTED, length=0)
    for label in axes.get_yticklabels() if grid == "x" else ():
        label.set_color(_INK)
    axes.grid(axis=grid, color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)


def _svg(figure: Figure, label: str) -> str:
    buffer, unwritten = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unwritten)
    text = "<svg" + buffer.getvalue().partition("<svg")[2]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda m: f"{m.group(1)}{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{prefix.replace("-", " ")}" ', 1)
