"""examples/benchmarks/score_ahead.py, on the smallest sizes; the wait is long, so that its place shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.scripts import ROOT, load_script


@pytest.mark.slow
def test_the_reward_is_asked_in_both_runs_and_the_times_are_of_whole_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    benchmark = load_script("examples/benchmarks/score_ahead.py")
    asked: list[float] = []
    monkeypatch.setattr(benchmark.time, "sleep", asked.append)  # nothing waits, so that no time is tested
    found = benchmark.measure(tmp_path, shape="tiny", waits=[1.0])
    assert list(found) == ["1"]
    assert min(found["1"].values()) > 0
    per_run = len(asked) // 4  # two that wait for nothing, one each with the setting off and on
    assert per_run >= 4 * benchmark.BATCHES  # each batch of every epoch, and the pool
    assert set(asked[: 2 * per_run]) == {0.0}
    assert len({*asked[2 * per_run :]}) == 1
    assert asked[-1] > 0
