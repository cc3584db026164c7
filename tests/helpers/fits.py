"""Settings and training loops for tests of the mixin, without the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups

TEXTS = ["a latte with soy", "one mocha to go", "the small tea", "thank you"]


def label_reward(groups: list[HypothesisGroup]) -> RewardOutput:
    """An arbitrary function of the labels, in which the members of any beam differ."""
    rows = [[sum((i + 1) * y for i, y in enumerate(h.tokens)) % 11 / 2 for h in g.hypotheses] for g in groups]
    return RewardOutput(pad_groups(rows), {})


def config(manifest: Path, **sections: Any) -> dict[str, Any]:
    """A run's settings for tiny models."""
    base: dict[str, Any] = {
        "model": {
            "train_ds": {
                "manifest_filepath": str(manifest),
                "sample_rate": 16000,
                "batch_size": 2,
                "shuffle": False,
                "num_workers": 0,
            }
        },
        "feedback": {"pool_utterances": 2, "refresh_every": 1, "log_hypotheses_every": 0, "augment": False},
        "proposals": {"beam": 4, "boosted": 0, "samples": 6, "max_members": 8, "max_symbols": 3},
        "objective": {"name": "distill"},
        "reward": {"name": "length", "alpha": 1.0},  # tests put their own in its place
        "context": {"description": "an order"},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return base


def fit(model: Any, *, steps: int, lr: float = 1e-3, train_ds: Any = None) -> Any:
    """Trains for some optimizer steps with a constant rate."""
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    model.set_trainer(trainer)
    if train_ds is not None:
        model.setup_training_data(OmegaConf.create(train_ds))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.setup_optimization(OmegaConf.create({"name": "adamw", "lr": lr, "weight_decay": 0.0}))
        trainer.fit(model)
    return trainer
