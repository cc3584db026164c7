"""Entity metrics beside NeMo's validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import oracle
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.transcribe import propose_rows, transcribe_rows

_METRICS = ("wer", "ewer", "entity_recall", "false_alarms")


class EntityValidation(pl.Callback):
    """Logs ``val/<set>/{wer,ewer,entity_recall,false_alarms,oracle_wer}`` in % after each of NeMo's validations.

    The oracle is the best member of the groups that the run's sources propose now for some of the rows: what one round
    of training can reach.

    Args:
        sets: name → rows with text; the target domain first.
        config: of the run: terms, text normalisation and sources.
    """

    def __init__(self, sets: Mapping[str, list[Row]], config: RunConfig) -> None:
        self._sets, self._config, self._context = dict(sets), config, config.context.load()
        self._normalizer = config.feedback.normalizer

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Transcribes every set; on rank 0 only, since no gradient and no collective is involved."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        for name, rows in self._sets.items():
            scores = score_rows(
                rows, transcribe_rows(pl_module, rows), run_context=self._context, normalizer=self._normalizer
            )
            values = {f"val/{name}/{m}": scores.value(m) for m in _METRICS}
            values = {key: value for key, value in values.items() if value == value}
            values[f"val/{name}/oracle_wer"] = self._oracle_wer(pl_module, rows)
            logging.info(f"step {trainer.global_step}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def _oracle_wer(self, model: Any, rows: list[Row]) -> float:
        """Of as many rows as the survey looks at, evenly spaced."""
        state = model._feedback
        weight = state.maker.proposer.boosting_weight
        some = rows[:: -(-len(rows) // self._config.feedback.pool_utterances)]
        proposals = dataclasses.replace(self._config.proposals, boosting_weight=weight)
        texts = propose_rows(model, some, proposals, run_context=self._context, head=state.heads[0].name)
        return oracle([row.text for row in some], texts, normalize=get_normalizer(self._normalizer)).wer
