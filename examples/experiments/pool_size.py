"""Draws what a row reaches with how much of the pool, from folders of the test beds.

    python examples/experiments/pool_size.py OUT.png 67=FOLDER 134=FOLDER … [--system NAME] [--sets NAME …]

A folder is the ``--out`` of a bed's run with ``--pool-rows`` of that number; of its JSON files those of the sets are
read. The base stands at 0. One panel per set; the domain's, which is the first, has WER and entity WER.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Reads the folders and writes the picture."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("target", type=Path)
    made.add_argument("folders", nargs="+", metavar="ROWS=FOLDER")
    made.add_argument("--system", default="feedback_seed1", help="name in the tables")
    made.add_argument("--sets", nargs="+", default=["barista_dev", "guard_dev", "books_dev"], metavar="NAME")
    made.add_argument("--seed", type=int, default=1, help="of the runs, as in the files' names")
    options = made.parse_args()
    folders = {int(rows): Path(folder) for rows, folder in (item.split("=", 1) for item in options.folders)}
    panels = [(name, "wer", f"WER, {name}") for name in options.sets]
    panels.insert(1, (options.sets[0], "ewer", f"entity WER, {options.sets[0]}"))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.0), constrained_layout=True)
    for axis, (name, metric, title) in zip(axes, panels, strict=True):
        found = points(folders, f"{name}_seed{options.seed}.json", metric=metric, system=options.system)
        values = [value for _, value, _, _ in found]
        bars = [[v - low for _, v, low, _ in found], [high - v for _, v, _, high in found]]
        axis.errorbar([rows for rows, *_ in found], values, yerr=bars, marker="o", capsize=3, linewidth=1.4)
        axis.set(title=f"{title} (%)", xlabel="recordings of the pool", ylim=(0, None))
        axis.grid(alpha=0.3)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.target, dpi=110)
    print(options.target)


def points(folders: dict[int, Path], file: str, *, metric: str, system: str) -> list[tuple[int, float, float, float]]:
    """Rows of the pool, value and 95 % interval of a metric, the base first.

    Args:
        folders: of the runs, by the rows they trained on.
        file: name of the set's JSON file in each.
        metric: `wer` or `ewer`, in %.
        system: name of the row.
    """
    tables: dict[int, dict[str, Any]] = {
        rows: json.loads((folder / file).read_text(encoding="utf-8")) for rows, folder in sorted(folders.items())
    }
    first = next(iter(tables.values()))
    cells = [(0, first["systems"][first["base"]][metric])]
    cells += [(rows, table["systems"][system][metric]) for rows, table in tables.items()]
    return [(rows, cell["value"], cell["low"], cell["high"]) for rows, cell in cells]


if __name__ == "__main__":
    main()
