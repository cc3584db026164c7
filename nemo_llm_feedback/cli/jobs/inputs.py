"""What the command ``adapt`` is given: the starting checkpoint, and the trainer's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.core.errors import CheckpointError, ConfigError
from nemo_llm_feedback.training.models import locate


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
    if not cfg.model.validation_ds.get("manifest_filepath"):
        # Lightning refuses a step interval longer than the data when there is nothing to validate.
        settings.update(limit_val_batches=0, val_check_interval=None, check_val_every_n_epoch=1)
    if cfg.model.train_ds.get("use_lhotse"):
        # Lhotse's sampler already splits the data over the ranks; Lightning's would do it again.
        settings.setdefault("use_distributed_sampler", False)
    return settings
