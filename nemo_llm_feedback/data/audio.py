"""Reads the audio of manifest rows into padded batches, and mixes the channels of a file to one, here and in NeMo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from nemo_llm_feedback.core.errors import ConfigError, DecodingError
from nemo_llm_feedback.core.types import Audio, Context
from nemo_llm_feedback.data.manifests import Row, merge_context

CHANNELS = "average"
"""NeMo's ``channel_selector`` for files with several channels; without it NeMo's readers return all channels."""


def select_channels(config: DictConfig) -> None:
    """Makes NeMo's loader of a data section mix channels; see also :func:`mix_channels`.

    Args:
        config: ``train_ds`` or ``validation_ds``; changed, but a channel that the user chose stays.
    """
    with open_dict(config):
        if config.get("use_lhotse"):
            if config.get("channel_selector") == CHANNELS:
                config.channel_selector = None  # a number or a key of the manifest in Lhotse, which cannot average
        elif config.get("channel_selector") is None:
            config.channel_selector = CHANNELS


def mix_channels(loaders: Any) -> None:
    """Makes Lhotse loaders mix channels, which they otherwise do only in batches that hold mono files as well.

    Args:
        loaders: NeMo's data loader, or a list of them; classic ones are left as they are.
    """
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        while (dataset := getattr(loader, "dataset", None)) is not None:
            if hasattr(dataset, "load_audio"):
                dataset.load_audio.mono_downmix = True
            loader = dataset


def by_duration(rows: Sequence[Row], batch_size: int) -> list[tuple[int, ...]]:
    """Positions of the rows in batches of similar duration, the shortest first.

    Raises:
        ConfigError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, got {batch_size}.")
    order = sorted(range(len(rows)), key=lambda i: rows[i].duration)
    return [tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def load_audio(
    rows: Sequence[Row], *, sample_rate: int, device: torch.device, run_context: Context | None = None
) -> Audio:
    """Loads the audio of some rows as one batch.

    Args:
        rows: manifest rows, not tarred.
        sample_rate: the model's sample rate, Hz.
        device: where the signals go.
        run_context: merged under each row's context.

    Returns:
        Signals [B, S] padded to the longest, in the rows' order, with names and contexts.

    Raises:
        DecodingError: a file cannot be read, or holds nothing at the row's place.
    """
    from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

    samples = []
    for row in rows:
        try:
            place = {"offset": row.offset, "duration": row.duration}
            segment = AudioSegment.from_file(row.audio, target_sr=sample_rate, channel_selector=CHANNELS, **place)
        except Exception as error:  # audio libraries raise anything
            raise DecodingError(f"{row.audio} cannot be read ({type(error).__name__}: {error}).") from error
        if len(segment.samples) == 0:
            raise DecodingError(f"{row.audio}: there is no audio at this place of the file ({row.offset} s).")
        samples.append(torch.tensor(segment.samples, dtype=torch.float32))
    return Audio(
        torch.nn.utils.rnn.pad_sequence(samples, batch_first=True).to(device),
        torch.tensor([len(s) for s in samples], device=device),
        tuple(row.utterance for row in rows),
        tuple(merge_context(run_context or Context(), row.context) for row in rows),
    )
