"""Short runs of ``adapt`` for tests."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import torch

from nemo_llm_feedback.core.config.compose import compose_config

MIXED = ["a latte with soy", None, "", None, "one mocha to go", None]


def arguments(nemo: Path, manifest: Path, llm: Path, folder: Path, *more: str) -> list[str]:
    """Overrides of a short run of a tiny model with a tiny 4-bit LLM."""
    return [
        f"init_from_nemo_model={nemo}",
        f"model.train_ds.manifest_filepath={manifest}",
        f"llm.model={llm}",
        "context.description=an order at a coffee shop",
        "context.terms=[soy latte,mocha]",
        f"exp_manager.exp_dir={folder}",
        "trainer=cpu",
        "trainer.max_steps=2",
        "+trainer.enable_progress_bar=false",
        "model.train_ds.batch_size=3",
        "model.optim.lr=1e-3",
        "model.optim.sched=null",
        "proposals.beam=3",
        "proposals.boosted=3",
        "proposals.max_symbols=3",
        "feedback.pool_utterances=4",
        "proposals.boosting_weights=[]",
        "guards.every=0",
        *more,
    ]


def run(*args: Any) -> Any:
    """Composes and runs ``adapt``."""
    from nemo_llm_feedback.cli.jobs.adapt import adapt

    return adapt(compose_config(arguments(*args)))


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict inside a ``.nemo``."""
    with tarfile.open(path) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("model_weights.ckpt"))
        file = archive.extractfile(member)
        assert file is not None
        return torch.load(file, map_location="cpu", weights_only=True)
