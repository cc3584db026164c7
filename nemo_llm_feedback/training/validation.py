"""Entity metrics beside NeMo's validation."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.evaluation import score_rows, transcribe_rows
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
