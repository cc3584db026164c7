"""General speech is safe by default: the sentences that ship, when they watch a run, and how far they move it back."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from helpers.runs import run, weights
from helpers.tiny import write_manifest
from setuptools import find_packages

from nemo_llm_feedback.cli.jobs.adapt import summary
from nemo_llm_feedback.core.config import RunConfig, parse_run_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.training import inputs
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator
from nemo_llm_feedback.training.inputs import _EVERYDAY, everyday_rows

ROOT = Path(__file__).resolve().parents[2]
ENGLISH: Any = SimpleNamespace(labels=(*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "'", "ß"))


def test_the_shipped_sentences_are_small_readable_and_in_the_wheel() -> None:
    folder = Path(_EVERYDAY).parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    rows = read_manifest(_EVERYDAY)
    assert {Path(row.audio) for row in rows} == set(folder.glob("audio/*"))
    for row in rows:
        info = soundfile.info(row.audio)
        assert (info.samplerate, info.channels, bool(row.text)) == (16000, 1, True)
        assert info.duration == pytest.approx(row.duration, abs=0.05)
        assert row.duration <= 5
    package = "nemo_llm_feedback.evaluation"
    assert package in find_packages(str(ROOT), include=["nemo_llm_feedback*"])
    assert f'"{package}": ["everyday/*", "everyday/audio/*"]' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_the_quickstart_reports_no_sentence_that_chooses_weights() -> None:
    names = {Path(row.audio).name for row in read_manifest(_EVERYDAY)}
    shipped = {path.name for path in (ROOT / "examples" / "quickstart" / "data" / "audio").rglob("*.ogg")}
    assert shipped
    assert not names & shipped


@pytest.mark.parametrize(
    ("guards", "labels", "replays", "watched"),
    [
        ({}, ENGLISH.labels, False, True),
        ({}, ENGLISH.labels, True, False),
        ({}, tuple("абвгд"), False, False),
        ({}, ENGLISH.labels[:20], False, False),
        ({"everyday": "none"}, ENGLISH.labels, False, False),
        ({"every": 0}, ENGLISH.labels, False, False),
        ({"manifest_filepath": "mine.json"}, ENGLISH.labels, False, False),
        ({"everyday": "en"}, tuple("абвгд"), True, True),
    ],
)
def test_the_shipped_sentences_watch_where_nothing_else_does(
    guards: dict[str, Any], labels: Any, replays: bool, watched: bool
) -> None:
    config = parse_run_config({"guards": guards, "reward": {"name": "length"}})
    found = everyday_rows(config, SimpleNamespace(labels=labels), replays=replays)  # type: ignore[arg-type]
    assert len(found) == (60 if watched else 0)


def test_two_guard_sets_and_one_that_is_never_measured_are_refused() -> None:
    for guards, text in (
        ({"everyday": "en", "manifest_filepath": "mine.json"}, "both name the guard set"),
        ({"everyday": "en", "every": 0}, "everyday=en needs held-out measurements"),
    ):
        with pytest.raises(ConfigError, match=text):
            parse_run_config({"guards": guards, "reward": {"name": "length"}})


@pytest.mark.parametrize(
    ("start", "everyday", "share"), [(50.0, "auto", 0.4), (10.0, "auto", 0.2), (95.0, "auto", 1.0), (95.0, "en", 0.7)]
)
def test_the_update_goes_back_to_what_everyday_speech_bears(
    start: float,
    everyday: str,
    share: float,
    nemo_file: Any,
    tiny_llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The WER rises by 2.5 points over the update, and may by 2 % of the start's, but of 25 % at least."""
    base, name = weights(nemo_file("ctc_bpe")), "decoder.decoder_layers.0.weight"
    ends = [torch.tensor(1e-9)]

    def wer(self: Any, model: Any) -> float:
        moved = (dict(model.named_parameters())[name].detach() - base[name]).norm()
        ends.append(moved)
        return start + 2.5 * float(moved / max(ends)) - 1e-3 * float(moved > 0)

    sentences = write_manifest(tmp_path / "en.json", ["a latte", "one mocha to go"])  # in the tiny model's letters
    monkeypatch.setattr(inputs, "_EVERYDAY", str(sentences))
    monkeypatch.setattr(HeldOutEvaluator, "wer", wer)
    monkeypatch.setattr(HeldOutEvaluator, "_gains", lambda self, now: [1.0] * len(now.texts))
    pool = write_manifest(tmp_path / "pool.json", [None] * 6)
    guards = ("guards.every=5", "guards.max_kl=1e3", f"guards.everyday={everyday}")
    result = run(nemo_file("ctc_bpe"), pool, tiny_llm, tmp_path, "trainer.max_steps=5", *guards)
    assert result.share == share
    assert all(math.isnan(found.wer_rise) for found in result.history), "not measured in the middle"
    if share == 1.0:
        assert result.guard_wer == ()
    else:
        moved = (weights(result.nemo)[name] - base[name]).norm()
        assert math.isclose(float(moved / max(ends)), share, rel_tol=1e-4)
        assert result.guard_wer == pytest.approx((start, start + 2.5 * share), abs=0.01)
    told = summary(result)
    # At a start of 95 % the model is of another language, and the sentences say nothing of it.
    watched = (start, everyday) != (95.0, "auto")
    assert ("general     watched on 2 English sentences that ship with the package" in told) == watched
    assert ("general     neither held nor watched" in told) != watched
    assert ("its WER" in told) == (share < 1)


def test_a_run_that_nothing_watches_has_it_in_its_summary(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    pool = write_manifest(tmp_path / "pool.json", [None] * 6)
    result = run(nemo_file("ctc_bpe"), pool, tiny_llm, tmp_path)
    assert "general     neither held nor watched: give replay rows" in summary(result)


def test_replay_rows_have_the_recommended_weight() -> None:
    assert RunConfig().feedback.replay_weight == 2
    assert RunConfig().feedback.replay_augment is None
