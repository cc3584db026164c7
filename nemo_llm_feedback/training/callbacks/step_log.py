"""The run folder's log of training: one JSON line per step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_llm_feedback.core.run_folder import STEPS_FILE, truncate_steps


class StepLog(pl.Callback):
    """Appends to ``steps.jsonl``: a line for every optimizer step, and one for every other set of values logged.

    A step's line holds ``step``, ``seconds`` of training up to here (over all attempts of a resumed run), ``lr`` and
    what the step logged (``train_loss``, ``feedback/*``); a later line of the same ``step`` holds what validation
    (``val/<set>/wer`` …) or held-out utterances gave. Numbers that are not finite are left out. Every line
    is flushed, so a killed run loses none but the one it was writing; a resumed run removes the lines behind its
    checkpoint, which it is about to write again.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / STEPS_FILE
        self._seconds, self._since = 0.0, time.monotonic()
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Removes the lines behind the step at which this attempt starts."""
        self._last_step = trainer.global_step
        self._since = time.monotonic()
        if trainer.is_global_zero:
            self._seconds = truncate_steps(self._path, step=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Writes the line of the step that the batch has completed."""
        step = trainer.global_step
        if step == self._last_step or not trainer.is_global_zero:
            return  # its gradients are still being accumulated
        self._last_step = step
        values = {name: _number(value) for name, value in trainer.callback_metrics.items()}
        logged = {k: v for k, v in values.items() if k.startswith("feedback/") or k == "train_loss"}
        lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else math.nan
        seconds = self._seconds + time.monotonic() - self._since
        self.write(step, {"seconds": round(seconds, 3), "lr": lr, **logged})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line.

        Args:
            step: optimizer steps so far.
            values: name → number or text.
        """
        kept = {k: v for k, v in values.items() if not (isinstance(v, float) and not math.isfinite(v))}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **kept}) + "\n")


def log_values(trainer: pl.Trainer, values: Mapping[str, float], *, step: int) -> None:
    """Gives what a callback measured to the trainer's loggers and to the step log.

    Args:
        trainer: the run's trainer.
        values: name → number.
        step: optimizer steps so far.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    for callback in trainer.callbacks:
        if isinstance(callback, StepLog) and trainer.is_global_zero:
            callback.write(step, {name: float(value) for name, value in values.items()})


def _number(value: Any) -> float:
    return float(value.detach().float().mean()) if hasattr(value, "detach") else float(value)
