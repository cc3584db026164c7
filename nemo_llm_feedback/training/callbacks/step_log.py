"""One JSON line a step, for eyes and scripts that want no TensorBoard."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemo_llm_feedback.core.run_folder import STEPS_FILE, truncate_steps


class StepLog(pl.Callback):
    """Appends to ``steps.jsonl``: a line for every optimizer step, and one for every other set of values logged.

    A step's line holds ``step``, ``seconds`` of training up to here (over all attempts of a resumed run), ``lr`` and
    what the step logged (``train_loss``, ``feedback/*``); a later line of the same ``step`` holds what validation
    (``val/<set>/wer`` …) or a look at held-out utterances found. Numbers that are not finite are left out. Every line
    is flushed, so a killed run loses none but the one it was writing; a resumed run removes the lines behind its
    checkpoint, which it is about to write again.

    Args:
        folder: of the run.
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
        own = {k: v for k, v in values.items() if k.startswith("feedback/") or k == "train_loss"}
        lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else math.nan
        seconds = self._seconds + time.monotonic() - self._since
        self.write(step, {"seconds": round(seconds, 3), "lr": lr, **own})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line.

        Args:
            step: optimizer steps so far.
            values: name → number or text.
        """
        kept = {k: v for k, v in values.items() if not (isinstance(v, float) and not math.isfinite(v))}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **kept}) + "\n")


class StepLogger(pl.loggers.Logger):
    """Hands what callbacks log (validation, looks) to the step log; what steps log comes to it by itself.

    Args:
        log: of the run.
    """

    def __init__(self, log: StepLog) -> None:
        super().__init__()
        self._log = log

    @property
    def name(self) -> str:
        """Of the logger."""
        return "steps"

    @property
    def version(self) -> str:
        """There is one a run."""
        return ""

    @property
    def experiment(self) -> StepLog:
        """What writes the lines."""
        return self._log

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Settings are in ``settings.yaml``."""

    @pl.utilities.rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes a line of what is validation's or a look's."""
        own = {k: _number(v) for k, v in metrics.items() if k.split("/", 1)[0] in ("val", "held_out")}
        if own and step is not None:
            self._log.write(step, own)


def _number(value: Any) -> float:
    return float(value.detach().float().mean()) if hasattr(value, "detach") else float(value)
