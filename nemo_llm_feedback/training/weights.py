"""Snapshots of the weights that learn: kept, put back, averaged, and interpolated with those of the start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.core.errors import TrainingError

Weights = dict[str, Tensor]


def snapshot(model: Any) -> Weights:
    """A copy on the CPU of every parameter that learns and every floating buffer (BatchNorm's statistics).

    Of a model on a GPU it is in page-locked memory, to and from which copies take the bus's full speed.
    """
    return {name: _host_copy(value.detach()) for name, value in _moving(model)}


def _host_copy(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value.to("cpu", copy=True)
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value)


@torch.no_grad()
def put_back(model: Any, weights: Weights) -> None:
    """Writes a snapshot into the model, in place."""
    for name, value in _moving(model):
        value.copy_(weights[name])


def kept_name(step: int) -> str:
    """File name of the weights that were kept at a step."""
    return f"kept-step={step}.pt"


def save_kept(folder: Path, step: int, weights: Weights) -> None:
    """Writes a snapshot beside the checkpoints that name it, and removes those that none names any more.

    Args:
        folder: of the checkpoints.
        step: the snapshot's; later checkpoints name it until another snapshot is kept.
        weights: the snapshot.
    """
    name = kept_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.tmp"
    torch.save(weights, temporary)
    temporary.replace(folder / name)  # a kill leaves none or all of it
    steps = [re.search(r"step=(\d+)", path.name) for path in folder.glob("*.ckpt")]
    if all(steps):  # of checkpoints that are named otherwise it is not known which they need
        kept = {int(path.stem.rpartition("=")[2]): path for path in folder.glob("kept-step=*.pt")}
        # NeMo logs the step before it is taken, so a checkpoint may be of the step after the one in its name.
        taken = [int(found[1]) + late for found in steps if found for late in (0, 1)]
        named = {max((k for k in kept if k <= last), default=step) for last in taken}
        for unused in kept.keys() - named - {step}:
            kept[unused].unlink()


def load_kept(name: str, *folders: Path) -> Weights:
    """Reads what :func:`save_kept` wrote, from the first of the folders that has it.

    Raises:
        TrainingError: none has.
    """
    for folder in folders:
        if (folder / name).is_file():
            found: Weights = torch.load(folder / name, map_location="cpu", weights_only=True)
            return {key: value.pin_memory() if torch.cuda.is_available() else value for key, value in found.items()}
    raise TrainingError(
        f"the checkpoint names its best weights, {name}, and neither {' nor '.join(map(str, folders))} has the file: "
        "put it back, or start again in another folder."
    )


def interpolated(start: Weights, end: Weights, share: float) -> Weights:
    """start + share·(end − start) (weight-space ensembles, Wortsman et al. 2022, arXiv 2109.01903).

    A LoRA update is B·A with B = 0 at the start: scaling B alone scales the update.
    """
    return {
        name: value if "lora_A" in name else start[name] + share * (value - start[name]) for name, value in end.items()
    }


class MovingAverage:
    """Exponential moving average of the weights: avg ← d·avg + (1 − d)·weights, with d raised to its value slowly.

    Args:
        decay: d, in (0, 1); the n-th update uses min(d, n / (n + 9)), so that the start is soon forgotten.
        weights: the weights at which it starts.
        device: where it is kept; on the model's a step copies nothing.
    """

    def __init__(self, decay: float, weights: Weights, device: torch.device) -> None:
        self._decay, self.updates = decay, 0
        self.weights = {name: value.to(device) for name, value in weights.items()}

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """Takes a step's weights in."""
        self.updates += 1
        decay = min(self._decay, self.updates / (self.updates + 9))
        for name, value in _moving(model):
            self.weights[name].lerp_(value.detach(), 1 - decay)


@contextmanager
def holding(model: Any, weights: Weights | None) -> Iterator[None]:
    """While inside, the model has these weights (those that it has if None)."""
    if weights is None:
        yield
        return
    before = snapshot(model)
    put_back(model, weights)
    try:
        yield
    finally:
        put_back(model, before)


def _moving(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.data
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "running_" in name:
            yield name, buffer
