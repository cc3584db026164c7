"""Puts what other recognisers wrote under the manifest key ``hypotheses``: files of tools, N-bests of models."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.errors import ConfigError, ManifestError, list_faults
from nemo_llm_feedback.core.text_files import parse_json, read_text, stem, text_lines, to_number
from nemo_llm_feedback.core.types import ExternalText
from nemo_llm_feedback.data.external import KEY, parse_hypotheses, source_name
from nemo_llm_feedback.data.manifests import Row, json_lines, read_manifest, resolve, write_manifest
from nemo_llm_feedback.evaluation.records import check_writable

_NAMES = ("audio_filepath", "audio_filename", "audio", "path", "file")
_UNFIT = ("fit no row", "are of whole recordings whose rows are segments", "have no text")
_SAME_PLACE = 0.0015  # seconds; manifests have milliseconds


@dataclass(frozen=True)
class Joined:
    """What was written.

    Attributes:
        path: the manifest.
        rows: its rows.
        texts: texts that were added, by source.
        rows_with: rows that have got one.
        left_out: why → the entries of the other file that went to no row.
    """

    path: Path
    rows: int
    texts: Mapping[str, int]
    rows_with: int
    left_out: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        added = ", ".join(f"{count} of {source}" for source, count in self.texts.items())
        head = f"{self.path}: {self.rows_with} of {self.rows} rows have got `{KEY}` ({added})"
        lost = [
            list_faults(f"entries that {why}: {len(unfit)}", unfit) for why, unfit in self.left_out.items() if unfit
        ]
        return "\n".join([head, *lost])


@dataclass(frozen=True)
class _Entry:
    """What a file of another tool says of one recording; ``offset`` of a segment, seconds, where it has one."""

    name: str
    offset: float | None
    texts: tuple[ExternalText, ...]


def named_source(given: str | None, origin: str | Path) -> str:
    """The source's name: as given, or that of the model or file that the texts come from.

    Raises:
        ConfigError: it cannot be called so.
    """
    try:
        return source_name(given or re.sub(r"[\s,=]+", "_", stem(origin).removesuffix(".txt")))
    except ValueError as error:
        raise ConfigError(f"--source: {error}") from None


def join(manifest: str | Path, other: str | Path, *, out: str | Path, source: str | None = None) -> Joined:
    """Writes a manifest with the transcripts of another tool under ``hypotheses``.

    Args:
        manifest: the rows; may be ``out``, too.
        other: a NeMo manifest with ``pred_text``, JSON Lines with ``text``, a JSON object of file names, plain text
            with a file name and its transcript per line, or a folder of a ``.txt`` per recording.
        out: the manifest to write.
        source: the tool's name; the other file's name if None. What it gave before is replaced.

    Raises:
        ConfigError, ManifestError: a file that cannot be read, a name that fits several recordings, or no entry that
            fits any; nothing is written.
    """
    name = named_source(source, other)
    rows, folder = read_manifest(manifest), Path(other).expanduser()
    check_writable(out, inputs=(folder, *folder.rglob("*.txt"), *(row.audio for row in rows)))
    faults: list[str] = []
    by_name = _by_name(rows)
    found: dict[str, tuple[ExternalText, ...]] = {}
    unfit: tuple[list[str], ...] = ([], [], [])
    entries = list(_items(folder, faults))
    for origin, item in entries:
        try:
            entry = _entry(item, name)
            places = _utterances(entry, by_name, folder.parent)
        except ValueError as error:
            faults.append(f"{origin}: {error}")
            continue
        if len(places) == 1 and entry.texts:
            found[places[0]] = found.get(places[0], ()) + entry.texts
        else:
            unfit[0 if not places else 1 if len(places) > 1 else 2].append(entry.name)
    if faults:
        raise ManifestError(list_faults(f"{len(faults)} fault(s) in {other}:", faults))
    if not found:
        example = next(filter(None, unfit), ["none"])[0]
        raise ManifestError(
            f"{other}: none of its {len(entries)} entries fits a row of {manifest} (an entry: {example}; a row: "
            f"{rows[0].audio})."
        )
    return add_hypotheses(manifest, found, out=out, left_out=dict(zip(_UNFIT, unfit, strict=True)))


def add_hypotheses(
    manifest: str | Path,
    found: Mapping[str, Sequence[ExternalText]],
    *,
    out: str | Path,
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> Joined:
    """Writes the manifest with further hypotheses: it is read now, and replaced in one move once all is written.

    Of a row that gets texts of a source, those that it had of this source go; all else stays as it is.

    Args:
        manifest: one file.
        found: utterance → texts, of each source the best first.
        out: the manifest to write, which may be the same.
        left_out: for the summary.

    Raises:
        ManifestError: a row would have more texts than can be read; nothing is written.
    """
    folder = Path(os.path.realpath(os.path.expanduser(out))).parent
    rows = read_manifest(manifest)
    lines, faults = [], []
    for row in rows:
        line, new = relocated(row, folder), found.get(row.utterance, ())
        if new:
            sources = {text.source for text in new}
            known = zip(line.get(KEY) or (), row.external, strict=True)
            line[KEY] = [given for given, text in known if text.source not in sources] + [_plain(text) for text in new]
        try:
            parse_hypotheses(line.get(KEY))
        except ValueError as error:
            faults.append(f"{row.origin}: {error}")
        lines.append(line)
    if faults:
        raise ManifestError(list_faults(f"{len(faults)} row(s) cannot take the texts:", faults))
    write_manifest(out, lines)
    given = [text for row in rows for text in found.get(row.utterance, ())]
    with_texts = sum(bool(found.get(row.utterance)) for row in rows)
    return Joined(Path(out), len(rows), Counter(text.source for text in given), with_texts, left_out or {})


def relocated(row: Row, folder: Path) -> dict[str, Any]:
    """The row's line for a manifest in that folder: a path that would be another file from there becomes absolute."""
    line = dict(row.data)
    name = "audio_filepath" if "audio_filepath" in line else "audio_filename"
    if not Path(line[name]).is_absolute() and os.path.realpath(folder / line[name]) != os.path.realpath(row.audio):
        line[name] = row.audio
    return line


def _plain(text: ExternalText) -> dict[str, Any]:
    score = {} if text.score is None else {"score": round(text.score, 4)}
    return {"text": text.text, "source": text.source, **score}


def _by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every recording, by its path, its file's name, and that without its suffix."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for name in {row.audio, Path(row.audio).name, Path(row.audio).stem}:
            found[name].append(row)
    return found


def _utterances(entry: _Entry, by_name: Mapping[str, Sequence[Row]], folder: Path) -> list[str]:
    """The utterances that an entry of a file in that folder is about, several where it is about all of a recording.

    Of recordings of one name it is that whose path ends as the entry's does.

    Raises:
        ValueError: several recordings have the name.
    """
    name = Path(entry.name).name
    rows = next((by_name[n] for n in (resolve(entry.name, folder), name, Path(name).stem) if n in by_name), ())
    if len({row.audio for row in rows}) > 1:
        rows = [row for row in rows if _ends_as(row.audio, entry.name)] or rows
    if (recordings := len({row.audio for row in rows})) > 1:
        raise ValueError(f"{entry.name!r} is the name of {recordings} recordings: give their paths.")
    place = entry.offset
    kept = [row for row in rows if place is None or abs(row.offset - place) < _SAME_PLACE]
    return list(dict.fromkeys(row.utterance for row in kept))


def _ends_as(audio: str, name: str) -> bool:
    """Whether a recording's path, with or without its suffix, ends as this one."""
    end = Path(name).parts
    return any(path.parts[-len(end) :] == end for path in (Path(audio), Path(audio).with_suffix("")))


def _items(path: Path, faults: list[str]) -> Iterator[tuple[str, Any]]:
    """``origin`` and object with a name and a text of everything that a file or folder of another tool holds."""
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        faults += [] if files else [f"{path}: there is no .txt in this folder."]
        for file in files:
            yield str(file), {"audio": str(file.relative_to(path).with_suffix("")), "text": _text(file, faults)}
        return
    text = _text(path, faults).strip()
    if text[:1] not in ("{", "["):
        for number, line in enumerate(text_lines(text), 1):
            name, _, said = line.strip().partition("\t" if "\t" in line else " ")
            if name:
                yield f"{path}:{number}", {"audio": name, "text": said}
        return
    try:
        whole = parse_json(text)
    except ValueError:
        yield from json_lines(path, faults)
        return
    if isinstance(whole, list):
        yield from ((f"{path}: entry {number}", item) for number, item in enumerate(whole, 1))
    elif any(name in whole for name in _NAMES):
        yield f"{path}:1", whole
    else:
        yield from ((f"{path}: {name}", {"audio": name, "text": said}) for name, said in whole.items())


def _entry(item: Any, source: str) -> _Entry:
    """The entry of an object: its texts stand under ``nbest``, ``pred_text``, ``hypotheses`` or ``text``.

    What a recogniser wrote comes before what its manifest held, such as the texts of an earlier one.

    Raises:
        ValueError: it names no recording, or its texts are none.
    """
    name = next((item[key] for key in _NAMES if item.get(key)), None) if isinstance(item, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"must be an object with the recording's path under one of {', '.join(_NAMES)}.")
    said = next((item[key] for key in ("nbest", "pred_text", KEY, "text") if item.get(key) not in (None, [])), None)
    if said is None:
        raise ValueError("has no transcript: neither `pred_text` nor `text`.")
    listed = said if isinstance(said, list) else [said]
    given = [{"text": text} if isinstance(text, str) else text for text in listed]
    if not all(isinstance(text, dict) and isinstance(text.get("text"), str) for text in given):
        raise ValueError("its transcript must be a text, or a list of texts or of objects with `text`.")
    known = [{key: text[key] for key in ("text", "source", "score") if text.get(key) is not None} for text in given]
    texts = parse_hypotheses([{"source": source, **text} for text in known if text["text"].strip()])
    return _Entry(name, to_number(item.get("offset")), texts)


def _text(path: Path, faults: list[str]) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        faults.append(f"{path}: cannot be read ({error}).")
        return ""
