"""The curve of ``tune``: error over α, a line for each β, beside greedy, oracle and the cross-validated choice."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from nemo_llm_feedback.cli.jobs.tune import Tuned, tuned_text
from nemo_llm_feedback.core.errors import ConfigError

SUFFIXES = (".html", ".svg", ".png", ".pdf")


def check_plot_path(path: str) -> None:
    """Refuses a path that could not be written after minutes of work.

    Raises:
        ConfigError: unknown suffix, or no such folder.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path} must end in one of {', '.join(SUFFIXES)}.")
    if not Path(path).expanduser().absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such folder.")


def write_plot(found: Tuned, path: str) -> None:
    """Draws the curve; ``.html`` is one file with the figure and the printed text in it.

    Args:
        found: with a grid.
        path: ends in one of ``SUFFIXES``.
    """
    figure = _figure(found)
    file = Path(path).expanduser()
    if file.suffix.lower() != ".html":
        figure.savefig(file)
        return
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    file.write_text(_page(svg[svg.index("<svg") :], tuned_text(found)), encoding="utf-8")


def _figure(found: Tuned) -> Any:
    from matplotlib.figure import Figure

    grid = found.grid
    assert grid is not None
    metrics = [m for m in ("wer", "ewer") if math.isfinite(grid.greedy[m])]
    figure = Figure(figsize=(6.2 * len(metrics), 4.4), layout="constrained")
    betas = sorted({beta for _, beta in grid.points})
    alphas = sorted({alpha for alpha, _ in grid.points})
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for n, beta in enumerate(betas):
            shade = str(0.75 - 0.6 * n / max(1, len(betas) - 1))  # darker = larger bonus; readable without colour
            values = [grid.points[alpha, beta][metric] for alpha in alphas]
            axes.plot(alphas, values, marker=".", color=shade, label=f"β = {beta:g}")
        axes.axhline(grid.greedy[metric], linestyle=":", color="tab:red", label="greedy")
        axes.axhline(grid.oracle[metric], linestyle="--", color="tab:green", label="oracle")
        if math.isfinite(grid.cross_validated[metric]):
            axes.plot(
                [found.alpha],
                [grid.cross_validated[metric]],
                marker="D",
                linestyle="none",
                color="tab:blue",
                label=f"chosen (β = {found.beta:g}), cross-validated",
            )
        axes.set_xlabel("α, weight of the LLM")
        axes.set_ylabel(f"{metric.upper()} (%)")
        axes.set_title(f"{metric.upper()} of the best-rewarded member, {grid.rows} utterances")
    axes.legend(fontsize="small")
    return figure


def _page(svg: str, text: str) -> str:
    from html import escape

    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>tune</title>\n'
        "<style>body{font-family:sans-serif;margin:2em}svg{max-width:100%;height:auto}</style></head>\n"
        f"<body>{svg}\n<pre>{escape(text)}</pre></body></html>\n"
    )
