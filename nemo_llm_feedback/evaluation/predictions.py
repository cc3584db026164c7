"""Reads transcripts from a file: JSON Lines with ``audio_filepath`` and ``pred_text``, as NeMo's scripts write."""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.errors import ManifestError, list_faults
from nemo_llm_feedback.core.text_files import to_number
from nemo_llm_feedback.data.manifests import Row, json_lines, parse_context, resolve
from nemo_llm_feedback.evaluation.comparison import Member, System

Line = tuple[str, dict[str, Any]]
Key = tuple[str, float]  # audio and offset
_SAME_LENGTH = 0.0051  # seconds; manifests have at least hundredths


def read_predictions(path: str | Path, rows: Sequence[Row], *, name: str, same_texts: bool = False) -> System:
    """The transcripts of one file in the order of the rows.

    An utterance is the same where ``offset`` and the audio path are, the path as the manifest's reader resolves it, as
    written, or made absolute from here or from the file's folder. Several of one place are told apart by ``duration``,
    and equal ones are taken in their order. ``nbest`` may hold strings, or objects with ``text`` and numbers (or a
    mapping of numbers).

    Args:
        path: the file.
        rows: the utterances.
        name: the system's name.
        same_texts: whether a ``text`` of the file must be that of its row, where both have one.

    Raises:
        ManifestError: unreadable lines, another set of utterances than the rows, or other texts; all listed.
    """
    lines, file = _read_lines(path), Path(os.path.expanduser(path))
    found = _lines_of(rows, lines, file)
    taken = {key for k in found if k is not None for key in _keys(lines[k][1], file)}
    faults = []
    for row, k in zip(rows, found, strict=True):
        if k is None:
            again = "" if taken.isdisjoint(_row_keys(row)) else " once more, or not of this duration"
            faults.append(f"{row.origin}: {row.audio} is not in it{again}.")
    for k in sorted(set(range(len(lines))) - set(found)) if not faults else ():
        origin, data = lines[k]
        known = not taken.isdisjoint(_keys(data, file))
        why = "occurs twice, and less often among the rows" if known else "is not among the rows"
        faults.append(f"{origin}: {_audio(data)} {why}.")
    if faults:
        head = (
            f"{path} and the {len(rows)} rows to score are not the same set ({len(faults)} fault(s)); systems are "
            "compared on the same utterances only:"
        )
        raise ManifestError(list_faults(head, faults))
    chosen = [lines[k] for k in found if k is not None]
    pairs = zip(rows, chosen, strict=True) if same_texts else ()
    if others := [origin for row, (origin, data) in pairs if row.text and _text(data) not in ("", row.text)]:
        head = f"{len(others)} reference(s) differ between the predictions; give --manifest FILE:"
        raise ManifestError(list_faults(head, others))
    nbest = tuple(_nbest(data, path) for _, data in chosen)
    return System(name, tuple(data["pred_text"] for _, data in chosen), nbest if all(nbest) else ())


def _lines_of(rows: Sequence[Row], lines: Sequence[Line], file: Path) -> list[int | None]:
    """The line of each row, none of them twice; None where there is none."""
    rows_at: dict[Key, list[int]] = defaultdict(list)
    lines_at: dict[Key | None, list[int]] = defaultdict(list)
    place_of: dict[Key, Key] = {}
    for i, row in enumerate(rows):
        place, written = _row_keys(row)
        rows_at[place].append(i)
        place_of.setdefault(written, place)
    place_of |= {place: place for place in rows_at}
    for k, (_, data) in enumerate(lines):
        lines_at[next((place_of[key] for key in _keys(data, file) if key in place_of), None)].append(k)

    def apart(i: int, k: int) -> float:
        """Seconds between the durations of a row and a line, 0 where one has none."""
        length = to_number(lines[k][1].get("duration"))
        return abs(rows[i].duration - length) if rows[i].duration and length else 0.0

    found: list[int | None] = [None] * len(rows)
    for place, here in rows_at.items():
        there = lines_at[place]
        alone = len(here) == len(there) == 1  # other tools may count a little less or more
        used: list[int] = []
        for i in here:
            # A row that is listed more often than its line shares it.
            for known in (there, used):
                nearest = min(known, key=functools.partial(apart, i), default=None)
                if nearest is not None and (alone or apart(i, nearest) <= _SAME_LENGTH):
                    found[i] = nearest
                    used.append(nearest)
                    if known is there:
                        there.remove(nearest)
                    break
    return found


def rows_of_predictions(path: str | Path) -> list[Row]:
    """The rows that a predictions file holds itself: its ``text`` is the reference; a ``duration`` is not needed."""
    rows, folder = [], Path(os.path.expanduser(path)).parent
    for origin, data in _read_lines(path):
        audio = resolve(_audio(data), folder)
        try:
            context = parse_context(data.get("context"))
        except ValueError as error:
            raise ManifestError(f"{origin}: {error}") from None
        duration = to_number(data.get("duration")) or 0.0
        rows.append(Row(audio, duration, _offset(data), _text(data), context, origin, data))
    known = [(row.audio, row.offset, row.duration, row.text, row.data["pred_text"]) for row in rows]
    counts = Counter(known)
    if twice := [row.origin for row, line in zip(rows, known, strict=True) if counts[line] > 1]:
        head = f"{len(twice)} lines of {path} are equal to another one; give --manifest FILE if each shall count:"
        raise ManifestError(list_faults(head, twice))
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


def _keys(data: Mapping[str, Any], file: Path) -> list[Key]:
    """Where a line's audio may be, the likeliest place first."""
    audio = _audio(data)
    given = os.path.expanduser(audio)
    names = (resolve(audio, file.parent), audio, os.path.abspath(given), os.path.abspath(file.parent / given))
    return [(name, _offset(data)) for name in names]


def _row_keys(row: Row) -> tuple[Key, Key]:
    """A row's place, and the same with the path as it is written."""
    raw = row.data.get("audio_filepath") or row.data.get("audio_filename") or row.audio
    return (os.path.abspath(row.audio), round(row.offset, 3)), (str(raw), round(row.offset, 3))


def _audio(data: Mapping[str, Any]) -> str:
    return str(data.get("audio_filepath") or data.get("audio_filename"))


def _text(data: Mapping[str, Any]) -> str:
    return str(data.get("text") or "").strip()


def _offset(data: Mapping[str, Any]) -> float:
    return round(to_number(data.get("offset") or 0.0) or 0.0, 3)
