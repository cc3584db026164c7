"""What TensorBoard and W&B show of a run: ten scalars on top, the others under ``detail/``, and N-best tables."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from nemo.utils import logging

from nemo_llm_feedback.hypotheses.nbest import NBestBatch

# A metric's name, in full → the name under which a logger shows it; sorted before ``detail``.
_TOP = {
    r"held_out/gain": "adapt/held_out_gain",
    r"held_out/kl": "adapt/held_out_kl",
    r"held_out/length_ratio": "adapt/length_ratio",
    r"held_out/wer_rise": "adapt/general_wer_rise",
    r"feedback/reward_policy": "adapt/reward",
    r"feedback/reward_gain": "adapt/reward_gain",
    r"feedback/kl_reference": "adapt/kl",
    r"val/(.+)/(e?wer)": r"adapt/\2/\1",
    r"lr": "adapt/lr",
}


def shown_name(name: str) -> str:
    """The name under which loggers show a metric: ``adapt/…`` for the ten that matter, else ``detail/<name>``."""
    found = (re.sub(pattern, top, name) for pattern, top in _TOP.items() if re.fullmatch(pattern, name))
    return next(found, f"detail/{name}")


class ScalarNames(pl.Callback):
    """Makes the trainer's loggers show metrics by `shown_name`, and the learning rate beside each step's metrics.

    Lightning, NeMo and callbacks all log by their loggers' ``log_metrics``, so that it is replaced there; the step log
    and the checkpoints keep the names that the metrics have.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Replaces ``log_metrics`` of each logger, once."""
        for logger in trainer.loggers:
            if not isinstance(logger.log_metrics, functools.partial):
                logger.log_metrics = functools.partial(_log, trainer, logger.log_metrics)


def _log(trainer: pl.Trainer, log: Callable[..., None], metrics: Mapping[str, Any], step: int | None = None) -> None:
    rate = {}
    if trainer.optimizers and any(name.startswith("feedback/") for name in metrics):
        rate = {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
    log({shown_name(name): value for name, value in {**metrics, **rate}.items()}, step=step)


class HypothesisLog(pl.Callback):
    """Shows the hypotheses with their scores at intervals: those of one utterance in the log, all of the batch in
    TensorBoard, W&B and ``hypotheses/step_<n>.parquet`` of the run folder.

    Args:
        every: optimizer steps between two tables; 0 = never.
        folder: the run's folder.
    """

    def __init__(self, every: int, folder: Path) -> None:
        self._every, self._folder, self._last_step = every, folder / "hypotheses", 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Shows the batch when its turn has come."""
        feedback, step = pl_module.feedback, trainer.global_step
        nbest = feedback.cache.latest
        if not trainer.is_global_zero or step == self._last_step or nbest is None:
            return
        self._last_step = step
        if not self._every or (step - 1) % self._every:
            return
        frame = nbest_frame(nbest, head=feedback.heads[0].name)
        first = frame[frame.utterance == nbest.utterances[0]].drop(columns="utterance").head(8)
        logging.info(f"step {step}, {nbest.utterances[0]}\n{_text(first)}")
        self._folder.mkdir(exist_ok=True)
        frame.to_parquet(self._folder / f"step_{step:06d}.parquet", index=False)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # W&B's
                logger.log_table("hypotheses", dataframe=frame, step=step)
            elif hasattr(logger.experiment, "add_text"):  # TensorBoard's
                logger.experiment.add_text("hypotheses", f"```\n{_text(frame)}\n```", step)


def nbest_frame(nbest: NBestBatch, *, head: str) -> pd.DataFrame:
    """One row per member, the utterances in their order, the best member of each first.

    Args:
        nbest: at least one utterance.
        head: the head whose rewards are shown.

    Returns:
        Columns ``utterance``, ``reward``, the reward's parts, ``source`` and ``text``; NaN = cannot judge.
    """
    values = {"reward": nbest.rewards[head], **nbest.parts}
    rows: list[dict[str, Any]] = []
    for b, (utterance, members) in enumerate(zip(nbest.utterances, nbest.hypotheses, strict=True)):
        scores = [{name: float(tensor[b, n]) for name, tensor in values.items()} for n in range(len(members))]
        found = [
            {"utterance": utterance, **parts, "source": h.source, "text": h.text}
            for h, parts in zip(members, scores, strict=True)
        ]
        rows += sorted(found, key=lambda row: (math.isnan(row["reward"]), -row["reward"]))
    return pd.DataFrame(rows)


def _text(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False, float_format="{:.2f}".format)
