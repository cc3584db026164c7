"""Loggers show ten scalars on top and N-best tables, without changing what others read."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from nemo_llm_feedback.core.types import Context, Hypothesis
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.training.callbacks.loggers import HypothesisLog, ScalarNames, nbest_frame, shown_name

NAN = math.nan


@pytest.fixture
def nbest() -> NBestBatch:
    """Two utterances; of the first the second member is better, of the second one cannot be judged."""
    texts = (("a lada", "a latte"), ("um", "tea", "the"))
    members = tuple(tuple(Hypothesis(text, (1,), "beam") for text in row) for row in texts)
    rewards = torch.tensor([[-3.0, -1.0, NAN], [NAN, -2.0, -1.5]])
    none = torch.zeros(2, 3)
    return NBestBatch(("u", "v"), (Context(),) * 2, members, {"ctc": none}, {"ctc": rewards}, {}, {"llm": 2 * rewards})


def test_ten_scalars_are_on_top() -> None:
    top = {
        "held_out/gain": "held_out_gain", "held_out/kl": "held_out_kl", "held_out/length_ratio": "length_ratio",
        "held_out/wer_rise": "general_wer_rise", "feedback/reward_policy": "reward", "lr": "lr",
        "feedback/reward_gain": "reward_gain", "feedback/kl_reference": "kl",
        "val/dev/wer": "wer/dev", "val/dev/ewer": "ewer/dev",
    }  # fmt: skip
    assert {name: shown_name(name) for name in top} == {name: f"adapt/{shown}" for name, shown in top.items()}
    for name in ("feedback/reward", "feedback/reward/llm", "val/dev/oracle_wer", "val_wer", "epoch"):
        assert shown_name(name) == f"detail/{name}"


def test_loggers_show_the_new_names_and_the_rate(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    trainer: Any = SimpleNamespace(loggers=[logger], optimizers=[optimizer])
    with mock.patch.object(logger.experiment, "add_scalar") as add:
        for _ in range(2):  # a second fit renames nothing twice
            ScalarNames().on_fit_start(trainer, None)
        logger.log_metrics({"feedback/reward_policy": 1.0, "epoch": 2.0}, step=3)
        logger.log_metrics({"held_out/gain": 4.0}, step=4)
    assert [call.args for call in add.call_args_list] == [
        ("adapt/reward", 1.0, 3), ("detail/epoch", 2.0, 3), ("adapt/lr", 0.5, 3), ("adapt/held_out_gain", 4.0, 4),
    ]  # fmt: skip


def test_the_best_member_comes_first(nbest: NBestBatch) -> None:
    frame = nbest_frame(nbest, head="ctc")
    assert list(frame.columns) == ["utterance", "reward", "llm", "source", "text"]
    assert list(frame.text) == ["a latte", "a lada", "the", "tea", "um"]
    assert list(frame.llm[:2]) == [-2.0, -6.0]


def test_the_table_comes_at_the_first_step_of_every_interval(nbest: NBestBatch, tmp_path: Path) -> None:
    feedback = SimpleNamespace(cache=SimpleNamespace(latest=nbest), heads=[SimpleNamespace(name="ctc")])
    model = SimpleNamespace(feedback=feedback)
    for every, wanted in ((1, [1, 2, 3, 4, 5]), (3, [1, 4]), (0, [])):
        board, wandb = mock.Mock(spec=TensorBoardLogger), mock.Mock(spec=WandbLogger)
        log, folder = HypothesisLog(every, tmp_path / str(every)), tmp_path / str(every) / "hypotheses"
        folder.parent.mkdir()
        for step in (0, 1, 1, 2, 3, 4, 4, 5):  # gradients that are accumulated leave the step as it is
            trainer = SimpleNamespace(global_step=step, loggers=[board, wandb], is_global_zero=True)
            log.on_train_batch_end(trainer, model)  # type: ignore[arg-type]
        calls = board.experiment.add_text.call_args_list
        assert [call.args[2] for call in calls] == wanted
        assert all("a latte" in call.args[1] for call in calls)
        assert [call.kwargs["step"] for call in wandb.log_table.call_args_list] == wanted
        assert len(list(folder.glob("*.parquet"))) == len(wanted)
    kept = pd.read_parquet(tmp_path / "3" / "hypotheses" / "step_000004.parquet")
    pd.testing.assert_frame_equal(kept, nbest_frame(nbest, head="ctc"), check_dtype=False)
    other = SimpleNamespace(global_step=1, loggers=[], is_global_zero=False)
    HypothesisLog(1, tmp_path / "rank").on_train_batch_end(other, model)  # type: ignore[arg-type]
    assert not (tmp_path / "rank").exists()
