"""The example of rescoring in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import load_script
from helpers.tiny import write_audio


def test_the_example_prints_both_transcripts_and_the_parts_of_the_scores(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_script("examples/transcribe_rescored.py")
    audio = str(write_audio(tmp_path / "a.wav", seconds=1.0, seed=0))
    example.main(str(nemo_file("ctc_bpe")), str(tiny_llm), "an order at a coffee shop", audio)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(audio)
    assert lines[start + 1].startswith("  greedy:   ")
    assert lines[start + 2].startswith("  rescored: ")
    assert all(part in lines[start + 3] for part in ("llm", "asr", "length"))
