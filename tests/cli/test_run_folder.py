"""Work is not lost: living runs are left alone, edited inputs are seen, signals and full disks keep what there is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import arguments, run
from helpers.tiny import write_manifest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from nemo_llm_feedback.asr.checkpoints import remove_leftovers
from nemo_llm_feedback.cli.jobs.adapt import adapt
from nemo_llm_feedback.cli.jobs.run_choice import (
    changed_inputs,
    input_digests,
    record_start,
    run_folder,
    settings_text,
)
from nemo_llm_feedback.cli.jobs.start import room
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ConfigError, TrainingError
from nemo_llm_feedback.core.run_folder import FolderLock, read_steps
from nemo_llm_feedback.training.weights import kept_name, save_kept


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_in_the_folder_of_a_living_run_touches_nothing(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    """It was refused after exp_manager had moved the files of the living run, which then died."""
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        (folder / "checkpoints" / f"adapted--global_step={step}-last.ckpt").write_text("a checkpoint")
    (folder / "steps.jsonl").write_text('{"step": 1}\n')
    before = _files(folder)
    more = (f"exp_manager.explicit_log_dir={folder}", "exp_manager.resume_if_exists=true")
    with FolderLock(folder), pytest.raises(ConfigError, match="another process is training in"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", *more)
    assert _files(folder) == before


def test_two_new_runs_never_share_a_folder(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"exp_manager": {"exp_dir": str(tmp_path), "name": "n"}, "resume": "never"})
    with run_folder(cfg, {}) as one, run_folder(cfg, {}) as two:
        assert [Path(manager.explicit_log_dir).name for manager in (one, two)] == ["version_0", "version_1"]


def test_an_output_that_is_a_folder_is_refused_before_any_work(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    with pytest.raises(ConfigError, match="is a folder: name the file"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", f"output={tmp_path}")
    # Nor is the base written over, under whatever name, nor what else the run reads.
    with pytest.raises(ConfigError, match=r"m\.json, which would be lost"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", f"output={manifest}")
    base = tmp_path / "base.nemo"
    shutil.copy(nemo_file("ctc_bpe"), base)
    (tmp_path / "link.nemo").symlink_to(base)
    for name in ("base.nemo", "link.nemo"):
        with pytest.raises(ConfigError, match="is the base checkpoint, which would be lost"):
            run(base, manifest, tiny_llm, tmp_path / "runs", f"output={tmp_path / name}")
    assert not list((tmp_path / "runs").rglob("version_*"))


def test_the_output_is_no_setting_by_which_runs_differ() -> None:
    one, two = (compose_config([f"output={name}.nemo"]) for name in ("a", "b"))
    assert settings_text(one) == settings_text(two)
    assert settings_text(one) != settings_text(compose_config(["output=a.nemo", "seed=5"]))


def _case_14(folder: Path, nemo: Path, llm: Path) -> tuple[Any, Any]:
    """Settings that name files, and a function that gives their digests."""
    manifest = write_manifest(folder / "pool.json", [None] * 3)
    for name, text in {"menu.txt": "late\n", "template.txt": "{context}", "guard.json": manifest.read_text()}.items():
        (folder / name).write_text(text)
    settings = arguments(nemo, manifest, llm, folder / "runs")
    settings += [f"context.terms_file={folder / 'menu.txt'}", f"llm.template={folder / 'template.txt'}"]
    settings += [f"guards.manifest_filepath={folder / 'guard.json'}", "context.description='a text, with a comma'"]
    cfg = compose_config(settings)
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    return cfg, lambda: input_digests(tree, base=nemo, llm=True)


def test_case_14_a_changed_file_starts_the_run_anew_and_is_named(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_llm_feedback.core.console import quiet

    nemo, llm = tmp_path / "base.nemo", tmp_path / "llm"
    shutil.copy(nemo_file("ctc_bpe"), nemo)
    shutil.copytree(tiny_llm, llm)
    cfg, digests = _case_14(tmp_path, nemo, llm)
    folder = tmp_path / "runs" / "adapted" / "version_0"
    folder.mkdir(parents=True)
    record_start(cfg, folder, checkpoint=None, inputs=digests())
    with run_folder(cfg, digests()) as manager:
        assert (Path(manager.explicit_log_dir), manager.resume_if_exists) == (folder, True)
    audio = next((tmp_path / "wav").iterdir())
    os.utime(tmp_path / "menu.txt")  # not its contents
    assert changed_inputs(folder, digests()) == []
    weights = next(llm.glob("*.safetensors"))
    cases = {tmp_path / name: name for name in ("menu.txt", "template.txt", "guard.json", "base.nemo")}
    for path, named in {**cases, weights: "llm.model", audio: "the audio of "}.items():
        old = path.read_bytes()
        path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]) if path.suffix != ".json" else old + b"\n")
        with quiet(), run_folder(cfg, digests()) as manager:
            assert Path(manager.explicit_log_dir).name == "version_1", named
        assert named in capsys.readouterr().err, named
        # Asked for by name, it goes on, and says what it goes on without.
        asked = OmegaConf.merge(cfg, {"exp_manager": {"explicit_log_dir": str(folder), "resume_if_exists": True}})
        with quiet(), run_folder(asked, digests()):
            pass
        assert named in capsys.readouterr().err, named
        path.write_bytes(old)


def test_a_pool_that_grew_begins_a_new_run_that_names_it_or_goes_on_as_asked(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 6)
    rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(rows[:3]))
    words = (nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs")
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    first = run(*words, every)
    (first.log_dir / "result.json").unlink()  # as if killed behind its second step
    manifest.write_text("".join(rows))
    capsys.readouterr()
    second = run(*words, every)
    said = capsys.readouterr().err
    assert second.log_dir.name == "version_1"
    assert f"but {manifest}, the audio of {manifest} changed since: a new run begins" in said
    asked = [f"exp_manager.explicit_log_dir={first.log_dir}", "exp_manager.resume_if_exists=true"]
    assert " ".join(asked) in said
    third = run(*words, every, *asked, "trainer.max_steps=4")
    assert f"warning: {manifest}, the audio of {manifest} changed since this run began" in capsys.readouterr().err
    assert third.log_dir == first.log_dir
    assert [line["step"] for line in read_steps(first.log_dir / "steps.jsonl") if "lr" in line] == [1, 2, 3, 4]


def test_the_room_that_is_asked_for_is_what_the_checkpoints_take(nemo_file: Any, tmp_path: Path) -> None:
    """One of the best and the last are there while a third is written; it was estimated at a third of that."""
    from nemo_llm_feedback.training.models import restore

    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    cfg = compose_config([])
    folders = {"run": tmp_path, "temporary files": tmp_path, "output": tmp_path}
    needed = room(model, cfg, log_dir=tmp_path, folders=folders)
    weights = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    best = {name: value.detach().clone() for name, value in model.named_parameters()}
    torch.save({"state_dict": weights, "optimizer": optimizer.state_dict()}, tmp_path / "a.ckpt")
    save_kept(tmp_path / "checkpoints", 1, best)
    size = (tmp_path / "a.ckpt").stat().st_size
    kept = (tmp_path / "checkpoints" / kept_name(1)).stat().st_size
    tables = 2**17  # names and headers of a small model's tensors
    assert size - tables < needed["temporary files"] <= size
    assert 2 * (size + kept - tables) < needed["run"] - needed["output"] <= 2 * (size + kept)
    (tmp_path / "a.ckpt").rename(tmp_path / "checkpoints" / "a.ckpt")
    assert room(model, cfg, log_dir=tmp_path, folders=folders)["run"] == needed["run"] - size - kept
    # A teacher of its own is in every checkpoint of a later generation.
    cfg.feedback.generations = 2
    learned = sum(4 * value.numel() for value in best.values())
    assert room(model, cfg, log_dir=tmp_path / "new", folders=folders)["run"] == needed["run"] + 2 * learned


def test_a_disk_that_fills_up_is_a_typed_error_and_keeps_the_last_checkpoint(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    save = Trainer.save_checkpoint

    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.global_step > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", fails)
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    with pytest.raises(TrainingError, match="the disk is full"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", every)
    monkeypatch.undo()
    assert list((tmp_path / "runs").rglob("*.ckpt"))
    result = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", every)
    attempts = json.loads((result.log_dir / "run.json").read_text())["attempts"]
    assert attempts[1]["from"].endswith("-last.ckpt")
    assert result.steps == 2


def test_what_a_kill_left_of_a_nemo_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    for name in (f".a.{dead}.tmp.nemo", f".a.{os.getpid()}.tmp.nemo", f".b.{dead}.tmp.nemo", ".a.x.tmp.nemo"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.nemo")
    assert not (tmp_path / f".a.{dead}.tmp.nemo").exists()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(
    number: signal.Signals, status: int, nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    """SIGTERM ended with status 0, as if the job were done."""
    manifest = write_manifest(tmp_path / "m.json", [None] * 6)
    more = ("trainer.max_steps=40", "exp_manager.create_tensorboard_logger=false")
    words = arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", *more)
    command = [sys.executable, "-m", "nemo_llm_feedback.cli.main", "adapt", *words]
    folder = tmp_path / "runs" / "adapted" / "version_0"
    usual: Any = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # CI may run under nohup
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **usual) as process:
        deadline = time.monotonic() + 240
        while len(read_steps(folder / "steps.jsonl")) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2 if number == signal.SIGHUP else 1):  # as a closed terminal does
            process.send_signal(number)
        out, err = process.communicate(timeout=240)
    assert process.returncode == status, err[-3000:]
    step = read_steps(folder / "steps.jsonl")[-1]["step"]
    assert f"a checkpoint of step {step} is saved" in err
    assert "The same command goes on from its last checkpoint" in err
    assert not list(folder.glob("*.nemo"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in read_steps(folder / "steps.jsonl") if "lr" in line] == list(range(1, 41))
    # Nothing but our lines is on the terminal, here none; the log has NeMo's.
    shown = out + err + done.stdout + done.stderr
    for words in ("[NeMo", "ExpManager", "OneLogger", "exporters", "Optimizer", "GPU available", "Loading weights"):
        assert words not in shown, words
    assert "ExpManager schema" in (folder / "log.txt").read_text()
    lines = done.stderr.splitlines()
    assert "plan" in lines
    assert sum(line.startswith("  step") and "/40" in line for line in lines) >= 3


def test_a_signal_behind_the_last_callback_s_turn_is_answered_as_any(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own answer came first there: status 0, and no checkpoint."""
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

    update, sent = _TrainingEpochLoop.update_lr_schedulers, []

    def late(self: Any, interval: str, update_plateau_schedulers: bool) -> None:
        update(self, interval, update_plateau_schedulers)
        if update_plateau_schedulers and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_TrainingEpochLoop, "update_lr_schedulers", late)
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    words = arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", "trainer.max_steps=8")
    with pytest.raises(SystemExit) as left:
        adapt(compose_config(words))
    assert sent
    assert left.value.code == 128 + signal.SIGTERM
    assert list((tmp_path / "runs" / "adapted" / "version_0").rglob("*-last.ckpt"))
