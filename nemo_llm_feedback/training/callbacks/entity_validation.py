"""Logs entity errors and the oracle WER after each of NeMo's validations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import oracle
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.transcribe import propose_rows
from nemo_llm_feedback.training.callbacks.step_log import log_values
from nemo_llm_feedback.training.distributed import shared
from nemo_llm_feedback.training.transcripts import decode_shared

_METRICS = ("wer", "ewer", "entity_recall", "false_alarms")


class EntityValidation(pl.Callback):
    """Logs ``val/<set>/{wer,ewer,entity_recall,false_alarms,oracle_wer}`` in % after each of NeMo's validations.

    The oracle is the best member of the groups that the run's sources propose now for some of the rows: what one round
    of training can reach.

    Args:
        sets: name → rows with text; the target domain first.
    """

    def __init__(self, sets: Mapping[str, list[Row]]) -> None:
        self._sets = dict(sets)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Transcribes every set; each rank does its share of the rows."""
        if trainer.sanity_checking:
            return
        config = pl_module.feedback.config
        context, normalizer = config.context.load(), config.feedback.normalizer
        for name, rows in self._sets.items():
            texts = decode_shared(pl_module, rows, head=config.feedback.heads).texts
            scores = score_rows(rows, texts, run_context=context, normalizer=normalizer)
            values = {f"val/{name}/{m}": scores.value(m) for m in _METRICS}
            values = {key: value for key, value in values.items() if value == value}
            values[f"val/{name}/oracle_wer"] = _oracle_wer(pl_module, rows)
            logging.info(f"step {trainer.global_step}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
            log_values(trainer, values, step=trainer.global_step)


def _oracle_wer(model: Any, rows: list[Row]) -> float:
    """Of as many rows as the pool's statistics come from, evenly spaced."""
    feedback = model.feedback
    config = feedback.config
    some = rows[:: -(-len(rows) // config.feedback.pool_utterances)]
    context, head = config.context.load(), feedback.heads[0].name
    texts = shared(some, lambda rows: propose_rows(model, rows, config.proposals, run_context=context, head=head))
    best = oracle([row.text for row in some], texts, normalize=get_normalizer(config.feedback.normalizer))
    return score_rows(some, best, run_context=Context(), normalizer=config.feedback.normalizer).value("wer")
