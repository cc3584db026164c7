"""Labelled RL against NeMo's own loss: the same labelled rows, updates, batches and seeds; held-out word error rate.

    python examples/experiments/labelled_rl.py DATA CHECKPOINT OUT [--rows nemo mwer …] [--rates 1e-4 3e-4] [--seeds 1]

240 rows of DATA/source/speechocean762.json are learned (short sentences by L2 speakers, which the shared base models
have read in their own training); 60 rows of other speakers are the dev set that chooses the rate, DATA/guard/accented
(148 sentences, speakers that no model has heard) is what a table reports. Writes OUT/runs.csv, one line a run, and
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

from bed import read_rows, write_rows

UPDATES, BATCH, ROWS_LEARNED, ROWS_DEV = 30, 8, 240, 60
REWARD = ["reward=wer", "proposals.boosted=0", "proposals.term_swap=0"]
# Fixed before the first run. Both kinds learn under SpecAugment; groups are made anew every third of the run.
ROWS = {
    "nemo": ["objective=self_training", "feedback.labelled=supervised", "feedback.weight=0"],
    "mwer": ["objective=mwer", *REWARD],
    "grpo": ["objective=grpo", *REWARD],
    "gspo": ["objective=gspo", *REWARD],
    "distill": ["objective=distill", *REWARD],
}


def main() -> None:
    """Runs what OUT/runs.csv lacks."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--rows", nargs="+", default=["nemo", "mwer"], choices=list(ROWS))
    made.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4])
    made.add_argument("--seeds", nargs="+", type=int, default=[1])
    options = made.parse_args()
    table = options.out / "runs.csv"
    learned, dev = manifests(options.data, options.out)
    done = list(csv.DictReader(table.open(encoding="utf-8"))) if table.is_file() else []
    known = {(line["row"], float(line["rate"]), int(line["seed"])) for line in done}
    for seed in options.seeds:
        for row in options.rows:
            for rate in options.rates:
                if (row, rate, seed) not in known:
                    done.append(
                        {"row": row, "rate": rate, "seed": seed, **run(options, row, rate, seed, learned, dev)}
                    )
                    with table.open("w", newline="", encoding="utf-8") as file:
                        writer = csv.DictWriter(file, fieldnames=list(done[0]))
                        writer.writeheader()
                        writer.writerows(done)
                    print(done[-1], flush=True)


def manifests(data: Path, out: Path) -> tuple[Path, Path]:
    """Rows that are learned and rows that choose, of different speakers, each spread evenly over the corpus."""
    rows = read_rows(data / "source" / "speechocean762.json")
    speakers = sorted({row["speaker"] for row in rows})
    chosen = set(speakers[::5])
    found = []
    for name, most, ours in (("learned", ROWS_LEARNED, False), ("dev", ROWS_DEV, True)):
        part = [row for row in rows if (row["speaker"] in chosen) == ours]
        part = [part[i * len(part) // most] for i in range(most)]
        write_rows(out / f"{name}.json", [(data / "source", row) for row in part])
        found.append(out / f"{name}.json")
    return found[0], found[1]


def run(
    options: argparse.Namespace, row: str, rate: float, seed: int, learned: Path, dev: Path
) -> dict[str, float | int]:
    """One run's WER before and after, in %."""
    from nemo_llm_feedback.cli.api import adapt

    started, held_out = time.monotonic(), options.data / "guard" / "accented.json"
    result: Any = adapt(
        options.checkpoint,
        learned,
        validation=[dev, held_out],
        max_steps=UPDATES,
        overrides=[
            *("trainer=cpu", "+trainer.enable_progress_bar=false", f"seed={seed}", f"model.optim.lr={rate}"),
            "model.optim.sched.warmup_steps=5",
            *(f"model.train_ds.batch_size={BATCH}", f"feedback.refresh_every={UPDATES // 3}", "guards.every=0"),
            *(
                "feedback.pool_utterances=16",
                "feedback.log_hypotheses_every=0",
                f"trainer.val_check_interval={UPDATES}",
            ),
            *(f"exp_manager.exp_dir={options.out / 'runs'}", f"name={row}_{rate:g}_{seed}", *ROWS[row]),
        ],
    )
    found: dict[str, float | int] = {}
    for name, stem in (("dev", dev.stem), ("held_out", held_out.stem)):
        found[f"{name}_before"] = round(result.before[stem].value("wer"), 2)
        found[f"{name}_after"] = round(result.after[stem].value("wer"), 2)
    return {**found, "minutes": round((time.monotonic() - started) / 60, 1)}


if __name__ == "__main__":
    main()
