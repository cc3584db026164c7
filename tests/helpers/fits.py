"""Settings and training loops for tests of the mixin, without the command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups

TEXTS = ["a latte with soy", "one mocha to go", "the small tea", "thank you"]
OPTIM: dict[str, Any] = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999], "sched": None}


class LabelReward:
    """An arbitrary function of the labels, in which the members of any beam differ."""

    name = "labels"

    def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
        rows = [[sum((i + 1) * y for i, y in enumerate(h.tokens)) % 11 / 2 for h in g.hypotheses] for g in groups]
        return RewardOutput(pad_groups(rows), {})


label_reward = LabelReward()


def config(manifest: Path, *, lr: float = 1e-3, **sections: Any) -> dict[str, Any]:
    """A run's settings for tiny models: a constant rate, no guards, nothing beside the objective in the loss.

    Args:
        manifest: of the training data.
        lr: of AdamW.
        sections: keys that differ, by section.
    """
    base: dict[str, Any] = {
        "model": {
            "train_ds": {
                "manifest_filepath": str(manifest),
                "sample_rate": 16000,
                "batch_size": 2,
                "shuffle": False,
                "num_workers": 0,
            },
            "optim": OPTIM | {"lr": lr},
        },
        "feedback": {
            "pool_utterances": 2,
            "refresh_every": 1,
            "log_hypotheses_every": 0,
            "augment": False,
            "replay_augment": False,
        },
        "proposals": {"beam": 4, "boosted": 0, "samples": 6, "max_members": 8, "max_symbols": 3},
        "objective": {"name": "distill", "mass_weight": 0.0},
        "reward": {"name": "length", "alpha": 1.0},  # most tests give their own to ``setup_feedback``
        "context": {"description": "an order"},
        "guards": {"every": 0},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return base


def fit(model: Any, *, steps: int, train_ds: Any = None, **settings: Any) -> Any:
    """Trains for some optimizer steps.

    Args:
        model: after ``setup_feedback``, or a stock one.
        steps: to take.
        train_ds: of a stock model, which then learns as :func:`config` has it.
        settings: of the trainer.
    """
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(max_steps=steps, **(defaults | settings))
    model.set_trainer(trainer)
    if train_ds is not None:
        model.setup_training_data(OmegaConf.create(train_ds))
        model.cfg.optim = OmegaConf.create({name: value for name, value in OPTIM.items() if name != "sched"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.fit(model)
    return trainer


def begin(model: Any) -> Any:
    """What training starts with, after ``setup_feedback`` and without a step; the model then counts as in step 0."""
    where = {"global_rank": 0, "local_rank": 0, "world_size": 1}
    plugin = pl.plugins.Precision()
    model._trainer = SimpleNamespace(global_step=0, ckpt_path=None, barebones=True, precision_plugin=plugin, **where)
    model.on_fit_start()
    return model.feedback
