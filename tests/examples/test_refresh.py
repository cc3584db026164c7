"""examples/benchmarks/refresh.py counts what a refresh costs; here on the smallest sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.scripts import ROOT, load_script


@pytest.mark.slow
@pytest.mark.parametrize("own_lists", [False, True])
def test_a_refresh_scores_its_candidates_once_whatever_the_lists(
    own_lists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    refresh = load_script("examples/benchmarks/refresh.py")
    found = refresh.measure("rnnt", tmp_path, size="small", own_lists=own_lists)
    calls = {stage: numbers[0] for stage, numbers in found["stages"].items()}
    assert calls["boosted beam"] == calls["beam"] == calls["greedy"] == calls["log p of candidates"] == 1
    assert all(numbers[1] > 0 for numbers in found["stages"].values())
    assert found["members"] >= 2
