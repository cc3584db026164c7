"""The Python API: the commands as functions, with rewards as Python objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import write_manifest

import nemo_llm_feedback
from nemo_llm_feedback import FeedbackError, adapt, evaluate, score, transcribe
from nemo_llm_feedback.cli.jobs.runs import list_runs

QUICK = [
    "trainer=cpu",
    "+trainer.enable_progress_bar=false",
    "model.train_ds.batch_size=3",
    "model.optim.lr=1e-3",
    "proposals.beam=3",
    "proposals.boosted=0",
    "proposals.max_symbols=3",
    "guards.every=1",
    "guards.held_out=0.3",
    "guards.max_kl=100",
]


def shorter(texts: list[str], context: Any) -> list[float]:
    """A reward as a plain function: the fewer letters, the better."""
    return [-float(len(text)) for text in texts]


def test_every_exported_name_is_there() -> None:
    for name in nemo_llm_feedback.__all__:
        assert getattr(nemo_llm_feedback, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        nemo_llm_feedback.nothing  # noqa: B018


@pytest.mark.slow
def test_adapt_in_python_returns_what_the_run_took_and_gave(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "pool.json", [None] * 9)
    dev = write_manifest(tmp_path / "dev.json", ["a latte", "mocha"], entities=[["latte"], ["mocha"]])
    result = adapt(
        base=nemo_file("ctc_bpe"),
        manifest=manifest,
        description="an order",
        terms=["latte"],
        reward=shorter,
        validation=dev,
        output=tmp_path / "adapted.nemo",
        max_steps=2,
        overrides=[*QUICK, f"exp_manager.exp_dir={tmp_path / 'runs'}"],
    )
    assert result.nemo == tmp_path / "adapted.nemo"
    assert result.nemo.is_file()
    assert set(result.before) == set(result.after) == {"dev"}
    assert result.learning_rate == 1e-3
    assert 0 <= result.kept_step <= 2
    assert len(result.history) == 2
    assert result.alpha is None  # a function is the whole reward
    assert result.gain == result.gain
    assert result.held_out_rows == 0  # nine rows are too few
    (run,) = list_runs(tmp_path / "runs")
    assert "name: python" in (tmp_path / "runs" / run.folder / "settings.yaml").read_text()


def test_adapt_refuses_what_the_command_refuses(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "pool.json", [None] * 3)
    with pytest.raises(FeedbackError, match=r"llm\.model is missing"):
        adapt(nemo_file("ctc_bpe"), manifest, description="an order")
    with pytest.raises(FeedbackError, match=r"guards\.patience must be"):
        adapt(nemo_file("ctc_bpe"), manifest, reward=shorter, overrides=["guards.patience=-1"])


def test_evaluate_transcribe_and_score_are_functions(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    dev = write_manifest(tmp_path / "dev.json", ["a latte", "mocha"], entities=[["latte"], ["mocha"]])
    base = nemo_file("ctc_bpe")
    found = evaluate(base, dev, terms=["latte"], samples=50)
    assert found.total == 2
    texts = [hypothesis.text for hypothesis in transcribe(base, dev).hypotheses]
    assert texts == list(found.comparison.systems[0].texts)
    judged = {
        "nbest": 3,
        "reward": {"alpha": 0.1, "beta": 0.0},
        "llm": {"model": str(tiny_llm), "quantization": "none"},
    }
    rescored = transcribe(
        base, sorted((tmp_path / "wav").glob("dev_*.wav")), rescoring={**judged, "context": {"description": "x"}}
    )
    assert len(rescored.hypotheses) == 2
    report = score(base, dev, llm=tiny_llm, description="an order", overrides=["llm=full", "proposals.beam=3"])
    assert len(report.nbest) == 2
