"""The command: light help, errors without traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_llm_feedback.cli.main import main

HEAVY = ("torch", "nemo", "transformers", "hydra", "omegaconf", "lightning", "numpy", "pydantic")


@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["evaluate", "--help"], ["export", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from nemo_llm_feedback.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: nemo-llm-feedback" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scor"], 'Did you mean "score"?'),
        (["calibrate", "a.nemo"], "calibrate is now score --compare-quantization"),
        (["tune", "a.nemo"], "tune is now score --tune"),
        (["score", "a.nemo", "--manifest", "m.json", "--utterence", "3"], "Did you mean --utterances?"),
        (["score", "a.nemo", "--manifest", "m.json", "--head", "rnn"], 'Choose from: "auto", "ctc", "transducer"'),
        (["score", "a.nemo"], "--manifest requires an argument"),
        (["export", "a.nemo", "--base-share=0.5"], "--base-share is now --interpolation"),
        (["adapt", "--show-conf"], "Did you mean --show-config?"),
        (["adapt", "init_from_nemo_model=/absent.nemo", "llm.model=a/b", "context.description=x"], "no such file"),
        (["adapt", "llm.model=a/b", "context.description=x"], "exactly one of init_from_nemo_model"),
        (["adapt", "objective.tau=1"], "unknown key objective.tau"),
        (["export", "/absent.ckpt"], "no such file"),
        (["export", __file__], "cannot be read as a Lightning checkpoint"),
        (["evaluate", "/absent.nemo", "--manifest", "/absent.json"], "no such file"),
    ],
)
def test_errors_name_the_fix_and_show_no_traceback(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
