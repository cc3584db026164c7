"""What only a GPU can show. All of it skips without one; none of it has run yet (no GPU was at hand)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import TEXTS, config, label_reward
from helpers.tiny import stock_class, write_manifest

from nemo_llm_feedback.training import setup as preparation
from nemo_llm_feedback.training.models import restore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _fit(model: Any, *, steps: int, train_ds: Any = None) -> None:
    import lightning.pytorch as pl
    from omegaconf import OmegaConf

    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        deterministic="warn",
    )
    model.set_trainer(trainer)
    if train_ds is not None:
        model.setup_training_data(OmegaConf.create(train_ds))
    torch.manual_seed(0)
    model.setup_optimization(OmegaConf.create({"name": "adamw", "lr": 1e-3, "weight_decay": 0.0}))
    trainer.fit(model)


@pytest.mark.parametrize("kind", ["tdt_bpe", "hybrid_tdt_bpe"])
def test_labelled_tdt_batches_are_bit_equal_to_stock(
    kind: str, nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "make_reward", lambda config, scorer: label_reward)
    mixed = write_manifest(tmp_path / "mixed.json", [*TEXTS, None, None])
    stock = stock_class(kind).restore_from(str(nemo_file(kind)))
    labelled = write_manifest(tmp_path / "all.json", TEXTS)
    _fit(stock, steps=2, train_ds=config(labelled)["model"]["train_ds"])
    ours = restore(nemo_file(kind))
    ours.setup_feedback(config(mixed), work_dir=tmp_path / "run")
    _fit(ours, steps=2)
    for key, value in stock.state_dict().items():
        assert torch.equal(value.cpu(), ours.state_dict()[key].cpu()), key


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "tdt_bpe", "hybrid_bpe"])
def test_the_feedback_pass_runs_in_eval_mode_on_cuda(
    kind: str, nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN refuses the backward of an LSTM in eval mode; the likelihood must have switched it off."""
    monkeypatch.setattr(preparation, "make_reward", lambda config, scorer: label_reward)
    model = restore(nemo_file(kind))
    model.setup_feedback(config(write_manifest(tmp_path / "m.json", [None] * 4)), work_dir=tmp_path / "run")
    before = {k: v.cpu().clone() for k, v in model.state_dict().items()}
    _fit(model, steps=2)
    assert any(not torch.equal(v.cpu(), before[k]) for k, v in model.state_dict().items())
