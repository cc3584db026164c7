"""Runs a model's encoder over manifest rows in batches, without gradient: for transcripts and N-best lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.errors import DecodingError, FeedbackError
from nemo_llm_feedback.core.types import Audio, Context
from nemo_llm_feedback.data.audio import by_duration, load_audio
from nemo_llm_feedback.data.manifests import Row

T = TypeVar("T")


@torch.no_grad()
def encoded_rows(
    model: Any, rows: Sequence[Row], *, batch_size: int = 16, run_context: Context | None = None
) -> Iterator[tuple[tuple[int, ...], Audio, Tensor, Tensor]]:
    """Encodes rows in batches of similar duration; the model is in evaluation mode until the last batch is taken.

    Args:
        model: a NeMo CTC, transducer or hybrid model.
        rows: manifest rows, not tarred.
        batch_size: rows per batch.
        run_context: merged under each row's context.

    Yields:
        Positions among the rows, their audio, [B, D, T] encoder output and [B] frames.
    """
    with evaluation_mode(model):
        for indices in by_duration(rows, batch_size):
            yield indices, *_encoded(model, [rows[i] for i in indices], run_context)


@torch.no_grad()
def map_rows(
    model: Any,
    rows: Sequence[Row],
    work: Callable[[Audio, Tensor, Tensor], Sequence[T]],
    *,
    batch_size: int = 16,
    run_context: Context | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
    failures: dict[int, str] | None = None,
) -> list[T | None]:
    """Encodes rows as :func:`encoded_rows` and applies a function to each batch; one result per row, in their order.

    Args:
        model, rows, batch_size, run_context: as in :func:`encoded_rows`.
        work: audio, [B, D, T] encoder output, [B] frames → one result per row.
        on_batch: receives the number of rows done.
        failures: filled with row → reason; a batch that fails is done again row by row, and a row that fails alone has
            the result None. None = the first failure is raised.

    Raises:
        FeedbackError: what would fail on every row, such as a missing context; with or without ``failures``.
    """
    results: list[T | None] = [None] * len(rows)

    def _attempt(indices: Sequence[int]) -> str | None:
        """Works on the rows of a batch; returns why it failed, or None."""
        try:
            found = work(*_encoded(model, [rows[i] for i in indices], run_context))
        except Exception as error:  # audio libraries and models raise anything
            if failures is None or (isinstance(error, FeedbackError) and not isinstance(error, DecodingError)):
                raise
            message = (str(error).strip().splitlines() or ["no message"])[0][:200]
            return message if isinstance(error, DecodingError) else f"{type(error).__name__}: {message}"
        for i, result in zip(indices, found, strict=True):
            results[i] = result
        return None

    done = 0
    with evaluation_mode(model):
        for indices in by_duration(rows, batch_size):
            if _attempt(indices) is not None and failures is not None:
                failures.update({i: reason for i in indices if (reason := _attempt([i])) is not None})
            done += len(indices)
            on_batch(done)
    return results


def _encoded(model: Any, rows: Sequence[Row], run_context: Context | None) -> tuple[Audio, Tensor, Tensor]:
    """The audio of some rows, [B, D, T] encoder output and [B] frames."""
    rate = int(model.cfg.preprocessor.sample_rate)
    audio = load_audio(rows, sample_rate=rate, device=model.device, run_context=run_context)
    return audio, *encode(model, audio.signal, audio.signal_len)
