"""Tries NeMo's sections of the settings on NeMo's classes, and prepares the model by them: data, optimizer, rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS, get_scheduler
from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS, get_optimizer
from nemo.utils import logging
from nemo.utils.exp_manager import ExpManagerConfig
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nemo_llm_feedback.asr.heads import Vocabulary
from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.errors import ConfigError, ManifestError, list_faults
from nemo_llm_feedback.data.audio import guard_readers, select_channels, unreadable
from nemo_llm_feedback.data.manifests import Row, expand_paths, read_manifest
from nemo_llm_feedback.data.staging import write_copies
from nemo_llm_feedback.evaluation.entities import row_entities

# Recordings with their text; what they are is in the README beside them.
_EVERYDAY = str(Path(__file__).parents[1] / "evaluation" / "everyday" / "en.json")


# What NeMo's schedulers read beside their constructor's arguments.
_NOT_ARGUMENTS = ("name", "monitor", "reduce_on_plateau")


def nemo_faults(tree: Mapping[str, Any]) -> list[str]:
    """What NeMo and torch refuse of ``model.optim`` and ``exp_manager``, as sentences.

    Args:
        tree: all sections of ``adapt`` as plain mappings, whose types and ranges are sound.
    """
    faults = _optimizer_faults(tree["model"]["optim"])
    try:
        OmegaConf.merge(OmegaConf.structured(ExpManagerConfig), tree.get("exp_manager") or {})
    except OmegaConfBaseException as error:
        faults.append(f"exp_manager cannot be used: {str(error).splitlines()[0]}.")
    return faults


def _optimizer_faults(settings: Mapping[str, Any]) -> list[str]:
    """Makes the optimizer and its schedule for one parameter."""
    optim = {key: value for key, value in settings.items() if key not in ("name", "sched") and value is not None}
    name, sched = settings.get("name") or "adam", settings.get("sched")
    if "_target_" in settings or "args" in settings:
        return []
    if name not in AVAILABLE_OPTIMIZERS:
        return [f"model.optim.name={name} is not known to NeMo; it knows {', '.join(AVAILABLE_OPTIMIZERS)}."]
    try:
        optimizer = get_optimizer(name)([torch.nn.Parameter(torch.zeros(1))], **{"lr": 1e-4, **optim})
    except (TypeError, ValueError, LookupError, AssertionError) as error:
        return [f"model.optim cannot be used: {error} (a key is taken away with ~model.optim.KEY)."]
    if not sched or "_target_" in sched or "args" in sched:
        return []
    if sched.get("name") not in AVAILABLE_SCHEDULERS:
        known = ", ".join(AVAILABLE_SCHEDULERS)
        return [f"model.optim.sched.name={sched.get('name')} is not known to NeMo; it knows {known}."]
    arguments = {key: value for key, value in sched.items() if key not in _NOT_ARGUMENTS}
    try:
        get_scheduler(sched["name"], **{"max_steps": 100, **arguments})(optimizer)
    except (TypeError, ValueError, LookupError, AssertionError) as error:
        return [f"model.optim.sched cannot be used: {error} (a key is taken away with ~model.optim.sched.KEY)."]
    return []


def labelled_rows(manifests: Any, *, skip: bool = False) -> dict[str, list[Row]]:
    """Name → rows of each manifest, all of which must have text, readable audio and readable entities, if any.

    Args:
        manifests: as NeMo's ``manifest_filepath``.
        skip: leave rows with unreadable audio out, with a warning.

    Raises:
        ManifestError: rows without text, with entities that cannot be read, or with unreadable audio unless they are
            skipped; or no row left.
    """
    if not manifests:
        return {}
    sets: dict[str, list[Row]] = {}
    for path in expand_paths(manifests):
        rows = read_manifest(path)
        if bare := [row.origin for row in rows if not row.text]:
            raise ManifestError(list_faults(f"{len(bare)} row(s) of the manifest {path} have no `text`:", bare))
        row_entities(rows)
        stem = Path(path).stem
        names = (stem, f"{Path(path).parent.name}_{stem}", *(f"{stem}_{k}" for k in range(2, len(sets) + 2)))
        name = next(name for name in names if name not in sets)
        sets[name] = readable(rows, path, skip=skip)
    return sets


def readable(rows: Sequence[Row], manifest: Any, *, skip: bool = True) -> list[Row]:
    """The rows whose audio can be read.

    Args:
        rows: of a manifest, not tarred.
        manifest: its path.
        skip: leave the others out, with a warning.

    Raises:
        ManifestError: there are others and they are not skipped, or there are only such.
    """
    broken = unreadable(rows)
    if broken:
        head = f"{len(broken)} row(s) of the manifest {manifest} have unreadable audio:"
        message = list_faults(head, broken.values())
        if not skip or len(broken) == len(rows):
            raise ManifestError(message)
        logging.warning(f"left out: {message}")
    return [row for i, row in enumerate(rows) if i not in broken]


def everyday_rows(config: RunConfig, vocabulary: Vocabulary, *, replays: bool) -> tuple[Row, ...]:
    """The English sentences that ship with the package where ``guards.everyday`` has them watch general speech.

    Args:
        config: the run's settings.
        vocabulary: the checkpoint's letters, which ``auto`` compares with those of the sentences.
        replays: whether the run has replay rows.
    """
    guards = config.guards
    if guards.everyday == "none" or guards.manifest_filepath or not guards.measures:
        return ()
    rows = tuple(read_manifest(_EVERYDAY))
    letters = {c for row in rows for c in row.text if c.isalpha()}
    suits = not replays and letters <= set("".join(vocabulary.labels).lower())
    return rows if suits or guards.everyday == "en" else ()


def rates_to_try(model_settings: Mapping[str, Any], config: RunConfig) -> tuple[float, ...]:
    """The learning rates among which a trial chooses: ``parameters.lr_candidates`` where ``model.optim.lr`` is null.

    Raises:
        ConfigError: neither a rate nor what a trial of some needs.
    """
    if model_settings["optim"].get("lr") is not None:
        return ()
    lacking = []
    if not config.parameters.lr_candidates:
        lacking.append("parameters.lr_candidates is empty")
    if not config.guards.measures:
        lacking.append("guards.every=0 leaves no held-out measurement to judge by")
    if not config.needs_reward:
        lacking.append("plain self-training has no reward to judge by")
    if any(group.get("lr") is not None for group in (model_settings.get("optim_param_groups") or {}).values()):
        lacking.append("model.optim_param_groups have rates already")
    if lacking:
        raise ConfigError(
            f"model.optim.lr is null, so a short trial would choose it, but {'; '.join(lacking)}. Set model.optim.lr."
        )
    return tuple(config.parameters.lr_candidates)


def set_optimizer(model: Any, settings: Mapping[str, Any], *, rates: Sequence[float]) -> None:
    """Replaces the optimizer section as a whole (a merge would keep the old scheduler).

    Args:
        model: the model to train.
        settings: the section ``model``.
        rates: what :func:`rates_to_try` gave; the first stands in until the trial.
    """
    optim = dict(settings["optim"])
    if rates:
        optim["lr"] = rates[0]
    if optim.get("sched") is None:
        optim.pop("sched", None)  # NeMo writes into the section when the key is there, also when it is null
    groups = settings.get("optim_param_groups") or {}
    unknown = [name for name in groups if not hasattr(getattr(model, name, None), "parameters")]
    if unknown:
        parts = ", ".join(n for n in ("encoder", "decoder", "joint", "ctc_decoder") if hasattr(model, n))
        raise ConfigError(f"model.optim_param_groups.{unknown[0]}: the model has no such part; it has {parts}.")
    with open_dict(model.cfg):
        model.cfg.optim = OmegaConf.create(optim)
        model.cfg.pop("optim_param_groups", None)  # of the run that made the base
        if groups:
            model.cfg.optim_param_groups = OmegaConf.create(dict(groups))


def set_validation(model: Any, settings: Mapping[str, Any], sets: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """NeMo's validation on the manifests of ``validation_ds``, where there are any.

    Args:
        model: the model to train.
        settings: the section ``model``.
        sets: the rows of these manifests, which NeMo reads from copies.
        folder: where the copies go.
    """
    if hasattr(model, "compute_eval_loss") and model.cfg.get("loss", {}).get("loss_name") == "tdt":
        # NeMo has no TDT loss on the CPU; WER is what validation is for.
        model.compute_eval_loss = False
    model.wer.log_prediction = False
    validation = dict(settings.get("validation_ds") or {})
    if validation.get("manifest_filepath"):
        validation["sample_rate"] = validation.get("sample_rate") or int(model.cfg.preprocessor.sample_rate)
        rows = [row for found in sets.values() for row in found]
        lhotse, given = bool(validation.get("use_lhotse")), validation["manifest_filepath"]
        whole = lhotse and not validation.get("tarred_audio_filepaths")
        copies = write_copies(given, rows, folder, patterns=not lhotse, whole_rows=whole)
        nemo_ds = OmegaConf.create({**validation, "manifest_filepath": copies})
        select_channels(nemo_ds)
        model.setup_multiple_validation_data(nemo_ds)
        model._update_dataset_config("validation", OmegaConf.create(validation))
        guard_readers(model._validation_dl)
