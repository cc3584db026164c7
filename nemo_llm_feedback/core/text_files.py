"""Reads text files as people save them, with byte order mark or gzip, and the JSON in them, within bounds."""

from __future__ import annotations

import gzip
import json
import stat
import zlib
from pathlib import Path
from typing import Any

MAX_MEBIBYTES = 2048
MAX_DEPTH = 40
"""Levels of lists and objects in one JSON value; Python's own readers fail at some hundreds."""
_SUFFIXES = (".nemo", ".ckpt", ".json", ".jsonl", ".gz")
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_text(path: str | Path, *, max_mebibytes: int = MAX_MEBIBYTES) -> str:
    """The text of a regular file: UTF-8, or UTF-16 with its mark; unpacked where the name ends in ``.gz``.

    Args:
        path: the file; ``~`` is the home folder.
        max_mebibytes: the largest size, after unpacking.

    Raises:
        ValueError: no such file, not a regular file, too large, or not text; the message does not name the file.
    """
    try:
        file = Path(path).expanduser()
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("it is a folder, a pipe or a device, not a file")
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read(max_mebibytes * 2**20 + 1)
        if len(content) > max_mebibytes * 2**20:
            raise ValueError(f"it has more than {max_mebibytes} MiB")
        return content.decode(_MARKS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text, see byte {error.start}") from None
    except (OSError, EOFError, RuntimeError, zlib.error) as error:  # RuntimeError: ``~`` without a home folder
        raise ValueError(getattr(error, "strerror", None) or str(error)) from None


def stem(path: str | Path) -> str:
    """A file's name without the suffixes of its kind; a dot in a name (``parakeet-tdt-0.6b-v2``) begins none."""
    name = Path(path).name
    while cut := next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), ""):
        name = name[: -len(cut)]
    return name


def text_lines(text: str) -> list[str]:
    """The lines of a text, without their ends. JSON and terms may hold U+2028, which ``str.splitlines`` cuts at."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, nested deeper than `MAX_DEPTH`, or with half a surrogate pair, which no file can hold.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nodes = [list(node.values()) if isinstance(node, dict) else node for node in level]
        level = [child for node in nodes if isinstance(node, list) for child in node]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def to_number(value: Any) -> float | None:
    """The number of a JSON value, which people also write as text (``"1.5"``); None where it is not a finite one."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) != float("inf") and number == number else None
