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
    monkeypatch.setattr(refresh.joint, "_CPU_CHUNK_MB", refresh.joint._CPU_CHUNK_MB)  # is set
    found = refresh.measure("rnnt", tmp_path / "plain", size="small", own_lists=own_lists)
    counts = found["stages"]
    searches = ("boosted beam", "beam", "greedy")
    assert {counts[stage]["calls"] for stage in (*searches, "log p of candidates")} == {1}
    assert all(numbers["operators"] >= numbers["launches"] for numbers in counts.values())
    assert found["members"] >= 2
    captured = refresh.measure("rnnt", tmp_path / "graphs", size="small", own_lists=own_lists, cuda_graphs=True)
    assert captured["members"] == found["members"]
    assert captured["stages"]["inside CUDA graphs"]["calls"] == 3
    for stage in searches:
        assert captured["stages"][stage]["launches"] < counts[stage]["launches"] / 2
