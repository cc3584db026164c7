"""The one reader of audio: files, members of tar files, padded batches, and the same rules inside NeMo's loaders.

Channels are mixed to one, the rate is converted, and what cannot be read (a broken body, samples that are no numbers,
nothing at the row's place) is a `DecodingError` that names the file.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, open_dict

from nemo_llm_feedback.core.errors import ConfigError, DecodingError, ManifestError, list_faults, reason
from nemo_llm_feedback.core.types import Audio, Context
from nemo_llm_feedback.data.manifests import Row, expand_paths, merge_context

AUDIO_TYPES = (
    "wav",
    "flac",
    "ogg",
    "oga",
    "opus",
    "mp3",
    "aif",
    "aiff",
    "aifc",
    "au",
    "caf",
    "w64",
    "rf64",
    "sph",
    "nist",
)
"""Suffixes of files that are read as they are."""
CONVERTED_TYPES = ("m4a", "mp4", "aac", "wma", "amr", "webm")
"""Those that ``prepare`` converts."""
CHANNELS = "average"
"""NeMo's ``channel_selector`` for files with several channels; without it NeMo's readers return all channels."""
_RATES = (1000, 768_000)
_SUB = re.compile(r"^(?P<stem>.+)-sub\d+(?P<ext>\.\w+)?$")


def read_audio(
    audio: str | Path | io.BytesIO,
    *,
    offset: float = 0.0,
    duration: float = 0.0,
    sample_rate: int | None = None,
    name: str = "",
) -> NDArray[np.float32]:
    """Reads one segment of a recording.

    Args:
        audio: a file, or its contents.
        offset, duration: the segment, seconds; duration 0 = to the end. A duration that is a little too long is cut.
        sample_rate: Hz of the result; None = as in the file.
        name: for messages; the path if empty.

    Returns:
        [S] samples, the mean of the channels.

    Raises:
        DecodingError: no file, no audio at this place, a broken body, samples that are not finite, or a duration more
            than twice what the file holds.
    """
    import soundfile

    try:
        if not isinstance(audio, io.BytesIO) and not Path(audio).is_file():
            raise ValueError("no such file")
        with soundfile.SoundFile(audio if isinstance(audio, io.BytesIO) else str(audio)) as file:
            rate, start = file.samplerate, int(offset * file.samplerate)
            if not _RATES[0] <= rate <= _RATES[1]:
                raise ValueError(f"a sample rate of {rate} Hz is not possible")
            left = file.frames - start
            if left <= 0:
                raise ValueError(f"there is no audio at this place of the file ({offset:g} s)")
            if duration * rate > 2 * left + rate:
                raise ValueError(f"the row has {duration:g} s, the file only {left / rate:.2f} s from {offset:g} s on")
            wanted = min(max(1, int(duration * rate)), left) if duration else left
            file.seek(start)
            samples = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
        if len(samples) < wanted - rate // 10:
            raise ValueError(f"it ends after {len(samples) / rate:.2f} of {wanted / rate:.2f} s: an incomplete copy")
        if not np.isfinite(samples).all():
            raise ValueError("it has samples that are no numbers or infinite")
    except Exception as error:  # audio libraries raise anything
        raise DecodingError(f"{name or audio} cannot be read ({reason(error)}).") from None
    if sample_rate is None or rate == sample_rate:
        return np.asarray(samples, dtype=np.float32)
    import librosa

    return np.asarray(librosa.resample(samples, orig_sr=rate, target_sr=sample_rate), dtype=np.float32)


def audio_files(
    name: str | Path, suffixes: Collection[str], *, skip: Callable[[Path], bool] = lambda file: False
) -> list[Path]:
    """The file of this name, or in a folder and its sub-folders those with one of the suffixes, in order.

    Args:
        name: a file, which is taken whatever it is, or a folder.
        suffixes: in lower case, with their dots.
        skip: whether a file of a folder is left out.

    Raises:
        ManifestError: no such file or folder, or no such file in it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ManifestError(f"{name}: no such file or folder.")
    if found := sorted(p for p in _below(path) if p.suffix.lower() in suffixes and p.is_file() and not skip(p)):
        return found
    raise ManifestError(f"{name}: no audio in this folder (searched {', '.join(sorted(suffixes))}).")


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, those behind linked folders too; each folder once, by its own name if it is one."""
    own = {os.path.realpath(name) for name, _, _ in os.walk(folder)}  # without links
    seen = set(own)
    for name, folders, files in os.walk(folder, followlinks=True):
        for inner in list(folders):
            place = os.path.join(name, inner)
            real = os.path.realpath(place)
            if os.path.islink(place) or real not in own:
                if real in seen:
                    folders.remove(inner)
                seen.add(real)
        yield from (Path(name, file) for file in files)


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
        Signals [B, S] padded to the longest, in the rows' order, with names, contexts and texts.

    Raises:
        DecodingError: see :func:`read_audio`.
    """
    samples = [
        torch.from_numpy(read_audio(row.audio, offset=row.offset, duration=row.duration, sample_rate=sample_rate))
        for row in rows
    ]
    return Audio(
        torch.nn.utils.rnn.pad_sequence(samples, batch_first=True).to(device),
        torch.tensor([len(s) for s in samples], device=device),
        tuple(row.utterance for row in rows),
        tuple(merge_context(run_context or Context(), row.context) for row in rows),
        tuple(row.external for row in rows),
        texts=tuple(row.text for row in rows),
    )


def by_duration(rows: Sequence[Row], batch_size: int) -> list[tuple[int, ...]]:
    """Positions of the rows in batches of similar duration, the shortest first.

    Raises:
        ConfigError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, got {batch_size}.")
    order = sorted(range(len(rows)), key=lambda i: rows[i].duration)
    return [tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def unreadable(rows: Sequence[Row]) -> dict[int, str]:
    """Positions of the rows whose audio :func:`read_audio` cannot read → ``origin: reason``; all of it is decoded."""

    def _fault(row: Row) -> str | None:
        return _bad_segment(row, row.audio)

    # The first row before the threads: soundfile's binding makes its C types at the first call, and two threads that
    # make them at once get two types of the same name, each refusing the other's files.
    found = [_fault(row) for row in rows[:1]]
    with ThreadPoolExecutor(max_workers=8) as pool:
        found += pool.map(_fault, rows[1:])
    return {i: fault for i, fault in enumerate(found) if fault is not None}


def unreadable_members(rows: Sequence[Row], tar_paths: Any, *, lhotse: bool) -> dict[int, str]:
    """Positions of the rows that are in no local tar file or cannot be read there → ``origin: reason``.

    NeMo's Lhotse reader looks a member up by its whole name, without ``-sub1`` … of the manifest's, in the tar file of
    the row's shard; the classic loader by the stem of its name, in all tar files.

    Args:
        rows: the rows of a tarred manifest.
        tar_paths: NeMo's ``tarred_audio_filepaths``; pipes and remote stores are not checked.
        lhotse: which loader reads them.

    Raises:
        ManifestError: a local tar file is missing or broken, or two different recordings have one name in it.
    """
    paths = expand_paths(tar_paths) if tar_paths else []
    if not paths or any(path.startswith("pipe:") or "://" in path for path in paths):
        return {}
    by_name: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_name.setdefault(_member(row.audio) if lhotse else Path(row.audio).stem, []).append(i)
    bad = {i: f"{row.origin}: {row.audio}: in no tar file" for i, row in enumerate(rows)}
    known: dict[tuple[str, str], int] = {}
    clashes: list[str] = []
    for path in paths:
        shard = re.search(r"_(\d+)[^/]*\.tar", Path(path).name)
        try:
            with tarfile.open(Path(path).expanduser()) as archive:
                for member in archive:
                    name = member.name if lhotse else Path(member.name).stem
                    stream = archive.extractfile(member) if name in by_name else None
                    if stream is None:
                        continue
                    content = stream.read()
                    if known.setdefault((path if lhotse else "", name), zlib.crc32(content)) != zlib.crc32(content):
                        clashes.append(f"{path}: {member.name}")
                    for i in by_name[name]:
                        if lhotse and shard and str(rows[i].data.get("shard_id", shard[1])) != str(int(shard[1])):
                            continue
                        fault = _bad_segment(rows[i], io.BytesIO(content))
                        if fault:
                            bad[i] = fault
                        else:
                            bad.pop(i, None)
        except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
            raise ManifestError(f"tarred_audio_filepaths: {path} cannot be read ({error}).") from None
    if clashes:
        raise ManifestError(list_faults("two different recordings have one name; rename these members:", clashes))
    return bad


def select_channels(config: DictConfig) -> None:
    """Makes NeMo's loader of a data section mix channels; see also :func:`guard_readers`.

    Args:
        config: ``train_ds`` or ``validation_ds``; changed, but a channel that the user chose stays.
    """
    with open_dict(config):
        if config.get("use_lhotse"):
            if config.get("channel_selector") == CHANNELS:
                config.channel_selector = None  # a number or a key of the manifest in Lhotse, which cannot average
        elif config.get("channel_selector") is None:
            config.channel_selector = CHANNELS


def guard_readers(loaders: Any, *, skip: bool = False) -> None:
    """Makes NeMo's loaders mix channels and name a file that they cannot read.

    Args:
        loaders: NeMo's data loader, or a list of them.
        skip: such a file gives no samples in place of an error.
    """
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        while (dataset := getattr(loader, "dataset", None)) is not None:
            for rows in _lhotse_manifests(getattr(loader, "sampler", None)):
                rows._create_cut = functools.partial(_lhotse_cut, rows, skip)
            if hasattr(getattr(dataset, "load_audio", None), "mono_downmix"):
                # Lhotse mixes only in batches that hold mono files as well, unless it is told to.
                dataset.load_audio.mono_downmix, dataset.load_audio.fault_tolerant = True, False
                dataset.load_audio = functools.partial(_lhotse_samples, dataset.load_audio, skip)
            featurizer = getattr(dataset, "featurizer", None)
            if featurizer is not None:
                featurizer.process = functools.partial(_samples, type(featurizer).process, featurizer, skip)
            loader = dataset


def _samples(process: Callable[..., Any], featurizer: Any, skip: bool, file: Any, *args: Any, **kwargs: Any) -> Any:
    """The samples [S] of a file in a classic loader; none of one that cannot be read, under ``skip``."""
    try:
        return process(featurizer, file, *args, **kwargs)
    except Exception as error:  # audio libraries raise anything
        if not skip:
            raise DecodingError(f"{file} cannot be read ({reason(error)}).") from None
        return torch.zeros(0)


def _lhotse_manifests(sampler: Any) -> Iterator[Any]:
    """NeMo's readers of manifests behind a Lhotse sampler."""
    from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

    nodes, seen = [sampler], {id(sampler)}
    while nodes:
        node = nodes.pop()
        if isinstance(node, LazyNeMoIterator):
            yield node
        elif isinstance(node, list | tuple) or type(node).__module__.startswith(("lhotse.", "nemo")):
            parts = node if isinstance(node, list | tuple) else getattr(node, "__dict__", {}).values()
            nodes += [part for part in parts if id(part) not in seen]
            seen.update(map(id, parts))


def _lhotse_cut(rows: Any, skip: bool, audio_path: str, **place: Any) -> Any:
    """The cut of a row; under ``skip`` one that cannot be loaded if the file's header cannot be read."""
    try:
        return type(rows)._create_cut(rows, audio_path, **place)
    except Exception as error:  # audio libraries raise anything
        if not skip:
            raise DecodingError(f"{audio_path} cannot be read ({reason(error)}).") from None
    rows.metadata_only = True
    cut = type(rows)._create_cut(rows, audio_path, **place)
    rows.metadata_only = False
    cut.recording.sources[0].type, cut.recording.sources[0].source = "file", audio_path
    return cut


def _lhotse_samples(load: Callable[..., Any], skip: bool, cuts: Any) -> tuple[Any, Any, Any]:
    """Signals [B, S], lengths [B] and the cuts; under ``skip`` a cut that cannot be read has no samples."""

    def _fails(cut: Any) -> str | None:
        try:
            cut.load_audio()
        except Exception as error:  # audio libraries raise anything
            recording = getattr(cut, "first_non_padding_cut", cut).recording
            source = recording.sources[0]
            return f"{source.source if source.type == 'file' else recording.id} cannot be read ({reason(error)})."
        return None

    try:
        return (*load(cuts), cuts)
    except Exception:
        reasons = [_fails(cut) for cut in cuts]
        bad = [reason for reason in reasons if reason]
        if not bad:
            raise
        if not skip:
            raise DecodingError(" ".join(bad)) from None
        good = torch.tensor([not reason for reason in reasons])
        lengths = torch.zeros(len(reasons), dtype=torch.int32)
        if not good.any():
            return torch.zeros(len(reasons), 0), lengths, cuts
        samples, read, *_ = load(type(cuts).from_cuts(cut for cut, kept in zip(cuts, good, strict=True) if kept))
        signals = samples.new_zeros(len(reasons), samples.shape[1])
        signals[good], lengths[good] = samples, read.to(lengths.dtype)
        return signals, lengths, cuts


def is_augmented(config: Mapping[str, Any]) -> bool:
    """Whether NeMo's loader changes the samples of a row from one reading to the next, by its data section."""
    keys = "augmentor perturb_speed noise_path rir_enabled lowpass_enabled compression_enabled clipping_enabled"
    return any(config.get(key) for key in [*keys.split(), "cut_into_windows_duration", "concatenate_samples"])


def _bad_segment(row: Row, audio: str | io.BytesIO) -> str | None:
    try:
        read_audio(audio, offset=row.offset, duration=row.duration, name=row.audio)
    except DecodingError as error:
        return f"{row.origin}: {error}"
    return None


def _member(audio: str) -> str:
    """The name in the tar file of a row that NeMo's converter has cut out of a longer recording."""
    match = _SUB.match(audio)
    return match["stem"] + (match["ext"] or "") if match else audio
