"""Greedy transcripts of many rows, of which every rank makes its share: before, within and after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.transcribe import Decoded, decode_rows, score_sets
from nemo_llm_feedback.training.distributed import shared

Sets = Mapping[str, Sequence[Row]]


def decode_shared(
    model: Any,
    rows: Sequence[Row],
    *,
    head: str = "auto",
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Decoded:
    """:func:`decode_rows`, of which every rank does its share and gets all; without the speed.

    Args:
        model, rows, head, batch_size: as there.
        on_batch: called with the number of rows of this rank's share that are done.
    """

    def work(mine: Sequence[Row]) -> list[tuple[Any, str]]:
        """Labels and text of each row."""
        found = decode_rows(model, mine, head=head, batch_size=batch_size, on_batch=on_batch)
        return list(zip(found.labels, found.texts, strict=True))

    found = shared(rows, work)
    return Decoded(tuple(labels for labels, _ in found), tuple(text for _, text in found), ())


def transcribed(
    model: Any, sets: Sets, pool: Sequence[Row], config: RunConfig, *, batch_size: int
) -> tuple[dict[str, CorpusScores], Decoded]:
    """Scores of sets with text, and what the model makes of some other rows; every rank must call this.

    Args:
        model: on its device.
        sets: name → rows with text.
        pool: the other rows.
        config: names head, context and text normalisation.
        batch_size: rows per batch of the sets.
    """
    scores = score_sets(model, sets, config, batch_size=batch_size, decode=decode_shared)
    return scores, decode_shared(model, pool, head=config.feedback.heads)


class StartTranscripts(pl.Callback):
    """Transcribes with the starting model once the ranks have found each other, so that they share the rows.

    Args:
        sets, pool, config, batch_size: as in :func:`transcribed`.

    Attributes:
        found: what that gave.
    """

    found: tuple[dict[str, CorpusScores], Decoded]

    def __init__(self, sets: Sets, pool: Sequence[Row], config: RunConfig, *, batch_size: int) -> None:
        self._given, self._batch_size = (sets, pool, config), batch_size

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Lightning has neither placed the model yet nor given it the weights of a checkpoint."""
        pl_module.to(trainer.strategy.root_device)
        self.found = transcribed(pl_module, *self._given, batch_size=self._batch_size)
