"""What the experiments with invented names need is made where it is missing, and what prevents that is named."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "experiments" / "invented_names"


@pytest.fixture
def on_demand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The module, with its results in a folder of the test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import on_demand as module

    monkeypatch.setattr(module, "HERE", tmp_path / "here")
    monkeypatch.setattr(module, "WORK", tmp_path / "here" / "work")
    yield module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def scripts(on_demand: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The scripts that were called, with their arguments; each writes what the real one would."""
    called: list[list[str]] = []

    def run(script: str, *arguments: object, shared: Path) -> None:
        words = [str(argument) for argument in arguments]
        called.append([script, *words])
        default = "data/terms.txt" if "--terms-only" in words else "data/general.json"
        out = Path(words[words.index("--out") + 1]) if "--out" in words else on_demand.HERE / default
        out.parent.mkdir(parents=True, exist_ok=True)
        if script == "train_lm.py":
            out.mkdir()
        else:
            out.write_text(" ".join(words))

    monkeypatch.setattr(on_demand, "run", run)
    return called


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like ../shared/data, with the checkpoints beside it."""
    (tmp_path / "shared" / "data" / "text").mkdir(parents=True)
    (tmp_path / "shared" / "checkpoints" / "lm").mkdir(parents=True)
    (tmp_path / "shared" / "checkpoints" / "ctc.nemo").write_text("")
    return tmp_path / "shared" / "data"


def test_the_lm_is_trained_once_and_needs_no_speech(on_demand: Any, scripts: list[list[str]], shared: Path) -> None:
    assert on_demand.lm(shared) == on_demand.HERE / "lm"
    assert (on_demand.HERE / "lm").is_dir()
    assert [call[:2] for call in scripts] == [["make_data.py", "--terms-only"], ["train_lm.py", "--start"]]
    on_demand.lm(shared)
    assert len(scripts) == 2


def test_the_base_goes_on_from_the_last_stage_that_was_made(
    on_demand: Any, scripts: list[list[str]], shared: Path
) -> None:
    (on_demand.HERE / "work").mkdir(parents=True)
    (on_demand.HERE / "work" / "stage1.nemo").write_text("")
    assert on_demand.base(shared).is_file()
    assert [call[0] for call in scripts] == ["make_data.py", "finetune_base.py", "finetune_base.py"]
    bases = [Path(call[call.index("--base") + 1]).name for call in scripts[1:]]
    assert bases == ["stage1.nemo", "stage2.nemo"]
    assert "--also" in (on_demand.HERE / "base.nemo").read_text()  # the last stage's run


def test_a_missing_folder_is_named_with_the_way_out(on_demand: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere has no text/.*--llm"):
        on_demand.lm(tmp_path / "nowhere")


def test_a_script_that_fails_ends_the_experiment_with_its_name(on_demand: Any, shared: Path) -> None:
    with pytest.raises(SystemExit, match=r"make_data\.py failed, see above"):
        on_demand.run("make_data.py", "--no-such-flag", shared=shared)


def test_speech_without_flite_names_the_package_before_anything_is_read(
    on_demand: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--shared", "nowhere", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="apt-get install flite"):
        runpy.run_path(str(FOLDER / "make_data.py"), run_name="__main__")
    assert not (tmp_path / "out").exists()
