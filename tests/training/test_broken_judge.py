"""A whole run whose LLM turns NaN in its middle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run
from helpers.tiny import write_manifest

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.llm.engine import Engine
from nemo_llm_feedback.rewards import asking
from nemo_llm_feedback.rewards.asking import ScoreCache
from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping
from nemo_llm_feedback.training.weights import snapshot

# The defaults, mass term and AdamW included, at a rate at which texts change; every step is measured.
SETTINGS = [
    "llm.quantization=none",
    "model.optim.lr=0.05",
    "feedback.refresh_every=1",
    "trainer.max_steps=5",
    "guards.every=1",
    "guards.held_out=0.4",
    "guards.patience=0",
    *(f"guards.{limit}=1e6" for limit in ("max_kl", "max_length_ratio", "max_style_change")),
    *(f"guards.{limit}=1" for limit in ("max_empty_rise", "max_repetition_rise")),
    "exp_manager.create_tensorboard_logger=false",
]


@pytest.fixture
def weights_after(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Step → weights behind it, in a run whose LLM is broken, and its cache forgotten, behind the second step."""
    after: dict[int, Any] = {}
    measure, score, known = HeldOutEarlyStopping.on_train_batch_end, Engine.score, ScoreCache.get_many

    def measured(self: Any, trainer: Any, model: Any, *args: Any) -> None:
        after[trainer.global_step] = snapshot(model)
        measure(self, trainer, model, *args)

    def scored(self: Any, requests: Any) -> Any:
        found = score(self, requests)
        return {p: dict.fromkeys(sums, math.nan) for p, sums in found.items()} if len(after) >= 3 else found

    monkeypatch.setattr(HeldOutEarlyStopping, "on_train_batch_end", measured)
    monkeypatch.setattr(Engine, "score", scored)
    monkeypatch.setattr(ScoreCache, "get_many", lambda self, keys: {} if len(after) >= 3 else known(self, keys))
    return after


def test_it_warns_and_stops_past_the_limit(
    weights_after: dict[int, Any], nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 10, seconds=0.8)
    with pytest.raises(RewardError, match=r"the LLM failed .* nothing judges the training any more"):
        run(nemo_file("ctc_char"), manifest, tiny_llm, tmp_path, *SETTINGS)
    log = (tmp_path / "adapted" / "version_0" / "log.txt").read_text()
    assert "groups got no reward from the LLM" in log
    assert 3 <= max(weights_after) < 5
    assert not list((tmp_path / "adapted").rglob("*.nemo"))


def test_below_the_limit_nothing_moves_the_weights_and_the_gain_is_not_zero_but_unknown(
    weights_after: dict[int, Any], nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mass term, which reads no reward, trained on; the gain read 0."""
    monkeypatch.setattr(asking, "_FEWEST", 10**6)
    manifest = write_manifest(tmp_path / "m.json", [None] * 10, seconds=0.8)
    result = run(nemo_file("ctc_char"), manifest, tiny_llm, tmp_path, *SETTINGS)
    for step in (1, 2):
        now, then = weights_after[step], weights_after[step + 1]
        assert any(not torch.equal(now[name], then[name]) for name in now), step
    for step in (4, 5):
        for name, value in weights_after[3].items():
            assert torch.equal(value, weights_after[step][name]), (step, name)
    gains = [found.gain for found in result.history]
    assert not any(map(math.isnan, gains[:2]))
    assert all(map(math.isnan, gains[2:]))
    assert result.kept_step <= 2
