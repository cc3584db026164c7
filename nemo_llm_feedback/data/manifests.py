"""Reads NeMo manifests: rows with audio, text and context, from every file that a ``manifest_filepath`` names."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.config.renames import renamed
from nemo_llm_feedback.core.config.sections import REPLAY_VALUES
from nemo_llm_feedback.core.errors import ManifestError, list_faults, short
from nemo_llm_feedback.core.text_files import parse_json, read_text, text_lines, to_number
from nemo_llm_feedback.core.types import Context, ExternalText
from nemo_llm_feedback.data.external import KEY, parse_hypotheses

# Seconds; a longer one is milliseconds or samples.
_LONGEST = 24 * 3600.0
# A file that is a container's mount, or in a folder of others, can be written and not replaced.
_NO_REPLACING = (errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS, errno.EXDEV)
# NeMo's other notations of a range of shards.
_RANGE = re.compile(r"(?:_OP_|[(\[<])(\d+\.\.\d+)(?:_CL_|[)\]>])")


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
            ``feedback.labelled`` where the row has text. A row with ``kl`` needs no text. ``reward`` stands for rows
            that this setting has learned by a reward against their text; no manifest says so.
        external: the manifest key ``hypotheses``: what other recognisers wrote.
    """

    audio: str
    duration: float
    offset: float
    text: str
    context: Context
    origin: str
    data: Mapping[str, Any] = field(repr=False, default_factory=dict)
    replay: str = ""
    external: tuple[ExternalText, ...] = ()

    @property
    def utterance(self) -> str:
        """A name that is stable over epochs and runs: the audio file, for tarred audio with its shard, and the
        segment's start and length."""
        shard = f"{self.data['shard_id']}/" if "shard_id" in self.data else ""
        return f"{shard}{self.audio}@{self.offset:.3f}+{self.duration:.3f}"

    @property
    def unlabeled(self) -> bool:
        """Whether the row is learned from feedback: it has no text and is not a replay row, or a reward reads it."""
        return self.replay == "reward" or (not self.text and self.replay != "kl")


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
        f"`previous` (lists of strings), got {short(value)}."
    )


def merge_context(run: Context, utterance: Context) -> Context:
    """The utterance's context over the run's: its description and previous utterances replace the run's, and its terms
    come before the run's."""
    # One list for all rows without terms: it may be long, and the rows many.
    terms = tuple(dict.fromkeys(utterance.terms + run.terms)) if utterance.terms else run.terms
    return Context(utterance.description or run.description, terms, utterance.previous or run.previous)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """``count`` rows at even distances, since neighbours in a manifest are often alike; all of them for 0."""
    if not 0 < count < len(rows):
        return list(rows)
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def split_paths(manifest_filepath: str | Path) -> list[str]:
    """The paths and patterns of a string with commas; the name of a file that exists is never split."""
    text = str(manifest_filepath)
    return [text] if _is_file(text) else [part.strip() for part in text.split(",")]


def expand_paths(manifest_filepath: Any) -> list[str]:
    """All files that a NeMo ``manifest_filepath`` names: a string (with commas, braces, ``_OP_0..3_CL_``) or lists.

    The path of a file that exists is that file, whatever brackets are in it.

    Raises:
        ManifestError: neither a string nor a list.
    """
    if isinstance(manifest_filepath, (str, Path)):
        return [file for part in split_paths(manifest_filepath) for file in _expand_braces(part)]
    try:
        return [file for item in manifest_filepath for file in expand_paths(item)]
    except TypeError:
        raise ManifestError(f"manifest_filepath={manifest_filepath!r} must be a path or a list of paths.") from None


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


def json_lines(path: str | Path, faults: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a JSON Lines file: yields ``file:line`` and the object of each line that is not blank.

    Args:
        path: the file.
        faults: a message is appended for a file that cannot be read and for each line that is not an object.
    """
    file = os.path.expanduser(path)
    try:
        text = read_text(path)
    except ValueError as error:
        faults.append(f"{path}: cannot be read ({error}).")
        return
    if not text.strip():
        faults.append(f"{path}: the file is empty.")
    if text.lstrip().startswith("["):
        faults.append(f"{path}: is a JSON array; write an object per line (jq -c '.[]' {file} > LINES.json).")
        return
    for number, line in enumerate(text_lines(text), 1):
        try:
            data = parse_json(line) if line.strip() else None
        except ValueError as error:
            faults.append(f"{file}:{number}: not JSON ({error}).")
            continue
        if isinstance(data, dict):
            yield f"{file}:{number}", data
        elif line.strip():
            faults.append(f"{file}:{number}: a line must be a JSON object.")


def write_manifest(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a manifest in one move, so that nobody reads half of it, and packed where its name ends in ``.gz``.

    Args:
        path: the file; its folder is made, and where it is a link, the file behind it is written.
        lines: the objects of the lines.
    """
    given = Path(os.path.expanduser(path))
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    if given.exists() and not given.is_file():  # a pipe or a device takes what is written, and has no other place
        given.write_bytes(content)
        return
    target = Path(os.path.realpath(given))
    target.parent.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(content) if target.suffix == ".gz" else content
    temporary = target.with_name(f".{target.name[-99:]}.{os.getpid()}")
    try:
        temporary.write_bytes(packed)
        temporary.replace(target)
    except OSError as error:
        if not target.is_file() or error.errno not in _NO_REPLACING:
            raise
        target.write_bytes(packed)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _parse_row(data: dict[str, Any], origin: str, *, use_text: bool, tarred: bool) -> Row:
    """The row of a manifest line; a ValueError names what is wrong with the line."""
    audio, text = data.get("audio_filepath") or data.get("audio_filename"), data.get("text")
    duration, offset = to_number(data.get("duration")), to_number(data.get("offset") or 0.0)
    replay = data.get("replay") or ""
    if not isinstance(audio, str) or not audio or len(audio) > 4096 or "\0" in audio:
        raise ValueError("lacks `audio_filepath`, the path of a file.")
    if not tarred and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", audio):
        raise ValueError(f"names {short(audio)}, which is not on a disk here: copy it, and give the copy's path.")
    if duration is None or not 0 < duration <= _LONGEST:
        raise ValueError(
            f"lacks a positive `duration` in seconds, at most {_LONGEST:.0f} (got {short(data.get('duration'))})."
        )
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`text` must be a string or null (got {short(text)}).")
    if offset is None or offset < 0:
        raise ValueError(f"`offset` must be seconds ≥ 0 (got {short(data['offset'])}).")
    if now := renamed("replay", replay):
        raise ValueError(now)
    if replay not in ("", *REPLAY_VALUES) or (replay == "supervised" and not text):
        raise ValueError(f"`replay` must be kl or, for a row with text, supervised (got {short(replay)}).")
    context = parse_context(data.get("context"))
    text = (text or "").strip() if use_text else ""
    path = audio if tarred else resolve(audio, Path(origin.rsplit(":", 1)[0]).parent)
    return Row(path, duration, offset, text, context, origin, data, replay, parse_hypotheses(data.get(KEY)))


def resolve(audio: str, folder: Path) -> str:
    """NeMo's rule: a relative path that does not exist from here is relative to the manifest's folder."""
    path = os.path.expanduser(audio)
    return os.path.abspath(path if os.path.exists(path) else folder / path)


def _expand_braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return [pattern] if _is_file(pattern) else list(braceexpand(_RANGE.sub(r"{\1}", pattern), escape=False))
    except ValueError:  # unbalanced braces
        return [pattern]


def _is_file(path: str) -> bool:
    return os.path.isfile(os.path.expanduser(path))
