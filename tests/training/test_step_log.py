"""``steps.jsonl``: a line a step, none twice, none lost."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_llm_feedback.core.run_folder import FolderLock, collect, in_use, read_steps, truncate_steps
from nemo_llm_feedback.training.callbacks.step_log import StepLog, log_values


def trainer(step: int, **metrics: float) -> Any:
    """What the callback reads of a trainer."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    values = {name.replace("__", "/"): torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(global_step=step, callback_metrics=values, optimizers=[optimizer], is_global_zero=True)


def test_a_line_for_every_optimizer_step_and_for_what_others_log(tmp_path: Path) -> None:
    log = StepLog(tmp_path)
    log.on_train_start(trainer(0), None)
    log.on_train_batch_end(trainer(0), None)  # gradients are still being accumulated
    log.on_train_batch_end(trainer(1, feedback__reward=2.0, feedback__gap=math.nan, val_wer=9.0, train_loss=3.0), None)
    log.on_train_batch_end(trainer(1), None)
    logged: list[Any] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append((values, step)))
    others = SimpleNamespace(loggers=[logger], callbacks=[object(), log], is_global_zero=True)
    measured = {"val/dev/wer": torch.tensor(12.5), "val/dev/ewer": math.nan}
    log_values(others, measured, step=1)  # type: ignore[arg-type]
    assert logged == [(measured, 1)]
    first, second = read_steps(tmp_path / "steps.jsonl")
    assert first.pop("seconds") >= 0
    assert first == {"step": 1, "lr": 0.5, "feedback/reward": 2.0, "train_loss": 3.0}
    assert second == {"step": 1, "val/dev/wer": 12.5}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log, other = StepLog(tmp_path), trainer(1)
    other.is_global_zero = False
    log.on_train_start(other, None)
    log.on_train_batch_end(other, None)
    assert not (tmp_path / "steps.jsonl").exists()


def test_a_resumed_run_writes_no_step_twice_and_goes_on_counting_seconds(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    lines = [{"step": 1, "seconds": 5.0}, {"step": 2, "seconds": 9.0}, {"step": 2, "val/dev/wer": 1.0}]
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "seconds": 12.0}]) + '{"step": 4, "s'
    )
    log = StepLog(tmp_path)
    log.on_train_start(trainer(2), None)
    assert read_steps(path) == lines[:2]  # Lightning validates again at the step that it resumes
    log.on_train_batch_end(trainer(3), None)
    assert [line["step"] for line in read_steps(path)] == [1, 2, 3]
    assert read_steps(path)[-1]["seconds"] >= 9.0
    assert truncate_steps(tmp_path / "absent", step=3) == 0.0


def test_files_that_exp_manager_moved_come_back(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"run_{number}").mkdir()
        (tmp_path / f"run_{number}" / "steps.jsonl").write_text(str(number))
    (tmp_path / "run_0" / "settings.yaml").write_text("old")
    (tmp_path / "settings.yaml").write_text("new")
    (tmp_path / "run_1" / "cmd-args.log").write_text("NeMo's")
    collect(tmp_path)
    assert (tmp_path / "steps.jsonl").read_text() == "1"
    assert (tmp_path / "settings.yaml").read_text() == "new"
    assert (tmp_path / "run_1" / "cmd-args.log").is_file()


def test_a_folder_is_in_use_while_its_mark_is_held(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert lock.held
    assert in_use(tmp_path)
    assert not FolderLock(tmp_path).held
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()  # as a loader's, which outlives its killed parent for some seconds
    lock.release()
    deadline = time.monotonic() + 30
    while in_use(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)  # until the worker has run at all
    assert not in_use(tmp_path)
    assert worker.is_alive()
    worker.kill()
    worker.join()
