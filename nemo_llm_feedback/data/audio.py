"""The one reader of audio files: rows of a manifest as padded batches of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_llm_feedback.data.manifests import Row


@dataclass(frozen=True)
class AudioBatch:
    """Some rows of a manifest with their audio.

    Attributes:
        indices: positions of the rows in the manifest.
        signal: [B, S] waveform samples.
        signal_len: [B] samples.
    """

    indices: tuple[int, ...]
    signal: Tensor
    signal_len: Tensor


def audio_batches(
    rows: Sequence[Row], *, sample_rate: int, batch_size: int, device: torch.device
) -> Iterator[AudioBatch]:
    """Loads rows in batches of similar duration.

    Args:
        rows: manifest rows, not tarred.
        sample_rate: of the model, Hz.
        batch_size: rows a batch.
        device: where the signals go.
    """
    for indices in by_duration(rows, batch_size):
        yield load_audio(rows, indices, sample_rate=sample_rate, device=device)


def by_duration(rows: Sequence[Row], batch_size: int) -> list[tuple[int, ...]]:
    order = sorted(range(len(rows)), key=lambda i: rows[i].duration)
    return [tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def load_audio(rows: Sequence[Row], indices: tuple[int, ...], *, sample_rate: int, device: torch.device) -> AudioBatch:
    from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

    samples = []
    for i in indices:
        segment = AudioSegment.from_file(
            rows[i].audio, target_sr=sample_rate, offset=rows[i].offset, duration=rows[i].duration
        )
        samples.append(torch.tensor(segment.samples, dtype=torch.float32))
    signal = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return AudioBatch(indices, signal.to(device), torch.tensor([len(s) for s in samples], device=device))
