"""Encodes an utterance's audio so that it fits into the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from nemo_llm_feedback.data.manifests import Row

MAX_PLAYERS = 50
_RATE = 16000
_MAX_SECONDS = 40.0


def data_uri(row: Row) -> str | None:
    """The row's audio as 16 kHz mono MP3 (FLAC where libsndfile writes no MP3) in a ``data:`` address.

    At most the first 40 s. All browsers play both formats; Ogg is silent in Safari before 18.4.

    Returns:
        The address, or None where the file is gone or cannot be read.
    """
    import librosa
    import soundfile

    if not Path(row.audio).is_file():
        return None
    try:
        info = soundfile.info(row.audio)
        seconds = min(row.duration or info.duration, _MAX_SECONDS)
        start = int(row.offset * info.samplerate)
        samples, rate = soundfile.read(
            row.audio, start=start, frames=int(seconds * info.samplerate), dtype="float32", always_2d=True
        )
    except (soundfile.SoundFileError, RuntimeError):
        return None
    if not len(samples):
        return None
    mono = samples.mean(axis=1)
    if rate != _RATE:
        mono = librosa.resample(mono, orig_sr=rate, target_sr=_RATE)
    kind = "MP3" if "MP3" in soundfile.available_formats() else "FLAC"
    buffer = io.BytesIO()
    soundfile.write(buffer, mono, _RATE, format=kind)
    mime = "audio/mpeg" if kind == "MP3" else "audio/flac"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
