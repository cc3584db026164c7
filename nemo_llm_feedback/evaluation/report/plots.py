"""Draws the report's training curves with matplotlib, as SVG in the colours of the style sheet."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_llm_feedback.core.run_folder import read_steps
from nemo_llm_feedback.evaluation.report.data import Run

_DRAWING = yaml.safe_load((Path(__file__).parent / "templates" / "plots.yaml").read_text(encoding="utf-8"))
_COLORS: dict[str, str] = _DRAWING["colors"]
_SERIES = [color for name, color in _COLORS.items() if name.startswith("series")]
_MAX_POINTS = 400
_SMOOTHED = 24  # points from which a curve is noise around a mean
_MAX_TICKS = 60
_FAR = 3.0  # a limit this many times beyond the curve's reach would flatten it


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
        limit: the guard's limit to draw, a key of `Run.limits`; of a ratio also its inverse.
    """

    title: str
    note: str
    keys: Mapping[str, str]
    change: bool = False
    rule: float | None = None
    smooth: bool = True
    limit: str = ""


def read_numbers(path: str | Path | None) -> list[dict[str, float]]:
    """The finite numbers of each line of a ``steps.jsonl`` that names its step; none without a file."""
    lines = read_steps(Path(path)) if path is not None else []
    return [
        {k: float(v) for k, v in line.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for line in lines
        if isinstance(line.get("step"), (int, float))
    ]


def curves(steps: Sequence[Mapping[str, float]], run: Run | None = None) -> list[Plot]:
    """One plot for each panel that has values, with the run's kept step, refreshes and limits marked."""
    panels = (Panel(**settings) for settings in _DRAWING["panels"])
    return [plot for panel in panels if (plot := _curve(panel, steps, run or Run())) is not None]


def _curve(panel: Panel, steps: Sequence[Mapping[str, float]], run: Run) -> Plot | None:
    series = _series(panel, steps)
    if not series:
        return None
    # The salt makes the ids differ between the drawings of a page; equal input still gives an equal file.
    with matplotlib.rc_context(_DRAWING["style"] | {"svg.hashsalt": panel.title}):
        figure = Figure()
        axes = figure.add_subplot()
        if panel.rule is not None:
            axes.axhline(panel.rule, color=_COLORS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        for k, (label, (x, y)) in enumerate(series.items()):
            color = _SERIES[(k + 1) % len(_SERIES)]
            if noisy := panel.smooth and len(y) >= _SMOOTHED:
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
            axes.plot(x, _running_mean(y) if noisy else y, color=color, marker="" if noisy else "o", label=label)
        if len(series) > 1 or "" in panel.keys.values():
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(3, len(series)))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        limits = [limit for limit in _limits(panel, run) if _mark_limit(axes, limit)]
        _mark_steps(axes, run, proposals=any(name.startswith("feedback/") for name in panel.keys))
        note = panel.note + " Thin: each step." * any(panel.smooth and len(y) >= _SMOOTHED for _, y in series.values())
        far = [f"{limit:g}" for limit in _limits(panel, run) if limit not in limits]
        return Plot(panel.title, _svg(figure, panel.title), note + f" Limit {' and '.join(far)}." * bool(far))


def _limits(panel: Panel, run: Run) -> list[float]:
    """The values beyond which a guard ends the run; below and above for a quantity that is 1 where nothing changed."""
    limit = run.limits.get(panel.limit)
    return [] if limit is None else [1 / limit, limit] if panel.rule == 1.0 else [limit]


def _mark_limit(axes: Axes, limit: float) -> bool:
    """Draws a limit, unless it is so far away that the curve would be flat."""
    low, high = axes.get_ylim()
    if not low - _FAR * (high - low) <= limit <= high + _FAR * (high - low):
        return False
    axes.axhline(limit, color=_COLORS["bad"], linewidth=1.1, linestyle=(0, (4, 3)))
    return True


def _mark_steps(axes: Axes, run: Run, *, proposals: bool) -> None:
    """Draws a line at the kept step, and ticks where hypotheses are proposed anew."""
    at = axes.get_xaxis_transform()
    if run.kept_step:
        axes.axvline(run.kept_step, color=_COLORS["accent"], linewidth=1.1)
        axes.text(run.kept_step, 1.0, " kept", transform=at, color=_COLORS["accent"], va="top", ha="left", fontsize=9)
    anew = range(run.refresh_every, int(axes.get_xlim()[1]) + 1, run.refresh_every) if run.refresh_every else ()
    if proposals and 0 < len(anew) <= _MAX_TICKS:
        axes.plot(anew, [0.0] * len(anew), "|", transform=at, color=_COLORS["ink"], markersize=9, clip_on=False)


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
    window = np.ones(2 * half + 1)
    total, count = (np.convolve(values, window)[half : half + len(y)] for values in (y, np.ones(len(y))))
    return np.asarray(total / count)


def _svg(figure: Figure, label: str) -> str:
    buffer, unwritten = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=unwritten)
    text = "<svg" + buffer.getvalue().partition("<svg")[2]
    for variable, color in _COLORS.items():
        text = text.replace(color, f"var(--{variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda m: f"{m.group(1)}{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{prefix.replace("-", " ")}" ', 1)
