"""Checks a training set and writes the copies of its manifests ("staged") that NeMo's loaders train on.

In a copy audio paths are absolute, ``text`` is always a string (absent, null and empty are the same: no transcript) in
letters of the checkpoint, and rows that the run cannot use are left out *and listed*. The originals are never changed.
The copies are needed because NeMo's classic loader fails on ``text: null``, both loaders drop long rows without naming
them, and neither reads manifests with a byte order mark.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.errors import ManifestError, list_faults
from nemo_llm_feedback.data.audio import unreadable, unreadable_members
from nemo_llm_feedback.data.manifests import Row, expand_paths, read_manifest, split_paths, spread, write_manifest

MIN_HELD_OUT = 4
# Keys that would take the place of those set here, or tell Lhotse that a file has one channel.
_DROPPED = ("audio_filename", "text_filepath", "normalized_text", "sampling_rate", "sample_rate")
# NeMo reads these in a path as a pattern.
_PATTERN = ",{}()[]<>"


@dataclass(frozen=True)
class Staged:
    """A staged training set.

    Attributes:
        manifest_filepath: the value for NeMo's ``manifest_filepath``, in the same form as the user's.
        rows: the rows of the copies, in order; NeMo's classic sample id is an index into it.
        held_out: unlabeled rows that are not trained on and on which the policy is measured; in no copy.
        left_out: why → the rows that are in no copy for that reason, each as ``origin: reason``.
    """

    manifest_filepath: Any
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...] = ()
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def num_labelled(self) -> int:
        """Rows with a transcript."""
        return sum(bool(row.text) for row in self.rows)

    @property
    def num_unlabeled(self) -> int:
        """Rows that are learned from feedback."""
        return sum(row.unlabeled for row in self.rows)

    @property
    def sources(self) -> list[str]:
        """The other recognisers that gave texts of rows that may be learned from feedback."""
        return sorted({text.source for row in self.rows if row.replay != "kl" for text in row.external})

    def hours(self, *, unlabeled: bool) -> float:
        """Hours of audio of the rows that are learned from feedback, or of all others."""
        return sum(row.duration for row in self.rows if row.unlabeled == unlabeled) / 3600


def stage(
    config: Mapping[str, Any],
    folder: Path,
    *,
    use_text: bool,
    on_bad_audio: str,
    labelled: str = "supervised",
    held_out: int = 0,
    held_out_share: float = 0.0,
    spell: Callable[[str], str | None] = lambda text: text,
    progress: Callable[[str], None] = lambda message: None,
) -> Staged:
    """Checks a training data config and writes the staged copies of its manifests into ``folder``.

    Args:
        config: NeMo's ``train_ds`` with ``manifest_filepath`` and, where set, ``tarred_audio_filepaths``,
            ``is_tarred``, ``max_duration``, ``min_duration``.
        folder: an existing folder of the run.
        use_text: False = every row is unlabeled, whatever its text.
        on_bad_audio: ``error`` or ``skip``.
        labelled: what rows with text are for, see ``feedback.labelled``.
        held_out: the most unlabeled rows that are kept from training.
        held_out_share: the share of the unlabeled rows that is kept from training; none of tarred audio, whose rows
            cannot be read one by one, and none where it would be fewer than ``MIN_HELD_OUT``.
        spell: a label in letters of the checkpoint, None where it cannot be written.
        progress: receives a message at the start of long work, and one about labels that were spelled anew.

    Raises:
        ManifestError: faults in the manifests, unreadable audio under ``error``, or no row left.
    """
    manifest_filepath = config.get("manifest_filepath")
    if not manifest_filepath:
        raise ManifestError("model.train_ds.manifest_filepath is missing: give the manifest of the unlabeled audio.")
    tar_paths = config.get("tarred_audio_filepaths")
    tarred = bool(config.get("is_tarred") or tar_paths)
    rows = read_manifest(manifest_filepath, use_text=use_text, tarred=tarred)
    if labelled == "reward":
        rows = [replace(row, replay="reward") if row.text and not row.replay else row for row in rows]
    given = config.get("min_duration"), config.get("max_duration")
    shortest, longest = given[0] or 0.0, math.inf if given[1] is None else given[1]
    listed = {
        "over max_duration": tuple(f"{row.origin}: {row.duration:.2f} s" for row in rows if row.duration > longest),
        "under min_duration": tuple(f"{row.origin}: {row.duration:.2f} s" for row in rows if row.duration < shortest),
    }
    progress(f"checking the audio of {len(rows)} rows …")
    usable = [row for row in rows if shortest <= row.duration <= longest]
    lhotse = bool(config.get("use_lhotse"))
    bad = unreadable_members(usable, tar_paths, lhotse=lhotse) if tarred else unreadable(usable)
    if bad and on_bad_audio == "error":
        head = f"{len(bad)} row(s) with unreadable audio (feedback.on_bad_audio=skip leaves them out):"
        raise ManifestError(list_faults(head, bad.values()))
    listed["with unreadable audio"] = tuple(bad.values())
    kept, listed["with text that the checkpoint cannot write"] = _spelled(
        [row for i, row in enumerate(usable) if i not in bad], spell, progress
    )
    if not kept:
        raise ManifestError(
            "no row is left to train on: " + (", ".join(f"{len(n)} {why}" for why, n in listed.items() if n) + ".")
        )
    # A pool that is listed several times, to be seen oftener than the replay rows, is held out once.
    distinct = list({row.utterance: row for row in kept if row.unlabeled}.values())
    number = min(held_out, int(held_out_share * len(distinct)))
    held = () if tarred or number < MIN_HELD_OUT else tuple(spread(distinct, number))
    out = {row.utterance for row in held}
    kept = [row for row in kept if not row.unlabeled or row.utterance not in out]
    staged_path = write_copies(manifest_filepath, kept, folder, patterns=not lhotse, whole_rows=lhotse and not tarred)
    return Staged(staged_path, tuple(kept), held, {why: rows for why, rows in listed.items() if rows})


def _spelled(
    rows: Sequence[Row], spell: Callable[[str], str | None], progress: Callable[[str], None]
) -> tuple[list[Row], tuple[str, ...]]:
    """The rows with their labels in letters of the checkpoint, and those whose label has none, ``origin: 'text'``."""
    kept, unwritten, changed = [], [], []
    for row in rows:
        text = spell(row.text) if row.text else ""
        if text is None and row.replay != "kl":
            unwritten.append(f"{row.origin}: {row.text!r}")
            continue
        if text != row.text:
            changed.append(f"{row.text!r} as {text or ''!r}")
            row = replace(row, text=text or "")
        kept.append(row)
    if changed:
        labelled = sum(bool(row.text) for row in rows)
        progress(f"{len(changed)} of {labelled} labels are written in the checkpoint's letters, e.g. {changed[0]}")
    return kept, tuple(unwritten)


def write_copies(
    manifest_filepath: Any, rows: Sequence[Row], folder: Path, *, patterns: bool = True, whole_rows: bool = False
) -> Any:
    """Writes one copy per file, ``folder/<k>/<name>``.

    Args:
        manifest_filepath: NeMo's value, whose files the rows come from.
        rows: the rows to write, each into the copy of its file.
        folder: where to; made if missing.
        patterns: whether its path may have brackets, which NeMo's Lhotse reader takes for a pattern.
        whole_rows: whether a row without an offset gets it, without which that reader takes the whole file, whatever
            the row's duration.

    Returns:
        ``manifest_filepath`` in the same form with the new paths.

    Raises:
        ManifestError: a pattern in a folder's name, or a folder that NeMo would read as a pattern.
    """
    folder = Path(os.path.abspath(folder))
    if strange := sorted(set(str(folder)) & set("," if patterns else _PATTERN)):
        raise ManifestError(f"{folder}: NeMo cannot read a path with {' '.join(strange)}; choose another run folder.")
    by_file: dict[str, dict[str, Row]] = {}  # by line, as a file that is listed twice gives its rows twice
    for row in rows:
        by_file.setdefault(row.origin.rsplit(":", 1)[0], {})[row.origin] = row
    targets = (folder / str(k) for k in itertools.count())

    def _copy(node: Any) -> Any:
        if not isinstance(node, (str, Path)):
            return [_copy(item) for item in node]
        return ",".join(_write_copy(part, by_file, next(targets), whole_rows) for part in split_paths(node))

    return _copy(manifest_filepath)


def _write_copy(pattern: str, by_file: Mapping[str, Mapping[str, Row]], target: Path, whole_rows: bool) -> str:
    """Copies the files of one pattern, and returns the pattern of the copies."""
    names = list(map(os.path.expanduser, expand_paths(pattern)))
    files = list(map(Path, names))
    source = Path(pattern)
    if len(files) > 1 and any(brace in str(source.parent) for brace in ("{", "_OP_")):
        raise ManifestError(f"{pattern}: braces are supported in the file name only; list the folders instead.")
    for name, file in zip(names, files, strict=True):
        # Every rank writes the same copies, perhaps while another reads them.
        copy = file.name.removesuffix(".gz") if len(files) > 1 else _plain_name(file)
        lines = [_staged_line(row, offset=whole_rows) for row in by_file.get(name, {}).values()]
        write_manifest(target / copy, lines)
    return str(target / (source.name.removesuffix(".gz") if len(files) > 1 else _plain_name(files[0])))


def _plain_name(file: Path) -> str:
    return file.name.removesuffix(".gz").translate(dict.fromkeys(map(ord, _PATTERN), "_"))


def _staged_line(row: Row, *, offset: bool) -> dict[str, Any]:
    """The row as NeMo's loaders should read it."""
    line = {key: value for key, value in row.data.items() if key not in _DROPPED}
    start = {"offset": row.offset} if offset or "offset" in line else {}
    return {**line, **start, "audio_filepath": row.audio, "duration": row.duration, "text": row.text}
