"""Synthetic speech by Debian's `flite`, with mild variation so that no two rows sound alike."""

import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

SAMPLE_RATE = 16000
KNOWN_VOICES = ("slt", "awb", "kal16")  # voices the base models heard in training
UNSEEN_VOICE = "rms"  # never heard by any base model
OPUS_LEVEL = 0.95  # soundfile's 0..1 scale; about 21 kbit/s for 16 kHz mono speech


def require_flite() -> None:
    """Ends the script with the command that installs flite when it is not on the path."""
    if shutil.which("flite") is None:
        raise SystemExit("the sets are spoken by flite, which is missing: apt-get install flite (Debian, Ubuntu)")


def synthesise(text: str, *, voice: str, rng: random.Random) -> np.ndarray:
    """Speak one sentence and vary it.

    The variation: duration stretch 0.9..1.15 (by flite), speed and pitch together 0.95..1.05 (by resampling), noise
    that falls with frequency at 18..35 dB below the speech, peak level 0.3..0.9.

    Args:
        text: lower-case words a–z and apostrophe.
        voice: a flite voice, e.g. `slt`.
        rng: source of every random choice, so that the same state gives the same samples.

    Returns:
        [S] float32 samples at 16 kHz in −1..1.

    Raises:
        subprocess.CalledProcessError: flite failed (its stderr is in the exception).
    """
    stretch = rng.uniform(0.9, 1.15)
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}", "-t", text, "-o", str(wav)]
        subprocess.run(command, check=True, capture_output=True)
        speech, rate = sf.read(wav, dtype="float32")
    # 400/380 .. 400/420: read 400 samples as if they were 380 to 420.
    speech = resample_poly(speech, 400 * SAMPLE_RATE // 1000, rng.randint(380, 420) * rate // 1000).astype(np.float32)
    noise_source = np.random.default_rng(rng.getrandbits(32))
    noise = noise_source.standard_normal(len(speech) + 3)
    noise = np.convolve(noise, [0.4, 0.3, 0.2, 0.1], mode="valid")
    snr_db = rng.uniform(18.0, 35.0)
    noise *= np.sqrt((speech**2).mean() / (noise**2).mean() / 10 ** (snr_db / 10))
    mixed = speech + noise
    return (mixed * rng.uniform(0.3, 0.9) / np.abs(mixed).max()).astype(np.float32)


def write_opus(path: Path, samples: np.ndarray) -> float:
    """Write samples [S] (float, −1..1, 16 kHz) as Ogg/Opus; returns the duration in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
    return round(len(samples) / SAMPLE_RATE, 3)
