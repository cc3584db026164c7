"""Logs of training: one JSON line per step, and tables of hypotheses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.core.run_folder import STEPS_FILE, truncate_steps
from nemo_llm_feedback.hypotheses.nbest import NBestBatch


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


class HypothesisLog(pl.Callback):
    """Prints the hypotheses of one utterance with their scores at intervals, and adds them to TensorBoard.

    Args:
        every: optimizer steps between two tables; 0 = never.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Shows the first utterance of the batch when its turn has come."""
        feedback = pl_module.feedback
        nbest = feedback.cache.latest
        if not self._every or (trainer.global_step - 1) % self._every or nbest is None:
            return
        table = nbest_table(nbest, head=feedback.heads[0].name)
        logging.info(f"step {trainer.global_step}, {nbest.utterances[0]}\n{table}")
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("hypotheses", f"```\n{table}\n```", trainer.global_step)


def nbest_table(nbest: NBestBatch, *, head: str, limit: int = 8) -> str:
    """The best members of the first utterance, one per line: reward, its parts, source and text.

    Args:
        nbest: at least one utterance.
        head: the head whose rewards are shown.
        limit: largest number of lines.
    """
    names, members = list(nbest.parts), nbest.hypotheses[0]
    rewards = nbest.rewards[head][0].tolist()
    parts = {name: values[0].tolist() for name, values in nbest.parts.items()}
    order = sorted(range(len(members)), key=[-value for value in rewards].__getitem__)[:limit]
    rows = ["  reward " + " ".join(f"{name:>8}" for name in names) + "  source   text"]
    for n in order:
        values = " ".join(f"{parts[name][n]:8.2f}" for name in names)
        rows.append(f"{rewards[n]:8.2f} {values}  {members[n].source:<8} {members[n].text}")
    return "\n".join(rows)


def _number(value: Any) -> float:
    return float(value.detach().float().mean()) if hasattr(value, "detach") else float(value)
