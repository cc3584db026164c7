"""Writes results: records as JSON, values as text or Markdown tables and as lists of facts."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic_core

from nemo_llm_feedback.core.errors import ConfigError


def to_plain(record: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON has them; what is not a finite number is None."""
    return pydantic_core.to_jsonable_python(record, inf_nan_mode="null")


def to_json(record: Any) -> str:
    """A record as JSON text, all numbers in full precision; undefined ones are null."""
    return pydantic_core.to_json(record, indent=2, inf_nan_mode="null").decode()


def write_record(path: str | Path, record: Any) -> None:
    """Writes a record as a JSON file.

    Raises:
        ConfigError: the file cannot be written.
    """
    check_writable(path).write_text(to_json(record) + "\n", encoding="utf-8")


def check_writable(path: str | Path, *, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The path of a file that is going to be written; its folder is made.

    Args:
        path: of the file, which need not exist; one that exists is left as it is.
        inputs: what the command reads, which a result must not take the place of.

    Raises:
        ConfigError: it is a folder or one of the inputs, or its folder cannot be made or written to.
    """
    target = Path(path).expanduser()
    known = (os.path.expanduser(given) for given in inputs if given) if target.exists() else ()
    if any(os.path.exists(given) and target.samefile(given) for given in known):
        raise ConfigError(f"{path} would be written over, and this command reads it: give another file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") if target.exists() else tempfile.TemporaryFile(dir=target.parent):
            return target
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give a file in a folder of yours.") from None


@dataclass(frozen=True)
class Table:
    """Values in named columns; None and '' leave a cell empty, NaN is shown as '–', numbers get two decimals.

    Attributes:
        columns: the heads of the columns.
        rows: one value per column.
        caption: a sentence below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def to_text(self) -> str:
        """Aligned columns for a terminal (numbers to the right), with a rule below the heads and the caption last."""
        lines = [list(self.columns), *([_shown(value) for value in row] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        right = [any(isinstance(row[i], (int, float)) for row in self.rows) for i in range(len(self.columns))]
        lines.insert(1, ["-" * width for width in widths])
        text = "\n".join(
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in lines
        )
        return f"{text}\n\n{self.caption}" if self.caption else text

    def to_markdown(self) -> str:
        """A GitHub table, with the caption below."""
        lines = [[_escape(_shown(value)) for value in line] for line in (self.columns, *self.rows)]
        lines.insert(1, ["---", *["---:"] * (len(self.columns) - 1)])
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{text}\n\n{self.caption}" if self.caption else text


def facts_text(facts: Mapping[str, Any]) -> str:
    """One line per fact: its name, then its value; names are aligned."""
    width = max(map(len, facts), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value)}".rstrip() for name, value in facts.items())


def _shown(value: Any) -> str:
    """A value in a cell."""
    if isinstance(value, float):
        return f"{value:.2f}" if math.isfinite(value) else "–"
    return "" if value is None else str(value)


def _escape(text: str) -> str:
    """Keeps a name with a bar or a line break inside its cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")
