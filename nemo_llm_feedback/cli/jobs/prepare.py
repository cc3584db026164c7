"""The prepare job: recordings of any length become an unlabeled manifest, cut where silero-vad hears no speech.

silero-vad (MIT) has its weights in the wheel; nothing is downloaded. The audio stays where it is: rows name file,
offset and duration. Files that only librosa can read are copied as FLAC beside the manifest, since the loaders of NeMo
read by soundfile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from nemo_llm_feedback.cli.options import Segmenting
from nemo_llm_feedback.core.errors import ConfigError, ManifestError

_SUFFIXES = "wav flac ogg oga opus mp3 aif aiff aifc au caf w64 rf64 sph nist m4a mp4 aac wma amr webm"
SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
"""What counts as a recording in a folder; a file that is named itself is always tried."""

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


def prepare(folder: str | Path, *, out: str | Path, settings: Segmenting | None = None) -> Prepared:
    """Writes an unlabeled manifest of the speech in recordings.

    Args:
        folder: searched with its sub-folders; or one file.
        out: the manifest.
        settings: how to cut; the defaults of `Segmenting` if None.

    Raises:
        ConfigError: settings out of range, or silero-vad is not installed.
        ManifestError: no recording there, none that can be read, or no speech in any.
    """
    settings = settings or Segmenting()
    faults = settings.validate()
    if faults:
        raise ConfigError(" ".join(faults))
    target = Path(out).expanduser().absolute()
    files = _recordings(Path(folder).expanduser(), skip=_copies(target))
    detect = _detector(settings)
    recordings: list[Recording] = []
    unreadable: list[str] = []
    converted: dict[Path, Path] = {}
    for number, path in enumerate(files, 1):
        _progress(number, len(files), path)
        try:
            source = path
            if not _soundfile_reads(path):
                source = converted[path] = _convert(path, _copies(target))
            recordings.append(_cut(source, detect, settings))
        except (soundfile.SoundFileError, RuntimeError, OSError, EOFError, ValueError) as error:
            unreadable.append(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}")
    if not recordings:
        raise ManifestError(
            f"none of {len(files)} file(s) can be read:" + "".join(f"\n  {u}" for u in unreadable[:20])
        )
    if not any(recording.segments for recording in recordings):
        raise ManifestError(
            f"no speech of at least {settings.min_duration} s in {len(recordings)} file(s); lower --threshold "
            f"({settings.threshold}) or --min-duration."
        )
    lines = [
        json.dumps({"audio_filepath": str(r.path.absolute()), "offset": start, "duration": length}, ensure_ascii=False)
        for r in recordings
        for start, length in r.segments
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Prepared(target, tuple(recordings), tuple(unreadable), converted)


def summary(result: Prepared, *, preview: int = 5) -> str:
    """Totals, a preview, and the files that could not be read, for a terminal."""
    lengths = np.array([length for r in result.recordings for _, length in r.segments])
    total = sum(r.duration for r in result.recordings)
    rates = sorted({r.sample_rate for r in result.recordings})
    lines = [
        f"recordings   {len(result.recordings)} ({_clock(total)}), {', '.join(str(rate) for rate in rates)} Hz, "
        f"{sum(r.channels > 1 for r in result.recordings)} with several channels (mixed to one)",
        f"segments     {len(lengths)} ({_clock(float(lengths.sum()))} of speech, {100 * lengths.sum() / total:.0f} %)",
        f"durations    {lengths.min():.1f} to {lengths.max():.1f} s, median {np.median(lengths):.1f} s",
        f"left out     {sum(r.too_short for r in result.recordings)} segments that are too short",
    ]
    silent = [r.path for r in result.recordings if not r.segments]
    for head, items in (
        ("no speech in", [str(path) for path in silent]),
        ("converted", [f"{old} → {new}" for old, new in result.converted.items()]),
        ("UNREADABLE", list(result.unreadable)),
    ):
        lines += [f"{head:<12} {len(items)} file(s)", *(f"  {item}" for item in items)] if items else []
    shown = [(r.path, *segment) for r in result.recordings for segment in r.segments][: max(0, preview)]
    lines += ["", *(f"  {path.name}  {_clock(start)} + {length:.1f} s" for path, start, length in shown)]
    lines += [f"  … and {len(lengths) - len(shown)} more"] if len(lengths) > len(shown) else []
    lines += [
        f"\nmanifest: {result.manifest}",
        f"next: nemo-llm-feedback adapt model.train_ds.manifest_filepath={result.manifest} …",
    ]
    return "\n".join(lines)


def merge_segments(
    speech: Sequence[tuple[float, float]], *, merge_gap: float, max_duration: float
) -> list[tuple[float, float]]:
    """Joins neighbouring segments with less silence than ``merge_gap`` between, up to ``max_duration``.

    Args:
        speech: (start, end) in seconds, in order, not overlapping.
        merge_gap: seconds.
        max_duration: of a joined segment, seconds.
    """
    out: list[tuple[float, float]] = []
    for start, end in speech:
        if out and start - out[-1][1] < merge_gap and end - out[-1][0] <= max_duration:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def pad_segments(
    speech: Sequence[tuple[float, float]], *, padding: float, total: float
) -> list[tuple[float, float]]:  # fmt: skip
    """Widens each segment on both sides, at most to the middle of the silence and to the ends of the file."""
    out = []
    for k, (start, end) in enumerate(speech):
        left = (speech[k - 1][1] + start) / 2 if k else 0.0
        right = (end + speech[k + 1][0]) / 2 if k + 1 < len(speech) else total
        out.append((max(start - padding, left), min(end + padding, right)))
    return out


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
        with torch.no_grad():
            found: list[dict[str, Any]] = silero_vad.get_speech_timestamps(
                torch.from_numpy(samples),
                model,
                threshold=settings.threshold,
                sampling_rate=_RATE,
                max_speech_duration_s=settings.max_duration - 2 * settings.padding,
                speech_pad_ms=0,
            )
        return [(item["start"] / _RATE, item["end"] / _RATE) for item in found]

    return detect


def _cut(path: Path, detect: Detector, settings: Segmenting) -> Recording:
    info = soundfile.info(str(path))
    samples = _load(path)
    total = len(samples) / _RATE
    room = settings.max_duration - 2 * settings.padding
    joined = merge_segments(detect(samples), merge_gap=settings.merge_gap, max_duration=room)
    padded = pad_segments(joined, padding=settings.padding, total=total)
    # Rounded inward: the last segment must not end after its file.
    rows = [(round(start, 3), int((end - round(start, 3)) * 1000) / 1000) for start, end in padded]
    kept = tuple((start, length) for start, length in rows if length >= settings.min_duration)
    return Recording(path, total, info.samplerate, info.channels, kept, len(rows) - len(kept))


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
        raise ValueError("has samples that are no numbers")
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
    except Exception as error:  # each of its backends raises an error of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"neither soundfile nor librosa can read it ({reason})") from None
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{path.stem}.flac"
    number = 1
    while target.exists():
        target, number = folder / f"{path.stem}_{number}.flac", number + 1
    soundfile.write(str(target), samples.T, int(rate))
    return target


def _copies(manifest: Path) -> Path:
    """The folder beside the manifest for converted files."""
    return manifest.parent / f"{manifest.stem}_audio"


def _recordings(folder: Path, *, skip: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such file or folder.")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and skip not in path.absolute().parents
    )
    if not found:
        raise ManifestError(f"{folder} has no recording in it; looked for {' '.join(sorted(SUFFIXES))}.")
    return found


def _progress(number: int, total: int, path: Path) -> None:
    if sys.stderr.isatty():
        print(
            f"\r\x1b[K{number}/{total} {path.name[:60]}",
            end="\n" if number == total else "",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
