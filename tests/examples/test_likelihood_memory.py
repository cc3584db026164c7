"""The memory that examples/benchmarks/likelihood.py counts: a group of eight takes little more than one hypothesis."""

from __future__ import annotations

import pytest
from helpers.scripts import ROOT, load_script


@pytest.mark.slow
@pytest.mark.parametrize(("family", "single"), [("ctc", "nemo_single"), ("rnnt", "single"), ("tdt", "single")])
def test_eight_hypotheses_take_at_most_1_3_times_the_memory_of_one(
    family: str, single: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    likelihood = load_script("examples/benchmarks/likelihood.py")
    problem, variants = likelihood.make_problem(family, likelihood.SMALL), likelihood.variants_of(family, "cpu")
    group, one, each = (likelihood.peak_mb(problem, variants[name]) for name in ("trie", single, "per_hypothesis"))
    assert one < group <= 1.3 * one
    assert group < each
