"""A table of hypotheses in the log."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.hypotheses.groups import ScoredGroup


class HypothesisLog(pl.Callback):
    """Prints one group with its scores at intervals, and adds it to TensorBoard.

    Args:
        every: optimizer steps between two tables; 0 = never.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Shows the first group of the batch when its turn has come."""
        state = pl_module._feedback
        if not self._every or (trainer.global_step - 1) % self._every or not state.last_groups:
            return
        table = group_table(state.last_groups[0], head=state.heads[0].name)
        logging.info(f"step {trainer.global_step}, {state.last_groups[0].group.utterance}\n{table}")
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("hypotheses", f"```\n{table}\n```", trainer.global_step)


def group_table(scored: ScoredGroup, *, head: str, limit: int = 8) -> str:
    """The best members of a group, one a line: reward, its parts, source and text.

    Args:
        scored: the group.
        head: whose rewards to show.
        limit: largest number of lines.
    """
    names = list(scored.parts)
    order = sorted(range(len(scored.group)), key=lambda n: -scored.rewards[head][n])[:limit]
    rows = ["  reward " + " ".join(f"{name:>8}" for name in names) + "  source   text"]
    for n in order:
        hypothesis = scored.group.hypotheses[n]
        parts = " ".join(f"{scored.parts[name][n]:8.2f}" for name in names)
        rows.append(f"{scored.rewards[head][n]:8.2f} {parts}  {hypothesis.source:<8} {hypothesis.text}")
    return "\n".join(rows)
