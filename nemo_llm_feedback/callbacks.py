"""Lightning callbacks: entity metrics beside NeMo's validation, and a table of hypotheses in the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.evaluation import score_rows, transcribe_rows
from nemo_llm_feedback.groups import ScoredGroup
from nemo_llm_feedback.manifests import Row
from nemo_llm_feedback.types import Context

_METRICS = ("wer", "ewer", "entity_recall", "false_alarms")


class EntityValidation(pl.Callback):
    """Logs ``val/<set>/{wer,ewer,entity_recall,false_alarms}`` in % after each of NeMo's validations.

    Args:
        sets: name → rows with text; the target domain first.
        context: of the run, whose terms are the list for false alarms.
        normalizer: name of the text normalisation.
    """

    def __init__(self, sets: Mapping[str, list[Row]], context: Context, normalizer: str) -> None:
        self._sets, self._context, self._normalizer = dict(sets), context, normalizer

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Transcribes every set; on rank 0 only, since no gradient and no collective is involved."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        for name, rows in self._sets.items():
            scores = score_rows(
                rows, transcribe_rows(pl_module, rows), run_context=self._context, normalizer=self._normalizer
            )
            values = {f"val/{name}/{m}": scores.value(m) for m in _METRICS}
            values = {key: value for key, value in values.items() if value == value}
            logging.info(f"step {trainer.global_step}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)


class PlateauStop(pl.Callback):
    """Stops training when the pool's reward has stopped rising; needs no label.

    The policy's expected reward is averaged over each refresh round, since single batches differ by their utterances.

    Args:
        rounds: rounds without a new best mean after which training stops; 0 = never.
        refresh_every: optimizer steps of a round.
    """

    def __init__(self, rounds: int, refresh_every: int) -> None:
        self._rounds, self._refresh_every = rounds, refresh_every
        self._round, self._sum, self._count = 0, 0.0, 0
        self._best, self._since = float("-inf"), 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from."""
        names = ("_round", "_sum", "_count", "_best", "_since")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Adds the step's expected reward and, at the end of a round, compares the mean with the best."""
        reward = trainer.callback_metrics.get("feedback/reward_policy")
        if not self._rounds or reward is None:
            return
        number = max(trainer.global_step - 1, 0) // self._refresh_every
        if number != self._round and self._count:
            mean = self._sum / self._count
            self._since = 0 if mean > self._best else self._since + 1
            self._best = max(self._best, mean)
            self._sum, self._count = 0.0, 0
            if self._since >= self._rounds:
                logging.info(
                    f"stopped: the pool's reward has not risen for {self._rounds} rounds (best {self._best:.2f})."
                )
                trainer.should_stop = True
        self._round = number
        if bool(reward == reward):
            self._sum, self._count = self._sum + float(reward), self._count + 1


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
        if not self._every or trainer.global_step % self._every != 1 or not state.last_groups:
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
