"""Every script under ``examples`` can be imported and explains itself."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.py"))
PROGRAMS = [path for path in SCRIPTS if "__main__" in (FOLDER / path).read_text(encoding="utf-8")]


@pytest.fixture(autouse=True)
def _siblings() -> Iterator[None]:
    """The scripts import those of their folder by name; the next test's may have the same names."""
    before, folders = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = folders
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
def test_a_program_has_help(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(str((FOLDER / path).parent))
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(FOLDER / path), run_name="__main__")
    assert not exit.value.code
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path not in PROGRAMS], ids=str)
def test_a_module_can_be_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str((FOLDER / path).parent))
    runpy.run_path(str(FOLDER / path), run_name=path.stem)
