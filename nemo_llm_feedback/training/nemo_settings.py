"""Tries NeMo's sections of the settings on NeMo's classes, so that what these refuse is found before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS, get_scheduler
from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS, get_optimizer
from nemo.utils.exp_manager import ExpManagerConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

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
