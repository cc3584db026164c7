"""The prepare job: recordings of any length become an unlabeled manifest, cut where silero-vad hears no speech.

silero-vad (MIT) has its weights in the wheel; nothing is downloaded. The audio stays where it is: rows name file,
offset and duration. Files that only librosa can read are copied as FLAC beside the manifest, since the loaders of NeMo
read by soundfile. The folder of the copies has a list of what each is a copy of: no later run takes them for
recordings, and one with the same output writes each copy over.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from nemo_llm_feedback.cli.options import Segmenting
from nemo_llm_feedback.core.console import quiet, track
from nemo_llm_feedback.core.errors import ConfigError, ManifestError, list_faults, reason
from nemo_llm_feedback.data.audio import AUDIO_TYPES, CONVERTED_TYPES, audio_files
from nemo_llm_feedback.data.manifests import write_manifest
from nemo_llm_feedback.evaluation.records import check_writable, facts_text

SUFFIXES = frozenset(f".{suffix}" for suffix in (*AUDIO_TYPES, *CONVERTED_TYPES))
"""What counts as a recording in a folder; a file that is named itself is always tried."""

_KEYS = ("audio_filepath", "offset", "duration")
_LIST = "originals.json"  # in a folder of copies: the path of each original → the name of its copy
_RATE = 16000
_BLOCK_SECONDS = 60


@dataclass(frozen=True)
class Recording:
    """One file and its segments, ``(offset, duration)`` in seconds."""

    path: Path
    duration: float
    sample_rate: int
    channels: int
    segments: tuple[tuple[float, float], ...]
    too_short: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote.

    Attributes:
        manifest: the path.
        recordings: all files that could be read.
        unreadable: ``path: reason`` of the others.
        converted: files that were copied as FLAC, original → copy.
    """

    manifest: Path
    recordings: tuple[Recording, ...]
    unreadable: tuple[str, ...]
    converted: dict[Path, Path]


@quiet()
def prepare(folder: str | Path, *, out: str | Path, settings: Segmenting | None = None) -> Prepared:
    """Writes an unlabeled manifest of the speech in recordings.

    Args:
        folder: searched with its sub-folders; or one file.
        out: the manifest.
        settings: lengths, gaps and threshold of the cuts; the defaults of `Segmenting` if None.

    Raises:
        ConfigError: settings out of range, ``out`` is a recording or cannot be written, or silero-vad is not
            installed.
        ManifestError: no recording there, none that can be read, or no speech in any.
    """
    settings = settings or Segmenting()
    faults = settings.validate()
    if faults:
        raise ConfigError(" ".join(faults))
    originals = functools.lru_cache(maxsize=None)(_originals)
    files = audio_files(folder, SUFFIXES, skip=lambda file: file.name in originals(file.parent).values())
    target = check_writable(out, inputs=files).absolute()
    detect = _detector(settings)
    recordings: list[Recording] = []
    unreadable: list[str] = []
    converted: dict[Path, Path] = {}
    for path in track(files, "recordings", unit="file"):
        try:
            if not _soundfile_reads(path):
                converted[path] = _convert(path, _copies(target))
            recordings.append(_cut(converted.get(path, path), detect, settings))
        except (soundfile.SoundFileError, RuntimeError, OSError, EOFError, ValueError) as error:
            unreadable.append(f"{path}: {reason(error)}")
    if not recordings:
        raise ManifestError(list_faults(f"none of {len(files)} file(s) can be read:", unreadable))
    if not any(recording.segments for recording in recordings):
        raise ManifestError(
            f"no speech of at least {settings.min_duration} s in {len(recordings)} file(s); lower --threshold "
            f"({settings.threshold}) or --min-duration."
        )
    segments = [(str(r.path.absolute()), *segment) for r in recordings for segment in r.segments]
    write_manifest(target, [dict(zip(_KEYS, segment, strict=True)) for segment in segments])
    return Prepared(target, tuple(recordings), tuple(unreadable), converted)


def summary(result: Prepared, *, preview: int = 5) -> str:
    """Totals, a preview, and the files that could not be read, for a terminal."""
    lengths = np.array([length for r in result.recordings for _, length in r.segments])
    total = sum(r.duration for r in result.recordings)
    rates = sorted({r.sample_rate for r in result.recordings})
    facts = {
        "recordings": f"{len(result.recordings)} ({_clock(total)}), {', '.join(map(str, rates))} Hz, "
        f"{sum(r.channels > 1 for r in result.recordings)} with several channels (mixed to one where they are read)",
        "segments": f"{len(lengths)} ({_clock(lengths.sum())} of speech, {100 * lengths.sum() / total:.0f} %)",
        "durations": f"{lengths.min():.1f} to {lengths.max():.1f} s, median {np.median(lengths):.1f} s",
        "left out": f"{sum(r.too_short for r in result.recordings)} segments that are too short",
    }
    for name, items in (
        ("no speech in", [str(r.path) for r in result.recordings if not r.segments]),
        ("converted", [f"{old} → {new}" for old, new in result.converted.items()]),
        ("UNREADABLE", list(result.unreadable)),
    ):
        facts |= {name: list_faults(f"{len(items)} file(s)", items)} if items else {}
    segments = [(r.path.name, *segment) for r in result.recordings for segment in r.segments]
    shown = [f"  {name}  {_clock(start)} + {length:.1f} s" for name, start, length in segments[: max(0, preview)]]
    shown += [f"  … and {len(segments) - len(shown)} more"] if len(segments) > len(shown) else []
    return "\n".join(
        [
            facts_text(facts),
            "",
            *shown,
            "",
            f"manifest: {result.manifest}",
            f"next: nemo-llm-feedback adapt model.train_ds.manifest_filepath={result.manifest} …",
        ]
    )


Detector = Callable[[NDArray[np.float32]], list[tuple[float, float]]]


def _detector(settings: Segmenting) -> Detector:
    """Speech of 16 kHz mono samples [S] as (start, end) in seconds."""
    try:
        import silero_vad
    except ImportError as error:
        raise ConfigError(
            f"`prepare` needs silero-vad ({error}): pip install silero-vad (its weights are inside the package)."
        ) from None
    import torch

    model = silero_vad.load_silero_vad()

    def detect(samples: NDArray[np.float32]) -> list[tuple[float, float]]:
        """Start and end of each stretch of speech."""
        with torch.no_grad():
            found: list[dict[str, Any]] = silero_vad.get_speech_timestamps(
                torch.from_numpy(samples),
                model,
                threshold=settings.threshold,
                sampling_rate=_RATE,
                max_speech_duration_s=settings.max_duration,
                min_silence_duration_ms=round(1000 * settings.merge_gap),
                speech_pad_ms=round(1000 * settings.padding),
            )
        return [(item["start"] / _RATE, item["end"] / _RATE) for item in found]

    return detect


def _cut(path: Path, detect: Detector, settings: Segmenting) -> Recording:
    info = soundfile.info(str(path))
    samples = _load(path)
    # Rounded inward: the last segment must not end after its file.
    rows = [(round(start, 3), int((end - round(start, 3)) * 1000) / 1000) for start, end in detect(samples)]
    kept = tuple((start, length) for start, length in rows if length >= settings.min_duration)
    return Recording(path, len(samples) / _RATE, info.samplerate, info.channels, kept, len(rows) - len(kept))


def _load(path: Path) -> NDArray[np.float32]:
    """16 kHz mono samples [S]; read and resampled by the minute, so an hour takes 230 MB whatever its format.

    Raises:
        soundfile.SoundFileError, ValueError: unreadable or empty.
    """
    import soxr  # type: ignore[import-untyped]

    with soundfile.SoundFile(str(path)) as file:
        resampler = soxr.ResampleStream(file.samplerate, _RATE, 1, dtype="float32")
        blocks = [
            resampler.resample_chunk(block.mean(axis=1))
            for block in file.blocks(_BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)
        ]
        blocks.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    samples = np.concatenate(blocks)
    if not len(samples):
        raise ValueError("no audio in it")
    if not np.isfinite(samples).all():
        raise ValueError("has samples that are not finite")
    return np.asarray(samples, dtype=np.float32)


def _soundfile_reads(path: Path) -> bool:
    try:
        soundfile.info(str(path))
    except (soundfile.SoundFileError, RuntimeError):
        return False
    return True


def _convert(path: Path, folder: Path) -> Path:
    """A 16-bit FLAC copy of a file that librosa reads by another backend than soundfile.

    Raises:
        RuntimeError: librosa cannot read it either.
    """
    import warnings

    import librosa

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples, rate = librosa.load(str(path), sr=None, mono=False)
    except Exception as error:  # each of its backends raises another kind of error
        raise RuntimeError(f"neither soundfile nor librosa can read it ({reason(error)})") from None
    folder.mkdir(parents=True, exist_ok=True)
    known = _originals(folder)
    if (name := known.get(str(path.absolute()))) is None:
        ends = itertools.chain([""], (f"_{number}" for number in itertools.count(1)))
        names = (f"{path.stem}{end}.flac" for end in ends)
        name = next(name for name in names if name not in known.values() and not (folder / name).exists())
        (folder / _LIST).write_text(json.dumps({**known, str(path.absolute()): name}), encoding="utf-8")
    soundfile.write(str(folder / name), samples.T, int(rate))
    return folder / name


def _originals(folder: Path) -> dict[str, str]:
    """Path of each original → the name of its copy in this folder; none where nothing says so."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found = json.loads((folder / _LIST).read_text(encoding="utf-8"))
        return {original: Path(name).name for original, name in found.items()}
    return {}


def _copies(manifest: Path) -> Path:
    """The folder beside the manifest for converted files."""
    return manifest.parent / f"{manifest.stem}_audio"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
