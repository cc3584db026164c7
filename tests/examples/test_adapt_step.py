"""examples/benchmarks/adapt_step.py times whole steps of a run; here on the smallest sizes, where no ratio counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.scripts import ROOT, load_script

from nemo_llm_feedback.asr.heads import CTCHead, TransducerHead
from nemo_llm_feedback.training.mixin import LLMFeedbackMixin


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ctc", "tdt"])
def test_a_round_has_a_supervised_a_fresh_and_a_kept_step(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    adapt_step = load_script("examples/benchmarks/adapt_step.py")
    head, done = (CTCHead if family == "ctc" else TransducerHead), []

    def watched(owner: type, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: (done.append(name), function(*args, **kw))[1])

    for owner, name in ((LLMFeedbackMixin, "training_step"), (LLMFeedbackMixin, "_labelled_step"), (head, "beam")):
        watched(owner, name)
    found = adapt_step.measure(family, tmp_path, shape="tiny", rounds=1)
    steps = " ".join(done).split("training_step")[-4:]  # the last round
    beams = [part.split().count("beam") for part in steps]
    assert [part.split().count("_labelled_step") for part in steps] == [1, 0, 1, 0]
    assert beams[0] == beams[2] == beams[3] == 0 < beams[1]
    assert found["loss"] == ("NeMo's" if family == "ctc" else "ours")
    assert found["members"] >= 2
    assert {name: len(times) for name, times in found["seconds"].items()} == {"supervised": 1, "fresh": 1, "kept": 1}
    assert min(found["ratios"].values()) > 0
