"""Draws WER and entity WER of a results table as bars with their 95 % intervals.

    python examples/experiments/bars.py docs/results/barista_smollm2_test.csv TARGET.png "LABEL=SYSTEM" …

SYSTEM is a row's name in the CSV file's first column, LABEL how the picture calls it.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Draws what is named, top to bottom."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("table", type=Path)
    made.add_argument("target", type=Path)
    made.add_argument("rows", nargs="+", metavar="LABEL=SYSTEM")
    made.add_argument("--of", default="140 test orders", help="what the errors were counted on")
    options = made.parse_args()
    with options.table.open(encoding="utf-8", newline="") as file:
        known = {next(iter(row.values())): row for row in csv.DictReader(file)}
    labels, systems = zip(*(item.split("=", 1) for item in options.rows), strict=True)
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.55 * len(labels)), constrained_layout=True)
    for k, (metric, name, colour) in enumerate((("WER", "WER", "#9bb8b4"), ("EWER", "entity WER", "#00897b"))):
        values = [tuple(map(float, re.findall(r"[\d.]+", known[system][metric]))) for system in systems]
        places = [i + (k - 0.5) * 0.38 for i in range(len(labels))]
        spans = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
        axes.barh(places, [v for v, _, _ in values], 0.36, xerr=spans, label=name, color=colour, ecolor="#444444")
    axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel=f"errors on {options.of}, %, with 95 % intervals")
    axes.invert_yaxis()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.target, dpi=110)


if __name__ == "__main__":
    main()
