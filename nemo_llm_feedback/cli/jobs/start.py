"""What a run checks and finds before it starts: checkpoint, trainer settings, disk space, a run to go on with."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from nemo.constants import NEMO_ENV_VARNAME_VERSION
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exceptions import NeMoBaseException
from nemo.utils.exp_manager import exp_manager
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.core.config.faults import refuse
from nemo_llm_feedback.core.errors import CheckpointError, ConfigError
from nemo_llm_feedback.core.run_folder import (
    RESULT_FILE,
    RUN_FILE,
    SETTINGS_FILE,
    collect,
    in_use,
    newest,
    package_versions,
    write_json,
    write_text,
)
from nemo_llm_feedback.core.secrets import masked, masked_command
from nemo_llm_feedback.training.models import locate

_REFUSALS = (MisconfigurationException, NeMoBaseException)
# Rank 0's choice, for the ranks that Lightning starts as copies of this process.
_CHOICE = "NEMO_LLM_FEEDBACK_RUN"
# A checkpoint holds the weights, AdamW's two moments and the best weights; two are there while one is written.
_COPIES_RUN, _COPIES_OUTPUT, _COPIES_TEMPORARY = 2 * 4, 2, 4


def source(cfg: DictConfig) -> Path:
    """The starting checkpoint's file.

    Raises:
        ConfigError, CheckpointError: none or two are given, or the file, or a GPU that is asked for, does not exist.
    """
    given = [key for key in ("init_from_nemo_model", "init_from_pretrained_model") if cfg.get(key)]
    if len(given) != 1:
        raise ConfigError(
            "give exactly one of init_from_nemo_model=FILE.nemo and init_from_pretrained_model=NAME, "
            f"got {' and '.join(given) or 'neither'}."
        )
    if str(cfg.trainer.get("accelerator")) in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator asks for a GPU and there is none; use trainer=cpu or trainer=auto.")
    path = Path(str(cfg[given[0]])).expanduser() if given[0] == "init_from_nemo_model" else locate(str(cfg[given[0]]))
    if not path.is_file():
        raise CheckpointError(f"{given[0]}={cfg[given[0]]}: no such file.")
    return path


def trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    """Keyword arguments of Lightning's trainer.

    Raises:
        ConfigError: half precision, whose gradient scaler overflows on purpose and fails where all gradients are gone.
    """
    settings: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    if str(settings.get("precision")) in ("16", "16-mixed", "16-true"):
        raise ConfigError(f"trainer.precision={settings['precision']} is not supported: use bf16-mixed, or 32.")
    # Ours is one bar for the whole run (``training.callbacks.run_bar``).
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    if not cfg.model.validation_ds.get("manifest_filepath"):
        # Lightning refuses a step interval longer than the data when there is nothing to validate.
        settings.update(limit_val_batches=0, val_check_interval=None, check_val_every_n_epoch=1)
    if cfg.model.train_ds.get("use_lhotse"):
        # Lhotse's sampler already splits the data over the ranks; Lightning's would do it again.
        settings.setdefault("use_distributed_sampler", False)
    return settings


def make_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning's trainer by the section ``trainer``.

    Raises:
        ConfigError: Lightning refuses the settings.
    """
    settings = trainer_settings(cfg)
    try:
        return pl.Trainer(**settings)
    except (ValueError, TypeError, RuntimeError, *_REFUSALS) as error:
        raise ConfigError(f"Lightning refuses the section trainer: {' '.join(str(error).split())}") from None


def make_folder(trainer: pl.Trainer, manager: DictConfig) -> Path:
    """The run's folder, made by NeMo's ``exp_manager``, which gives the trainer its loggers and checkpoints.

    Raises:
        ConfigError: NeMo or Lightning refuse the settings.
    """
    try:
        return Path(exp_manager(trainer, manager))
    except (ValueError, TypeError, AttributeError, RuntimeError, OSError, *_REFUSALS) as error:
        raise ConfigError(f"NeMo refuses the section exp_manager: {' '.join(str(error).split())}") from None


def check_room(folders: Mapping[str, Path], *, model_bytes: int) -> None:
    """Sees to it that results can be written.

    Args:
        folders: ``run`` and ``output``; they and their parents need not exist.
        model_bytes: size of the starting checkpoint.

    Raises:
        ConfigError: folders that cannot be written to or have too little room; all are listed.
    """
    copies = {"run": _COPIES_RUN, "output": _COPIES_OUTPUT, "temporary files": _COPIES_TEMPORARY}
    setting = {"run": "exp_manager.exp_dir", "output": "output", "temporary files": "the environment's TMPDIR"}
    needed: dict[int, list[Any]] = {}
    faults = []
    # Lightning writes a checkpoint to the folder of temporary files before it moves it.
    for what, folder in {**folders, "temporary files": Path(tempfile.gettempdir())}.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            faults.append(f"the folder of the {what}, {folder}, cannot be written to ({error}): set {setting[what]}.")
            continue
        device = needed.setdefault(folder.stat().st_dev, [0, folder, []])
        device[0] += copies[what] * model_bytes
        device[2].append(what)
    for size, folder, uses in needed.values():
        free = shutil.disk_usage(folder).free
        if free < size:
            faults.append(
                f"{folder} has {free / 2**20:.0f} MB left and {' and '.join(uses)} need about {size / 2**20:.0f} MB: "
                f"free some, or set {' or '.join(setting[use] for use in uses)}."
            )
    refuse("the results could not be written;", faults)


def experiment(cfg: DictConfig) -> DictConfig:
    """The settings of NeMo's ``exp_manager`` for this run, with the run to go on with where there is one.

    A run that was killed goes on when the same command is given again (``resume=auto``): its folder holds the same
    settings, no result, and no living process. ``exp_manager.resume_if_exists=true`` keeps NeMo's meaning.

    Args:
        cfg: the composed configuration.
    """
    manager: Any = OmegaConf.create(OmegaConf.to_container(cfg.exp_manager, resolve=True))
    if is_global_rank_zero():
        # exp_manager leaves its choice of folder here for other ranks; a second run of this process must not read it.
        os.environ.pop(NEMO_ENV_VARNAME_VERSION, None)
    base = Path(manager.get("exp_dir") or "nemo_experiments") / str(manager.get("name") or "default")
    explicit = manager.get("explicit_log_dir") or manager.get("version")
    if not manager.get("resume_if_exists") and not explicit and cfg.get("resume", "auto") == "auto":
        found = _unfinished(base, settings_text(cfg))
        if found is not None:
            manager.version, manager.resume_if_exists = found.name, True
            logging.info(f"going on with the unfinished run in {found} (resume=never starts anew).")
    if manager.get("resume_if_exists"):
        folder = Path(manager.get("explicit_log_dir") or base / str(manager.get("version") or ""))
        checkpoint = _newest_checkpoint(folder / "checkpoints")
        if checkpoint is not None and not checkpoint.stem.endswith("last"):
            manager.resume_from_checkpoint = str(checkpoint)
    return manager


def settings_text(cfg: DictConfig) -> str:
    """The composed configuration as YAML without secrets, by which runs are known to be the same."""
    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    for key in ("resume", "hydra", "verbose"):
        tree.pop(key, None)
    return OmegaConf.to_yaml(OmegaConf.create(masked(tree)))


def record_start(cfg: DictConfig, folder: Path, *, checkpoint: str | None) -> None:
    """Writes ``settings.yaml`` and ``run.json`` (versions, command, date of every attempt; nothing about the host,
    and no secrets).

    Args:
        cfg: the composed configuration.
        folder: the run's folder.
        checkpoint: file name of what this attempt goes on from; None at the start.
    """
    collect(folder)
    settings, run = folder / SETTINGS_FILE, folder / RUN_FILE
    attempts = json.loads(run.read_text(encoding="utf-8"))["attempts"] if run.is_file() and settings.is_file() else []
    attempts.append({"started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "from": checkpoint})
    command = masked_command([Path(sys.argv[0]).name, *sys.argv[1:]])
    if (nemos := folder / "cmd-args.log").is_file():  # exp_manager's copy of the command
        nemos.write_text(" ".join(command), encoding="utf-8")
    write_json(run, {"command": command, "versions": package_versions(), "attempts": attempts})
    (folder / RESULT_FILE).unlink(missing_ok=True)
    write_text(settings, settings_text(cfg))


def _unfinished(base: Path, settings: str) -> Path | None:
    """The newest folder of the same settings that has no result and no living process."""
    first = is_global_rank_zero()
    if not first and os.environ.get(_CHOICE):
        return base / os.environ[_CHOICE]
    os.environ.pop(_CHOICE, None)
    folders = [path for path in base.iterdir() if path.is_dir()] if base.is_dir() else []
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if first and in_use(folder):
            continue
        if first:
            collect(folder)
        # A rank that the launcher started reads while rank 0, which may hold the folder already, moves its files.
        known = newest(folder, SETTINGS_FILE)
        if known is None or newest(folder, RESULT_FILE) is not None:
            continue
        if known.read_text(encoding="utf-8") == settings:
            os.environ[_CHOICE] = folder.name
            return folder
        logging.info(f"{folder} holds an unfinished run of other settings; its command goes on with it.")
    return None


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, after removing what a kill has left of others.

    NeMo refuses a folder with two checkpoints named ``last``, which a kill between writing one and removing the other
    leaves, as does every second resumption; and one whose only ``last`` is unfinished.
    """
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    whole = [path for path in found if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)]
    if is_global_rank_zero():
        lasts = [path for path in whole if path.stem.endswith("last")]
        for path in [path for path in found if path not in whole] + lasts[:-1]:
            path.unlink()
        for marker in folder.glob(f"*{NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX}"):
            marker.unlink()
    lasts = [path for path in whole if path.stem.endswith("last")]
    return lasts[-1] if lasts else (whole[-1] if whole else None)
