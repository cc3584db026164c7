"""What only a GPU can show. All of it skips without one; none of it has run yet (no GPU was at hand)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import TEXTS, config, fit, label_reward
from helpers.tiny import stock_class, write_manifest

from nemo_llm_feedback.training.models import restore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


GPU = {"accelerator": "gpu", "deterministic": "warn"}


@pytest.mark.parametrize("kind", ["tdt_bpe", "hybrid_tdt_bpe"])
def test_labelled_tdt_batches_are_bit_equal_to_stock(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    mixed = write_manifest(tmp_path / "mixed.json", [*TEXTS, None, None])
    stock = stock_class(kind).restore_from(str(nemo_file(kind)))
    labelled = write_manifest(tmp_path / "all.json", TEXTS)
    fit(stock, steps=2, train_ds=config(labelled)["model"]["train_ds"], **GPU)
    ours = restore(nemo_file(kind))
    ours.setup_feedback(config(mixed), work_dir=tmp_path / "run", reward=label_reward)
    fit(ours, steps=2, **GPU)
    for key, value in stock.state_dict().items():
        assert torch.equal(value.cpu(), ours.state_dict()[key].cpu()), key


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "tdt_bpe", "hybrid_bpe"])
def test_the_feedback_pass_runs_in_eval_mode_on_cuda(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    """cuDNN refuses the backward of an LSTM in eval mode; the likelihood must have switched it off."""
    model = restore(nemo_file(kind))
    model.setup_feedback(
        config(write_manifest(tmp_path / "m.json", [None] * 4)), work_dir=tmp_path / "run", reward=label_reward
    )
    before = {k: v.cpu().clone() for k, v in model.state_dict().items()}
    fit(model, steps=2, **GPU)
    assert any(not torch.equal(v.cpu(), before[k]) for k, v in model.state_dict().items())
