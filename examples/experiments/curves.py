"""Draws how error rates went during training, from runs of the test beds that were made with --curve.

    python examples/experiments/curves.py OUT.png LABEL=RUN_FOLDER …

RUN_FOLDER holds ``steps.jsonl`` and ``result.json`` (``<--out>/runs/<row>_seed<n>/version_0``). One panel per
metric: WER and entity WER of the domain's set, WER of the guard set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from nemo_llm_feedback.core.run_folder import RESULT_FILE, read_steps


def main() -> None:
    """Reads the runs and writes the picture."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("target", type=Path)
    made.add_argument("runs", nargs="+", metavar="LABEL=RUN_FOLDER")
    options = made.parse_args()
    runs = dict(item.rsplit("=", 1) for item in options.runs)
    curves = {label: read_steps(Path(folder) / "steps.jsonl") for label, folder in runs.items()}
    starts = {label: json.loads((Path(f) / RESULT_FILE).read_text())["before"] for label, f in runs.items()}
    keys = [key for line in next(iter(curves.values())) for key in line if key.startswith("val/")]
    names = list(dict.fromkeys(key.split("/")[1] for key in keys))
    panels = [(f"val/{names[0]}/wer", "WER, domain"), (f"val/{names[0]}/ewer", "entity WER, domain")]
    panels += [(f"val/{name}/wer", "WER, guard set") for name in names[1:]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels, strict=True):
        for label, lines in curves.items():
            points = [(0, starts[label][key.split("/")[1]][key.split("/")[2]])]
            points += [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, label=label)
        axis.set(title=f"{title} (%)", xlabel="updates")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.target, dpi=110)
    print(options.target)


if __name__ == "__main__":
    main()
