"""Reads transcripts from a file: JSON Lines with ``audio_filepath`` and ``pred_text``, as NeMo's scripts write."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.errors import ManifestError, list_faults
from nemo_llm_feedback.core.text_files import to_number
from nemo_llm_feedback.data.manifests import Row, json_lines, parse_context
from nemo_llm_feedback.evaluation.comparison import Member, System

Line = tuple[str, dict[str, Any]]


def read_predictions(path: str | Path, rows: Sequence[Row], *, name: str) -> System:
    """The transcripts of one file in the order of the rows.

    An utterance is the same where ``offset`` and the audio path are, the path as written or made absolute from here or
    from the file's folder. ``nbest`` may hold strings, or objects with ``text`` and numbers (or a mapping of numbers).

    Args:
        path: the file.
        rows: the utterances.
        name: the system's name.

    Raises:
        ManifestError: unreadable lines, repeated utterances, or another set of utterances than the rows; all listed.
    """
    lines = _read_lines(path)
    index: dict[tuple[str, float], int] = {}
    faults = []
    for k, (origin, data) in enumerate(lines):
        keys = _keys(data, Path(path))
        if any(key in index for key in keys):
            faults.append(f"{origin}: {data.get('audio_filepath')} occurs twice.")
        index.update(dict.fromkeys(keys, k))
    found = [next((index[key] for key in _row_keys(row) if key in index), None) for row in rows]
    faults += [f"{row.origin}: {row.audio} is not in it." for row, k in zip(rows, found, strict=True) if k is None]
    strangers = sorted(set(range(len(lines))) - {k for k in found if k is not None})
    if not faults:
        faults += [f"{lines[k][0]}: {lines[k][1].get('audio_filepath')} is not among the rows." for k in strangers]
    if faults:
        head = (
            f"{path} and the {len(rows)} rows to score are not the same set ({len(faults)} fault(s)); systems are "
            "compared on the same utterances only:"
        )
        raise ManifestError(list_faults(head, faults))
    chosen = [lines[k][1] for k in found if k is not None]
    nbest = tuple(_nbest(data, path) for data in chosen)
    return System(name, tuple(data["pred_text"] for data in chosen), nbest if all(nbest) else ())


def rows_of_predictions(path: str | Path) -> list[Row]:
    """The rows that a predictions file holds itself: its ``text`` is the reference; a ``duration`` is not needed."""
    rows = []
    for origin, data in _read_lines(path):
        audio = _absolute(str(data.get("audio_filepath") or data.get("audio_filename")), Path(path).parent)
        try:
            context = parse_context(data.get("context"))
        except ValueError as error:
            raise ManifestError(f"{origin}: {error}") from None
        duration = to_number(data.get("duration")) or 0.0
        rows.append(Row(audio, duration, _offset(data), str(data.get("text") or "").strip(), context, origin, data))
    return rows


def _read_lines(path: str | Path) -> list[Line]:
    lines, faults = [], []  # type: list[Line], list[str]
    for origin, data in json_lines(path, faults):
        if not isinstance(data.get("audio_filepath") or data.get("audio_filename"), str):
            faults.append(f"{origin}: lacks `audio_filepath`.")
        elif to_number(data.get("offset") or 0.0) is None:
            faults.append(f"{origin}: `offset` must be seconds (got {data['offset']!r}).")
        elif not isinstance(data.get("pred_text"), str):
            faults.append(f"{origin}: lacks `pred_text`, the transcript ('' where nothing was heard).")
        else:
            lines.append((origin, data))
    if faults:
        raise ManifestError(list_faults(f"{len(faults)} fault(s) in the predictions; correct these lines:", faults))
    return lines


def _nbest(data: Mapping[str, Any], path: str | Path) -> tuple[Member, ...]:
    members = []
    found = data.get("nbest") or []
    for item in found if isinstance(found, list) else [found]:
        if isinstance(item, str):
            members.append(Member(item))
        elif isinstance(item, Mapping) and isinstance(item.get("text", item.get("pred_text")), str):
            nested = {k: v for part in item.values() if isinstance(part, Mapping) for k, v in part.items()}
            found_in = {k: v for k, v in {**item, **nested}.items() if type(v) in (int, float)}
            numbers = {k: n for k, v in found_in.items() if (n := to_number(v)) is not None}
            members.append(Member(item.get("text", item.get("pred_text")), numbers))
        else:
            raise ManifestError(f"{path}: `nbest` holds {item!r}; a member is a string or an object with `text`.")
    return tuple(members)


def _keys(data: Mapping[str, Any], file: Path) -> set[tuple[str, float]]:
    audio = str(data.get("audio_filepath") or data.get("audio_filename"))
    return {(name, _offset(data)) for name in (audio, _absolute(audio, Path.cwd()), _absolute(audio, file.parent))}


def _row_keys(row: Row) -> list[tuple[str, float]]:
    raw = row.data.get("audio_filepath") or row.data.get("audio_filename") or row.audio
    return [(_absolute(row.audio, Path.cwd()), round(row.offset, 3)), (str(raw), round(row.offset, 3))]


def _absolute(audio: str, folder: Path) -> str:
    return os.path.normpath(os.path.abspath(folder / Path(audio).expanduser()))


def _offset(data: Mapping[str, Any]) -> float:
    return round(to_number(data.get("offset") or 0.0) or 0.0, 3)
