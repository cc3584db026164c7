"""Reads and checks NeMo manifests, and writes the copies ("staged") that NeMo's loaders train on.

In a copy audio paths are absolute, ``text`` is always a string (absent, null and empty are the same: no transcript)
and rows that the run cannot use are left out *and listed*. The originals are never changed. The copies are needed
because NeMo's classic loader fails on ``text: null``, and both loaders drop long rows without naming them.
"""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from nemo_llm_feedback.core.config.renames import renamed
from nemo_llm_feedback.core.config.sections import REPLAY_VALUES
from nemo_llm_feedback.core.errors import ManifestError, list_faults
from nemo_llm_feedback.core.types import Context

MIN_HELD_OUT = 4
_BRACES = {"_OP_": "{", "_CL_": "}", "(": "{", ")": "}", "<": "{", ">": "}"}


@dataclass(frozen=True)
class Row:
    """One line of a manifest.

    Attributes:
        audio: absolute path of the audio file, or the member's name for tarred audio.
        duration: seconds.
        offset: start in the file, seconds.
        text: transcript, ``""`` where there is none.
        context: the utterance's context, not yet merged with the run's.
        origin: ``manifest:line``, for messages.
        data: all keys of the line.
        replay: the manifest key of that name: what the row is for, ``supervised`` or ``kl``; "" = as
            ``feedback.labelled`` where the row has text. A row with ``kl`` needs no text.
    """

    audio: str
    duration: float
    offset: float
    text: str
    context: Context
    origin: str
    data: Mapping[str, Any] = field(repr=False, default_factory=dict)
    replay: str = ""

    @property
    def utterance(self) -> str:
        """A name that is stable over epochs and runs: the audio file and the segment's start and length."""
        return f"{self.audio}@{self.offset:.3f}+{self.duration:.3f}"

    @property
    def unlabeled(self) -> bool:
        """Whether the row is learned from feedback: it has no text and is not a replay row."""
        return not self.text and self.replay != "kl"


@dataclass(frozen=True)
class Staged:
    """A staged training set.

    Attributes:
        manifest_filepath: the value for NeMo's ``manifest_filepath``, in the same form as the user's.
        rows: the rows of the copies, in order; NeMo's classic sample id is an index into it.
        held_out: unlabeled rows that are not trained on and on which the policy is measured; in no copy.
        too_long, too_short: rows left out because of ``max_duration`` and ``min_duration``.
        bad_audio: ``origin: reason`` of the rows left out by ``on_bad_audio: skip``.
    """

    manifest_filepath: Any
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...] = ()
    too_long: tuple[Row, ...] = ()
    too_short: tuple[Row, ...] = ()
    bad_audio: tuple[str, ...] = ()

    @property
    def num_labelled(self) -> int:
        """Rows with a transcript."""
        return sum(bool(row.text) for row in self.rows)

    @property
    def num_unlabeled(self) -> int:
        """Rows that are learned from feedback."""
        return sum(row.unlabeled for row in self.rows)

    def hours(self, *, unlabeled: bool) -> float:
        """Hours of audio of the rows that are learned from feedback, or of all others."""
        return sum(row.duration for row in self.rows if row.unlabeled == unlabeled) / 3600


def parse_context(value: Any) -> Context:
    """Parses the manifest key ``context``.

    Args:
        value: a string describes the utterance, a list holds its terms, null and "" mean no context; an object has any
            of ``description`` (a string), ``terms`` and ``previous`` (lists; the oldest utterance first).

    Raises:
        ValueError: any other form.
    """
    if value is None or value == "" or value == []:
        return Context()
    if isinstance(value, str):
        return Context(description=value.strip())
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return Context(terms=tuple(dict.fromkeys(v.strip() for v in value if v.strip())))
    if isinstance(value, Mapping) and value.keys() <= {"description", "terms", "previous"}:
        description = parse_context(value.get("description"))
        terms, previous = parse_context(value.get("terms")), value.get("previous") or []
        spoken = isinstance(previous, list) and all(isinstance(v, str) for v in previous)
        if spoken and not description.terms and not terms.description:
            return Context(description.description, terms.terms, tuple(v.strip() for v in previous if v.strip()))
    raise ValueError(
        "`context` must be a string or a list of strings, or an object with `description` (a string), `terms` and "
        f"`previous` (lists of strings), got {value!r}."
    )


def merge_context(run: Context, utterance: Context) -> Context:
    """The utterance's context over the run's: its description and previous utterances replace the run's, and its terms
    come before the run's."""
    terms = tuple(dict.fromkeys(utterance.terms + run.terms))
    return Context(utterance.description or run.description, terms, utterance.previous or run.previous)


def expand_paths(manifest_filepath: Any) -> list[str]:
    """All files that a NeMo ``manifest_filepath`` names: a string (with commas, braces, ``_OP_0..3_CL_``) or lists."""
    if isinstance(manifest_filepath, (str, Path)):
        return [file for part in str(manifest_filepath).split(",") for file in _expand_braces(part.strip())]
    return [file for item in manifest_filepath for file in expand_paths(item)]


def read_manifest(manifest_filepath: Any, *, use_text: bool = True, tarred: bool = False) -> list[Row]:
    """Reads every row of one or several manifests.

    Args:
        manifest_filepath: as in NeMo's data configs.
        use_text: False = every row is read as unlabeled.
        tarred: whether audio names are members of tar files, which are left as they are.

    Raises:
        ManifestError: a file is missing or empty, or lines are not JSON objects with ``audio_filepath`` and a positive
            ``duration``; all of them are listed.
    """
    faults: list[str] = []
    rows: list[Row] = []
    for path in expand_paths(manifest_filepath):
        for origin, data in json_lines(path, faults):
            try:
                rows.append(_parse_row(data, origin, use_text=use_text, tarred=tarred))
            except ValueError as error:
                faults.append(f"{origin}: {error}")
    if faults:
        raise ManifestError(list_faults(f"{len(faults)} fault(s) in the manifest(s); correct these lines:", faults))
    return rows


def stage(
    config: Mapping[str, Any],
    folder: Path,
    *,
    use_text: bool,
    on_bad_audio: str,
    held_out: int = 0,
    held_out_share: float = 0.0,
    progress: Callable[[str], None] = lambda message: None,
) -> Staged:
    """Checks a training data config and writes the staged copies of its manifests into ``folder``.

    Args:
        config: NeMo's ``train_ds`` with ``manifest_filepath`` and, where set, ``tarred_audio_filepaths``,
            ``is_tarred``, ``max_duration``, ``min_duration``.
        folder: an existing folder of the run.
        use_text: False = every row is unlabeled, whatever its text.
        on_bad_audio: ``error`` or ``skip``.
        held_out: the most unlabeled rows that are kept from training.
        held_out_share: the share of the unlabeled rows that is kept from training; none of tarred audio, whose rows
            cannot be read one by one, and none where it would be fewer than ``MIN_HELD_OUT``.
        progress: receives a message at the start of long work.

    Raises:
        ManifestError: faults in the manifests, unreadable audio under ``error``, or no row left.
    """
    manifest_filepath = config.get("manifest_filepath")
    if not manifest_filepath:
        raise ManifestError("model.train_ds.manifest_filepath is missing: give the manifest of the unlabeled audio.")
    tarred = bool(config.get("is_tarred") or config.get("tarred_audio_filepaths"))
    rows = read_manifest(manifest_filepath, use_text=use_text, tarred=tarred)
    longest, shortest = config.get("max_duration"), config.get("min_duration")
    too_long = [row for row in rows if longest is not None and row.duration > longest]
    too_short = [row for row in rows if shortest is not None and row.duration < shortest]
    dropped = {id(row) for row in too_long + too_short}
    progress(f"checking the audio of {len(rows)} rows …")
    usable = [row for row in rows if id(row) not in dropped]
    faulty = missing_members(usable, config.get("tarred_audio_filepaths")) if tarred else unreadable(usable)
    bad = {id(row): reason for row, reason in faulty}
    if bad and on_bad_audio == "error":
        head = f"{len(bad)} row(s) with unreadable audio (feedback.on_bad_audio=skip leaves them out):"
        raise ManifestError(list_faults(head, bad.values()))
    kept = [row for row in usable if id(row) not in bad]
    if not kept:
        raise ManifestError("no row is left to train on: all are over max_duration, under min_duration or unreadable.")
    # A pool that is listed several times, to be seen oftener than the replay rows, is held out once.
    distinct = {row.utterance: row for row in kept if row.unlabeled}
    held = () if tarred else _spread(list(distinct.values()), held_out_share, held_out)
    out = {row.utterance for row in held}
    kept = [row for row in kept if not row.unlabeled or row.utterance not in out]
    staged_path = _write_copies(manifest_filepath, kept, folder)
    return Staged(staged_path, tuple(kept), held, tuple(too_long), tuple(too_short), tuple(bad.values()))


def _spread(rows: list[Row], share: float, most: int) -> tuple[Row, ...]:
    """Rows evenly spaced over the list; none where they would be too few to measure anything."""
    number = min(most, int(share * len(rows)))
    if number < MIN_HELD_OUT:
        return ()
    return tuple(rows[int((k + 0.5) * len(rows) / number)] for k in range(number))


def unreadable(rows: Iterable[Row]) -> list[tuple[Row, str]]:
    """The rows whose audio file is missing or has no readable header, each with ``origin: path: reason``."""
    import soundfile

    def _fault(row: Row) -> tuple[Row, str] | None:
        if not Path(row.audio).is_file():
            return row, f"{row.origin}: {row.audio}: no such file"
        try:
            info = soundfile.info(row.audio)
        except (soundfile.SoundFileError, RuntimeError) as error:
            return row, f"{row.origin}: {row.audio}: {error}"
        if info.frames == 0 or row.offset * info.samplerate >= info.frames:
            return row, f"{row.origin}: {row.audio}: no audio at offset {row.offset} s"
        return None

    rows = list(rows)
    # The first row before the threads: soundfile's binding makes its C types at the first call, and two threads that
    # make them at once get two types of the same name, each refusing the other's files.
    found = [_fault(row) for row in rows[:1]]
    with ThreadPoolExecutor(max_workers=8) as pool:
        found += pool.map(_fault, rows[1:])
    return [bad for bad in found if bad is not None]


def missing_members(rows: Iterable[Row], tar_paths: Any) -> list[tuple[Row, str]]:
    """The rows that are in no local tar file, each with ``origin: name: reason``; members are not decoded here.

    Args:
        rows: the rows of a tarred manifest.
        tar_paths: NeMo's ``tarred_audio_filepaths``; pipes and remote stores are not checked.

    Raises:
        ManifestError: a local tar file is missing or broken.
    """
    paths = expand_paths(tar_paths) if tar_paths else []
    if not paths or any(path.startswith("pipe:") or "://" in path for path in paths):
        return []
    names: set[str] = set()
    for path in paths:
        try:
            with tarfile.open(Path(path).expanduser()) as archive:
                names |= {Path(name).name for name in archive.getnames()}
        except (OSError, tarfile.TarError) as error:
            raise ManifestError(f"tarred_audio_filepaths: {path} cannot be read ({error}).") from None
    return [(row, f"{row.origin}: {row.audio}: in no tar file") for row in rows if Path(row.audio).name not in names]


def json_lines(path: str | Path, faults: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a JSON Lines file: yields ``file:line`` and the object of each line that is not blank.

    Args:
        path: the file.
        faults: a message is appended for a file that cannot be read and for each line that is not an object.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path}: cannot be read ({error}).")
        return
    if not text.strip():
        faults.append(f"{path}: the file is empty.")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            data = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            faults.append(f"{file}:{number}: not JSON ({error}).")
            continue
        if isinstance(data, dict):
            yield f"{file}:{number}", data
        elif line.strip():
            faults.append(f"{file}:{number}: a line must be a JSON object.")


def _parse_row(data: dict[str, Any], origin: str, *, use_text: bool, tarred: bool) -> Row:
    """The row of a manifest line; a ValueError names what is wrong with the line."""
    audio, duration = data.get("audio_filepath") or data.get("audio_filename"), data.get("duration")
    text, offset, replay = data.get("text"), data.get("offset") or 0.0, data.get("replay") or ""
    if not isinstance(audio, str) or not audio:
        raise ValueError("lacks `audio_filepath`.")
    if not _is_number(duration) or not duration > 0:
        raise ValueError(f"lacks a positive `duration` in seconds (got {duration!r}).")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`text` must be a string or null (got {text!r}).")
    if not _is_number(offset) or offset < 0:
        raise ValueError(f"`offset` must be seconds ≥ 0 (got {offset!r}).")
    if now := renamed("replay", replay):
        raise ValueError(now)
    if replay not in ("", *REPLAY_VALUES) or (replay == "supervised" and not text):
        raise ValueError(f"`replay` must be kl or, for a row with text, supervised (got {replay!r}).")
    context = parse_context(data.get("context"))
    text = (text or "").strip() if use_text else ""
    path = audio if tarred else str(_resolve(audio, Path(origin.rsplit(":", 1)[0])))
    return Row(path, float(duration), float(offset), text, context, origin, data, replay)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _resolve(audio: str, manifest: Path) -> Path:
    """NeMo's rule: a relative path that does not exist from here is relative to the manifest."""
    path = Path(audio).expanduser()
    if not path.is_absolute() and not path.exists():
        path = manifest.parent / path
    return path.absolute()


def _write_copies(manifest_filepath: Any, rows: list[Row], folder: Path) -> Any:
    """Writes one copy per file, ``folder/<k>/<name>``, and returns the user's structure with the new paths."""
    by_file: dict[str, list[Row]] = {}
    for row in rows:
        by_file.setdefault(row.origin.rsplit(":", 1)[0], []).append(row)
    targets = (folder / str(k) for k in itertools.count())

    def _copy(node: Any) -> Any:
        if not isinstance(node, (str, Path)):
            return [_copy(item) for item in node]
        return ",".join(_write_copy(part.strip(), by_file, next(targets)) for part in str(node).split(","))

    return _copy(manifest_filepath)


def _write_copy(pattern: str, by_file: Mapping[str, list[Row]], target: Path) -> str:
    """Copies the files of one pattern, and returns the pattern of the copies."""
    source = Path(pattern)
    if any(brace in str(source.parent) for brace in ("{", "_OP_")):
        raise ManifestError(f"{pattern}: braces are supported in the file name only; list the folders instead.")
    target.mkdir(parents=True, exist_ok=True)
    for file in map(Path, _expand_braces(pattern)):
        lines = [json.dumps(_staged_line(row), ensure_ascii=False) for row in by_file.get(str(file.expanduser()), [])]
        # Every rank writes the same copies, perhaps while another reads them: a rename never shows half a file.
        temporary = target / f".{file.name}.{os.getpid()}"
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        temporary.replace(target / file.name)
    return str(target / source.name)


def _staged_line(row: Row) -> dict[str, Any]:
    """The row as NeMo's loaders should read it: without keys that would take the place of those set here."""
    line = {k: v for k, v in row.data.items() if k not in ("audio_filename", "text_filepath", "normalized_text")}
    return {**line, "audio_filepath": row.audio, "duration": row.duration, "text": row.text}


def _expand_braces(pattern: str) -> list[str]:
    """The paths that a pattern in NeMo's notation names."""
    from braceexpand import braceexpand

    for nemo_form, brace in _BRACES.items():
        if nemo_form.startswith("_") or ".." in pattern:
            pattern = pattern.replace(nemo_form, brace)
    return list(braceexpand(pattern, escape=False))
