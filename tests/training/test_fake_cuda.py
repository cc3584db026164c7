"""Runs on a device that is another one by its name alone: no tensor is left behind on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_cuda import DeviceError, FakeCuda, fake_cuda, fake_trainer
from helpers.fits import config
from helpers.tiny import write_manifest

from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.training.models import restore


class Heard:
    """Rewards of texts and of the frozen model's log p, which differ within every group."""

    name = "heard"

    def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
        rows = [[sum(map(ord, t)) % 11 + logp for t, logp in zip(g.texts, g.ref_logp, strict=True)] for g in groups]
        return RewardOutput(pad_groups(rows), {})


def test_what_meets_another_device_fails_as_on_a_gpu() -> None:
    with fake_cuda():
        there = torch.ones(3, device="cuda")
        assert isinstance(there, FakeCuda)
        assert there.is_cuda
        assert (there + 1).sum().item() == 6
        assert type(there.cpu()) is torch.Tensor
        assert torch.arange(3, device="cuda")[torch.tensor([0, 2])].tolist() == [0, 2]  # an index may stay
        for wrong in (
            lambda: there + torch.ones(3),
            lambda: torch.cat([there, torch.ones(1)]),
            there.numpy,
            lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
            lambda: torch.where(there > 0, torch.ones(3), there),
        ):
            with pytest.raises(DeviceError):
                wrong()


SETTINGS: dict[str, dict[str, Any]] = {
    "distill": {"parameters": {"ema_decay": 0.9}, "feedback": {"augment": True, "replay_augment": True}},
    "grpo": {"objective": {"name": "grpo"}, "feedback": {"score_ahead": True}},
    "banded": {"feedback": {"band_tolerance": 1e-3, "generations": 2}, "parameters": {"recompute_encoder": True}},
    "lora": {"parameters": {"lora_rank": 2, "lr_trial_steps": 2, "lr_candidates": (1e-4, 1e-3)}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("ctc_bpe", name) for name in SETTINGS), ("rnnt_bpe", "banded"), ("hybrid_tdt_bpe", "distill")],
)
def test_a_run_mixes_no_devices(kind: str, name: str, nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 10, seconds=0.4)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text(
        "".join(json.dumps(row | ({"replay": "kl"} if i > 6 else {})) + "\n" for i, row in enumerate(rows))
    )
    sections = {key: dict(values) for key, values in SETTINGS[name].items()}
    lenient = dict.fromkeys(("max_kl", "max_length_ratio", "max_repetition_rise", "max_style_change"), 1000000.0)
    given = config(
        manifest,
        objective=sections.pop("objective", {}),
        feedback={"refresh_every": 2, "pool_utterances": 4, "log_hypotheses_every": 1} | sections.pop("feedback", {}),
        guards={"every": 1, "held_out": 0.3, "patience": 0, "max_empty_rise": 1.0, **lenient},
        context={"description": "an order", "terms": ["soy latte", "mocha"]},
        proposals={"beam": 4, "boosted": 3, "samples": 2, "max_members": 6, "max_symbols": 1},
        **sections,
    )
    if "lr_candidates" in given.get("parameters", {}):
        given["model"]["optim"]["lr"] = None
    model = restore(nemo_file(kind), map_location="cpu")
    trainer = fake_trainer(max_steps=4, gradient_clip_val=1.0)
    with fake_cuda():  # raises where devices meet
        model.set_trainer(trainer)
        model.setup_feedback(given, work_dir=tmp_path / "run", reward=Heard())
        trainer.fit(model)
    assert trainer.global_step >= 2  # a generation that gains nothing is the last
