"""Labelled RL against NeMo's own loss: the same labelled rows, updates, batches and seeds; held-out word error rate.

    python examples/experiments/labelled_rl.py DATA CHECKPOINT OUT [--rows nemo mwer …] [--rates 1e-4 3e-4] [--seeds 1]

Sentences that the checkpoint has never read: 240 spoken requests to a hospital's stock room (invented_names/, needs
flite), drawn by a seed of their own. Minimum word error rate training refines a model that NeMo's own loss has taught,
so each seed starts with 150 updates of that loss; every row goes on from there with 60 more. The dev set (90
requests) chooses the rate; a table reports the test set (150), the same in a voice that no model has heard, and
everyday commands. Writes OUT/runs.csv, one line per run, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

from invented import make_data

TAUGHT, UPDATES, BATCH, RATE_TAUGHT = 150, 60, 8, 1e-3
SEED = 52361  # of the sentences
SIZES = {"pool": 240, "dev": 90, "test": 150, "test_unseen_voice": 90, "general_dev": 60, "general": 150}
SETS = ("dev", "test", "test_unseen_voice", "general")
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
    make_data(options.data, options.out / "data", seed=SEED, sizes=SIZES)
    done = list(csv.DictReader(table.open(encoding="utf-8"))) if table.is_file() else []
    known = {(line["row"], float(line["rate"]), int(line["seed"])) for line in done}
    for seed in options.seeds:
        start = options.out / f"taught_{seed}.nemo"
        if not start.is_file():
            learn(options, "nemo", RATE_TAUGHT, seed, base=options.checkpoint, updates=TAUGHT, output=start)
        for row in options.rows:
            for rate in options.rates:
                if (row, rate, seed) not in known:
                    found = learn(options, row, rate, seed, base=start, updates=UPDATES)
                    done.append({"row": row, "rate": rate, "seed": seed, **found})
                    with table.open("w", newline="", encoding="utf-8") as file:
                        writer = csv.DictWriter(file, fieldnames=list(done[0]))
                        writer.writeheader()
                        writer.writerows(done)
                    print(done[-1], flush=True)


def learn(
    options: argparse.Namespace,
    row: str,
    rate: float,
    seed: int,
    *,
    base: Path,
    updates: int,
    output: Path | None = None,
) -> dict[str, float | int]:
    """One run's WER before and after on every set, in %."""
    from nemo_llm_feedback.cli.api import adapt

    started, data = time.monotonic(), options.out / "data"
    result: Any = adapt(
        base,
        data / "pool_labels.json",
        validation=[data / f"{name}.json" for name in SETS],
        max_steps=updates,
        output=output,
        overrides=[
            *("trainer=cpu", "+trainer.enable_progress_bar=false", f"seed={seed}", f"model.optim.lr={rate}"),
            *("model.optim.sched.warmup_steps=5", f"model.train_ds.batch_size={BATCH}"),
            *(f"feedback.refresh_every={max(1, updates // 3)}", "feedback.pool_utterances=16"),
            *("feedback.log_hypotheses_every=0", "guards.every=0", f"trainer.val_check_interval={updates}"),
            *(f"exp_manager.exp_dir={options.out / 'runs'}", f"name={row}_{rate:g}_{seed}_{updates}", *ROWS[row]),
        ],
    )
    found: dict[str, float | int] = {}
    for name in SETS:
        found[f"{name}_before"] = round(result.before[name].value("wer"), 2)
        found[f"{name}_after"] = round(result.after[name].value("wer"), 2)
    return {**found, "minutes": round((time.monotonic() - started) / 60, 1)}


if __name__ == "__main__":
    main()
