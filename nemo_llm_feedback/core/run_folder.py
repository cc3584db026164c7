"""Reads and writes the files of a run folder: settings, steps, results, and the lock of a living run. No NeMo."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import weakref
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.version import __version__

_PACKAGES = ("nemo_toolkit", "torch", "lightning", "transformers", "bitsandbytes", "jiwer", "kaldialign", "numpy")
SETTINGS_FILE = "settings.yaml"
RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
STATISTICS_FILE = "pool_statistics.json"
# A killed run's score cache has a journal beside it, without which it cannot be repaired.
_SCORES = [f"llm_scores.sqlite{suffix}" for suffix in ("-journal", "-wal", "-shm", "")]
_KEPT = (SETTINGS_FILE, RUN_FILE, STEPS_FILE, RESULT_FILE, STATISTICS_FILE, LOG_FILE, *_SCORES)


def package_versions() -> dict[str, str]:
    """The versions of this package, Python and the libraries that numbers depend on; absent ones are left out."""
    out = {"nemo_llm_feedback": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # bitsandbytes is not needed to evaluate
            out[name] = importlib.metadata.version(name)
    return out


def collect(folder: Path) -> None:
    """Brings a run's files back to its folder.

    NeMo's ``exp_manager`` moves every file of a folder that it resumes into ``run_0``, ``run_1`` …; the files of the
    newest of these are taken where the folder itself has none.
    """
    for name in _KEPT:
        found = newest(folder, name)
        if found is not None and found.parent != folder:
            found.replace(folder / name)


def newest(folder: Path, name: str) -> Path | None:
    """A run's file, wherever :func:`collect` would find it; None if there is none."""
    numbered = [path for path in folder.glob("run_*") if path.name.removeprefix("run_").isdigit()]
    older = sorted(numbered, key=lambda path: int(path.name.removeprefix("run_")), reverse=True)
    return next((path / name for path in (folder, *older) if (path / name).is_file()), None)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file; a kill leaves the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of ``steps.jsonl``; a last line that a kill cut off is left out. Empty without a file.

    Raises:
        json.JSONDecodeError: another line is broken.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return found


def truncate_steps(path: Path, *, step: int) -> float:
    """Removes the lines of later steps, a last line that a kill cut off, and the validation of the step itself, which
    Lightning repeats in a resumed run.

    Args:
        path: path of ``steps.jsonl``; need not exist.
        step: the last step that is kept.

    Returns:
        ``seconds`` of the last step that is kept; 0 without any.
    """
    lines = [line for line in read_steps(path) if line["step"] <= step]
    kept = [line for line in lines if line["step"] < step or not any(key.startswith("val/") for key in line)]
    if path.is_file():
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return max((float(line.get("seconds", 0.0)) for line in kept), default=0.0)


class FolderLock:
    """Marks a run folder as in use while this process lives; the system takes the mark away from a killed one.

    Args:
        folder: an existing folder.

    Attributes:
        held: whether this process has the mark; False if another has it. A file system without locks grants it.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder, os.O_RDONLY)
        self.held = True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.held = False
        except OSError:
            pass  # network file systems may have no locks on folders, and so none to respect
        _LOCKS.add(self)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Takes the mark away, or what this process has of it."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


_LOCKS: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget() -> None:
    """A forked worker of a loader shares the mark, and would keep it for some seconds after its parent is killed."""
    for lock in _LOCKS:
        lock.release()


os.register_at_fork(after_in_child=_forget)


def in_use(folder: Path) -> bool:
    """Whether a living process trains in the folder."""
    with FolderLock(folder) as lock:
        return not lock.held
