"""Encodes an utterance's audio so that it fits into the page."""

from __future__ import annotations

import base64
import io

from nemo_llm_feedback.core.errors import DecodingError
from nemo_llm_feedback.data.audio import read_audio
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
    import soundfile

    try:
        length = min(row.duration or _MAX_SECONDS, _MAX_SECONDS)
        mono = read_audio(row.audio, offset=row.offset, duration=length, sample_rate=_RATE)
    except DecodingError:
        return None
    kind = "MP3" if "MP3" in soundfile.available_formats() else "FLAC"
    buffer = io.BytesIO()
    soundfile.write(buffer, mono, _RATE, format=kind)
    mime = "audio/mpeg" if kind == "MP3" else "audio/flac"
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
