"""A run that is killed goes on as if nothing had happened, and one that cannot end well does not start."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.ranks import adapt_with, run_ranks, start
from helpers.runs import arguments, run, weights
from helpers.tiny import write_manifest
from helpers.tiny_llm import make_tiny_llm
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoTokenizer

from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.jobs.run_choice import record_start, run_folder, settings_text
from nemo_llm_feedback.cli.jobs.start import check_room, result_folders
from nemo_llm_feedback.core.errors import ConfigError, TrainingError
from nemo_llm_feedback.core.run_folder import FolderLock, in_use, read_steps
from nemo_llm_feedback.data.resumable_loader import ResumableLoader
from nemo_llm_feedback.training.resume import count_finished_batch, place_in_data, random_states, set_random_states

# Seven rows in batches of three: steps 3, 6 and 9 end an epoch, all others are in the middle of one.
TEXTS = ["a latte", None, None, "one mocha", None, None, None]
# Ordinary settings, shuffle, dropout and samples included; SGD, since Adam turns rounding noise into steps.
SETTINGS = [
    "model.optim.name=sgd",
    "~model.optim.betas",
    "model.optim.lr=0.02",
    "model.train_ds.shuffle=true",
    "proposals.samples=2",
    "feedback.refresh_every=2",
    "guards.every=3",
    "guards.patience=0",
    "guards.max_kl=100",
    "guards.max_length_ratio=100",
    "guards.held_out=0.2",
    "parameters.ema_decay=0.5",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.create_tensorboard_logger=false",
    "trainer.max_steps=10",
]


def same(a: Path, b: Path, *, atol: float = 1e-6) -> None:
    """Asserts that two ``.nemo`` hold the same weights."""
    left, right = weights(a), weights(b)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("data") / "m.json", TEXTS, seconds=0.8)


@pytest.fixture(scope="module")
def whole(nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of ten steps that nothing disturbs."""
    return run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path_factory.mktemp("whole"), *SETTINGS)


def experiment(cfg: Any) -> Any:
    """The settings of ``exp_manager`` for a start of this configuration."""
    with run_folder(cfg, {}) as manager:
        return manager


def curve(folder: Path) -> list[tuple[int, float]]:
    """Step and reward of every step's line."""
    return [(line["step"], line.get("feedback/reward")) for line in read_steps(folder / "steps.jsonl") if "lr" in line]


@pytest.mark.slow
def test_ten_steps_equal_five_and_five_resumed(
    whole: Any, nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path
) -> None:
    resumable = [*SETTINGS, "exp_manager.resume_if_exists=true"]
    run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path, *resumable, "trainer.max_steps=5")
    parts = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path, *resumable)
    same(whole.nemo, parts.nemo)
    assert [step for step, _ in curve(parts.log_dir)] == list(range(1, 11))
    wanted = curve(whole.log_dir)
    for (step, reward), (_, other) in zip(wanted, curve(parts.log_dir), strict=True):
        assert reward == other or reward == pytest.approx(other, abs=1e-4), step
    assert len(json.loads((parts.log_dir / "run.json").read_text())["attempts"]) == 2


@pytest.mark.slow
def test_a_rate_and_weights_that_were_chosen_are_kept(
    nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path
) -> None:
    rates = ("model.optim.lr=null", "parameters.lr_candidates=[0.01,0.02]", "parameters.lr_trial_steps=1")
    settings = [*SETTINGS, *rates, "exp_manager.resume_if_exists=true"]
    found = {}
    for name, stops in {"whole": (3,), "parts": (2, 3)}.items():
        for stop in stops:
            steps = f"trainer.max_steps={stop}"
            found[name] = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / name, *settings, steps)
    used = {
        name: [line["lr"] for line in read_steps(r.log_dir / "steps.jsonl") if "lr" in line]
        for name, r in found.items()
    }
    assert used["whole"] == used["parts"]
    assert len(used["whole"]) == 3
    same(found["whole"].nemo, found["parts"].nemo)


@pytest.mark.slow
def test_lhotse_rows_go_on_in_the_middle_and_behind_an_epoch(
    nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path
) -> None:
    lhotse = ("model.train_ds.use_lhotse=true", "+model.train_ds.use_bucketing=false", "guards.every=0")
    ahead = "feedback.score_ahead=true"  # the groups of the batch behind a checkpoint are in it
    settings = [*SETTINGS, *lhotse, ahead, "exp_manager.resume_if_exists=true"]
    found = {}
    for name, stops in {"whole": (4,), "parts": (2, 3, 4)}.items():  # an epoch has three batches
        for stop in stops:
            steps = f"trainer.max_steps={stop}"
            found[name] = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / name, *settings, steps)
    assert curve(found["whole"].log_dir) == curve(found["parts"].log_dir)
    same(found["whole"].nemo, found["parts"].nemo)


@pytest.mark.slow
def test_ranks_of_a_launcher_go_on_together(nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path) -> None:
    ranks = ("trainer.devices=2", "++trainer.strategy=ddp", "trainer.max_steps=3", f"output={tmp_path / 'a.nemo'}")
    more = (
        "guards.every=0",
        "feedback.score_ahead=true",
        "exp_manager.checkpoint_callback_params.save_top_k=-1",
        "+exp_manager.seconds_to_sleep=0",
    )
    command = arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", *SETTINGS, *ranks, *more)
    found = run_ranks("adapt", tmp_path, command)
    assert "error" not in found[0], found[0]["error"]
    folder = found[0]["log_dir"]
    wanted = curve(folder)
    shutil.copy(tmp_path / "a.nemo", tmp_path / "whole.nemo")
    # As if killed behind its second step.
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").glob("*.ckpt"):
        if "global_step=2" not in path.name or "last" in path.name:
            path.unlink()
    found = run_ranks("adapt", tmp_path, command)
    assert "error" not in found[0], found[0]["error"]
    assert found[0]["log_dir"] == folder
    assert "global_step=2" in json.loads((folder / "run.json").read_text())["attempts"][1]["from"]
    assert curve(folder) == wanted
    same(tmp_path / "whole.nemo", tmp_path / "a.nemo")


def test_ranks_that_start_apart_are_refused_and_leave_the_folder_free(
    nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_llm_feedback.training.setup.gather", lambda value: [value, "a/b-last.ckpt"])
    with pytest.raises(TrainingError, match=r"different checkpoints \(b-last.ckpt, none\)"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path)
    assert not in_use(tmp_path / "adapted" / "version_0")


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(
    whole: Any, nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path
) -> None:
    base, output = nemo_file("ctc_bpe"), tmp_path / "out" / "adapted.nemo"
    output.parent.mkdir()
    shutil.copy(base, output)
    before = output.read_bytes()
    command = arguments(base, manifest, tiny_llm, tmp_path / "runs", *SETTINGS, f"output={output}")
    folder, rng = tmp_path / "runs" / "adapted" / "version_0", random.Random(0)
    # One in the middle of an epoch, one anywhere behind it; each a little after the step's line.
    for steps in (rng.randint(2, 4), rng.randint(5, 8)):
        process = start(adapt_with, command, tmp_path / "log.txt")
        deadline = time.monotonic() + 240
        while len(curve(folder)) < steps and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -9, (tmp_path / "log.txt").read_text()[-3000:]
        assert output.read_bytes() == before
        read_config(output)
    process = start(adapt_with, command, tmp_path / "log.txt")
    process.join(240)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert "going on with the unfinished run" in (tmp_path / "log.txt").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert [step for step, _ in curve(folder)] == list(range(1, 11))
    assert len(json.loads((folder / "run.json").read_text())["attempts"]) == 3
    same(whole.nemo, output)


def test_the_same_command_starts_anew_after_a_finished_run(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"exp_manager": {"exp_dir": str(tmp_path), "name": "n"}, "seed": 1, "resume": "auto"})
    folder = tmp_path / "n" / "version_4"
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(settings_text(cfg))
    assert Path(experiment(cfg).explicit_log_dir).name == "version_4"
    assert Path(experiment(OmegaConf.merge(cfg, {"resume": "never"})).explicit_log_dir).name == "version_5"
    assert Path(experiment(OmegaConf.merge(cfg, {"seed": 2})).explicit_log_dir).name == "version_5"
    lock = FolderLock(folder)
    assert Path(experiment(cfg).explicit_log_dir).name == "version_5"  # another process is in the other
    lock.release()
    (folder / "result.json").write_text("{}")
    assert Path(experiment(cfg).explicit_log_dir).name == "version_5"
    assert [path.name for path in folder.parent.iterdir()] == ["version_4"]  # no run began


def test_a_run_folder_holds_no_secrets_and_its_run_still_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = {"reward": {"settings": {"api_key": "sk-123"}}, "exp_manager": {"exp_dir": str(tmp_path), "name": "n"}}
    cfg = OmegaConf.create(secret)
    folder = tmp_path / "n" / "version_0"
    folder.mkdir(parents=True)
    (folder / "cmd-args.log").write_text("adapt reward.settings.api_key=sk-123")  # as exp_manager writes it
    monkeypatch.setattr("sys.argv", ["adapt", "reward.settings.api_key=sk-123", "reward.settings={api_key: sk-123}"])
    record_start(cfg, folder, checkpoint=None, inputs={})
    for path in folder.iterdir():
        assert "sk-123" not in path.read_text(), path.name
    assert json.loads((folder / "run.json").read_text())["command"][1] == "reward.settings.api_key=(hidden)"
    assert Path(experiment(cfg).explicit_log_dir).name == "version_0"


def test_what_a_kill_leaves_of_checkpoints_is_tidied(tmp_path: Path) -> None:
    checkpoints = tmp_path / "n" / "checkpoints"
    checkpoints.mkdir(parents=True)
    names = ["a--global_step=1-last.ckpt", "a--global_step=2-last.ckpt", "a--global_step=3.ckpt"]
    for age, name in enumerate([*names, "a--global_step=4-last.ckpt"]):
        (checkpoints / name).write_text(name)
        os.utime(checkpoints / name, (age, age))
    (checkpoints / "a--global_step=4-last-unfinished").touch()
    manager = {"exp_dir": str(tmp_path), "name": "n", "resume_if_exists": True}
    cfg = OmegaConf.create({"exp_manager": manager})
    assert experiment(cfg).get("resume_from_checkpoint") is None  # NeMo finds the one `last`
    assert sorted(path.name for path in checkpoints.iterdir()) == names[1:]
    (checkpoints / names[1]).unlink()
    assert experiment(cfg).resume_from_checkpoint == str(checkpoints / names[2])


def test_no_room_and_no_permission_are_one_typed_error_before_any_work(
    nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    manager = {"exp_dir": str(tmp_path / "file" / "x")}
    cfg = OmegaConf.create({"exp_manager": manager, "output": str(tmp_path / "file" / "y" / "a.nemo")})
    with pytest.raises(ConfigError) as error:
        result_folders(cfg)
    assert "2 faults" in str(error.value)
    assert "set exp_manager.exp_dir" in str(error.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    with pytest.raises(ConfigError, match=r"has 0 MB left .* need about"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", f"output={tmp_path / 'o' / 'a.nemo'}")
    assert not list(tmp_path.rglob("*.ckpt"))
    check_room({"run": tmp_path, "output": tmp_path}, {"run": 512, "output": 512})
    with pytest.raises(ConfigError, match="run and output need"):
        check_room({"run": tmp_path, "output": tmp_path}, {"run": 512, "output": 513})


class _Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return index


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(7))


def _loader(**settings: Any) -> ResumableLoader:
    options = {"seed": 1, "rank": 0, "num_ranks": 1, "shuffle": True} | settings
    return ResumableLoader(DataLoader(_Numbers(), batch_size=2), **options)


def test_a_loader_goes_on_where_its_checkpoint_was() -> None:
    first = _loader()
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in first])
    assert len({str(epoch) for epoch in epochs}) == 3
    assert all(sorted(n for batch in epoch for n in batch) == list(range(7)) for epoch in epochs)
    torch.manual_seed(99)  # the process's random state is of no account
    resumed = _loader()
    resumed.start_at(epoch=1, batches=2)
    assert len(resumed) == 4
    assert [batch.tolist() for batch in resumed] == epochs[1][2:]
    assert [batch.tolist() for batch in resumed] == epochs[1]  # only the first pass skips
    resumed.set_epoch(2)
    assert [batch.tolist() for batch in resumed] == epochs[2]
    # A checkpoint at the end of an epoch leaves nothing to skip in the next one.
    after = _loader()
    after.start_at(epoch=1, batches=4)
    after.set_epoch(2)
    assert [batch.tolist() for batch in after] == epochs[2]


def test_ranks_share_an_epoch_and_streams_skip_what_was_seen() -> None:
    ranks = [[n for batch in _loader(rank=r, num_ranks=2) for n in batch.tolist()] for r in range(2)]
    assert set(ranks[0]) | set(ranks[1]) == set(range(7))
    stream = ResumableLoader(DataLoader(_Stream(), batch_size=2), seed=1, rank=0, num_ranks=1, shuffle=False)
    stream.start_at(epoch=0, batches=2)
    assert [batch.tolist() for batch in stream] == [[4, 5], [6]]


def test_random_states_come_back() -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(3)
    states = random_states([generator])

    def draw() -> list[float]:
        return [
            random.random(),
            float(np.random.rand()),
            float(torch.rand(())),
            float(torch.rand((), generator=generator)),
        ]

    first = draw()
    assert draw() != first
    set_random_states(states, [generator])
    assert draw() == first


def test_the_batch_of_the_checkpoint_counts_as_done() -> None:
    done = {"ready": 4, "started": 4, "processed": 4, "completed": 3}
    ended = {"ready": 2, "started": 2, "processed": 2, "completed": 2}
    loop = {
        "epoch_progress": {"total": dict(ended), "current": dict(ended)},
        "epoch_loop.batch_progress": {"total": dict(done), "current": dict(done), "is_last_batch": False},
        "epoch_loop.state_dict": {"_batches_that_stepped": 3},
    }
    checkpoint = {"global_step": 4, "loops": {"fit_loop": loop}}
    count_finished_batch(checkpoint)
    assert loop["epoch_loop.batch_progress"]["total"]["completed"] == 4
    assert loop["epoch_loop.batch_progress"]["current"]["completed"] == 4
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 4
    # The second epoch was ended by max_steps in its middle.
    assert loop["epoch_progress"]["current"] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    assert place_in_data(checkpoint) == (1, 4)


def test_a_resumed_run_keeps_the_date_that_its_chat_template_writes(
    nemo_file: Any, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over midnight the prompt was another one, and rewards of both were mixed."""
    from nemo_llm_feedback.llm import chat, encoding

    llm = make_tiny_llm(tmp_path / "llm", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(llm)
    frames: list[chat.ChatFrame] = []

    def framed(*args: Any) -> chat.ChatFrame:
        frames.append(chat.chat_frame(*args))
        return frames[-1]

    monkeypatch.setattr(encoding, "chat_frame", framed)
    clock = SimpleNamespace(date=SimpleNamespace(today=lambda: next(days)), datetime=datetime.datetime)
    monkeypatch.setattr(chat, "datetime", clock)
    for step, day in enumerate((29, 30), 1):
        days = iter([datetime.date(2026, 11, day)])  # a clock that is asked once
        steps = (f"trainer.max_steps={step}", "exp_manager.resume_if_exists=true", "guards.every=0")
        run(nemo_file("ctc_bpe"), manifest, llm, tmp_path / "runs", *SETTINGS, *steps)
    assert [frame.before for frame in frames] == ["29 Nov<|im_start|>user\n"] * 2
    run(nemo_file("ctc_bpe"), manifest, llm, tmp_path / "new", *SETTINGS, "trainer.max_steps=1", "guards.every=0")
    assert frames[2].before.startswith("30 Nov")
