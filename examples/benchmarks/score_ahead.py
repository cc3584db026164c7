"""What a run gains by ``feedback.score_ahead`` where the reward is waited for, as an LLM behind ``reward=remote`` is.

    python examples/benchmarks/score_ahead.py [--shape small] [--waits 0.5 1 2]

A random CTC model learns from groups that are new in every step. The reward is a function of the texts that first
sleeps, so that this CPU is free for the step beside it. It sleeps for a share of the time that a step takes without
waiting. Prints, for each share, the wall time of the steps ÷ that of the steps without waiting, with the setting off
and on. An epoch's first batch has nothing ahead of it and is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from adapt_step import SHAPES, WORDS, layout
from helpers.fits import LabelReward, config, fit
from helpers.tiny import build_nemo, make_tokenizer, write_manifest
from likelihood_problem import Shape
from nemo.utils import logging as nemo_logging

from nemo_llm_feedback import restore
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput

BATCHES = 5  # of an epoch; the first is not timed


class SlowReward(LabelReward):
    """Sleeps before it answers.

    Args:
        seconds: per call.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
        """The rewards of the groups, later."""
        time.sleep(self._seconds)
        return super().__call__(groups)


class Clock(pl.Callback):
    """Wall time from the end of one step to that of the next, but for an epoch's first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes down what the step took."""
        now = time.perf_counter()
        if batch_idx:
            self.seconds.append(now - self._last)
        self._last = now


def step_seconds(base: Path, manifest: Path, shape: Shape, *, wait: float, ahead: bool, epochs: int = 4) -> float:
    """Median wall time of a step whose reward waits so many seconds."""
    model, clock = restore(base, map_location="cpu"), Clock()
    feedback = {"score_ahead": ahead, "pool_utterances": 1}
    proposals = {"beam": 8, "samples": 0, "max_members": 8}
    settings = config(manifest, lr=1e-9, feedback=feedback, proposals=proposals)
    settings["model"]["train_ds"]["batch_size"] = shape.rows
    model.setup_feedback(settings, reward=SlowReward(wait))
    fit(model, steps=epochs * BATCHES, callbacks=[clock])
    return statistics.median(clock.seconds)


def measure(folder: Path, *, shape: str, waits: list[float]) -> dict[str, dict[str, float]]:
    """Share that the reward waits → off or on → time of a step ÷ that of one without waiting."""
    sizes = SHAPES[shape]
    tokenizer = make_tokenizer(folder / "tokenizer", words=WORDS, size=sizes.vocabulary)
    base = build_nemo("ctc_bpe", folder / "base.nemo", tokenizer_dir=tokenizer, **layout("ctc", sizes))
    manifest = write_manifest(folder / "m.json", [None] * (sizes.rows * BATCHES), seconds=sizes.frames * 0.08)
    free, found = step_seconds(base, manifest, sizes, wait=0.0, ahead=False), {}  # warms up
    for share in waits:
        free = step_seconds(base, manifest, sizes, wait=0.0, ahead=False)  # beside the runs that it is compared with
        timed = {
            name: step_seconds(base, manifest, sizes, wait=share * free, ahead=name == "on") for name in ("off", "on")
        }
        found[f"{share:g}"] = {name: seconds / free for name, seconds in timed.items()}
    return found


def main() -> None:
    """Prints a row per share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=list(SHAPES), help="tiny: to test this script")
    parser.add_argument("--waits", nargs="+", type=float, default=[0.5, 1.0, 2.0], help="of a step's time")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="score_ahead_") as name:
        found = measure(Path(name), shape=options.shape, waits=options.waits)
    print(f"{'the reward waits':>18}{'off':>8}{'on':>8}   (steps)")
    for share, times in found.items():
        print(f"{share:>18}{times['off']:8.2f}{times['on']:8.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
