"""What a run is given: the starting checkpoint, labelled manifests, the trainer's and the model's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.errors import CheckpointError, ConfigError, ManifestError
from nemo_llm_feedback.data.audio import mix_channels, select_channels
from nemo_llm_feedback.data.manifests import Row, expand_paths, read_manifest, unreadable
from nemo_llm_feedback.training.models import locate


def source(cfg: DictConfig) -> Path:
    """The starting checkpoint's file.

    Raises:
        ConfigError, CheckpointError: none or two are given, there is no such file, or no GPU that is asked for.
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


def labelled_rows(manifests: Any) -> dict[str, list[Row]]:
    """Name → rows of each manifest, all of which must have text and readable audio."""
    if not manifests:
        return {}
    sets: dict[str, list[Row]] = {}
    for path in expand_paths(manifests):
        rows = read_manifest(path)
        bare = [row.origin for row in rows if not row.text]
        bad = [reason for _, reason in unreadable(rows)]
        if bare or bad:
            listed = "".join(f"\n  {item}" for item in (bad or bare)[:20])
            what = "unreadable audio" if bad else "no `text`"
            raise ManifestError(f"{len(bad or bare)} row(s) of the manifest {path} have {what}:{listed}")
        stem = Path(path).stem
        name = stem if stem not in sets else f"{Path(path).parent.name}_{stem}"
        sets[name] = rows
    return sets


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


def rates_to_try(cfg: DictConfig, config: RunConfig) -> tuple[float, ...]:
    """The learning rates among which a trial chooses: ``parameters.lr_candidates`` where ``model.optim.lr`` is null.

    Raises:
        ConfigError: neither a rate nor what a trial of some needs.
    """
    if cfg.model.optim.get("lr") is not None:
        return ()
    lacking = []
    if not config.parameters.lr_candidates:
        lacking.append("parameters.lr_candidates is empty")
    if not config.guards.looks:
        lacking.append("guards.every=0 leaves no held-out look to judge by")
    if not config.needs_reward:
        lacking.append("plain self-training has no reward to judge by")
    if any(group.get("lr") is not None for group in (cfg.model.get("optim_param_groups") or {}).values()):
        lacking.append("model.optim_param_groups have rates of their own")
    if lacking:
        raise ConfigError(
            f"model.optim.lr is null, so a short trial would choose it, but {'; '.join(lacking)}. Set model.optim.lr."
        )
    return config.parameters.lr_candidates


def prepare_model(model: Any, cfg: DictConfig, validation: Mapping[str, Any], *, rates: Sequence[float] = ()) -> None:
    """Replaces the optimizer section as a whole (a merge would keep the old scheduler) and sets validation.

    Args:
        model: to be trained.
        cfg: of the run.
        validation: name → rows; empty = none.
        rates: of :func:`rates_to_try`; the first stands in until the trial.
    """
    optim: Any = OmegaConf.to_container(cfg.model.optim, resolve=True)
    if rates:
        optim["lr"] = rates[0]
    if optim.get("sched") is None:
        optim.pop("sched", None)  # NeMo writes into the section when the key is there, also when it is null
    with open_dict(model.cfg):
        model.cfg.optim = OmegaConf.create(optim)
        if cfg.model.get("optim_param_groups"):
            model.cfg.optim_param_groups = _parameter_groups(model, cfg)
    if hasattr(model, "compute_eval_loss") and model.cfg.get("loss", {}).get("loss_name") == "tdt":
        # NeMo has no TDT loss on the CPU; WER is what validation is for.
        model.compute_eval_loss = False
    model.wer.log_prediction = False
    if validation:
        validation_ds = with_sample_rate(cfg, model).model.validation_ds
        select_channels(validation_ds)
        model.setup_multiple_validation_data(validation_ds)
        mix_channels(model._validation_dl)


def _parameter_groups(model: Any, cfg: DictConfig) -> DictConfig:
    """NeMo's groups with their own learning rates, checked before NeMo meets them."""
    unknown = [name for name in cfg.model.optim_param_groups if not hasattr(getattr(model, name, None), "parameters")]
    if unknown:
        parts = ", ".join(n for n in ("encoder", "decoder", "joint", "ctc_decoder") if hasattr(model, n))
        raise ConfigError(f"model.optim_param_groups.{unknown[0]}: the model has no such part; it has {parts}.")
    return DictConfig(OmegaConf.create(OmegaConf.to_container(cfg.model.optim_param_groups, resolve=True)))


def with_sample_rate(cfg: DictConfig, model: Any) -> DictConfig:
    """The configuration with the checkpoint's sample rate where none is given."""
    cfg = DictConfig(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
    for section in (cfg.model.train_ds, cfg.model.validation_ds):
        if section.get("sample_rate") is None:
            section.sample_rate = int(model.cfg.preprocessor.sample_rate)
    return cfg
