"""Snapshots of the weights that learn: kept, put back, averaged, and interpolated with those of the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def snapshot(model: Any) -> Weights:
    """A copy on the CPU of every parameter that learns and every floating buffer (BatchNorm's statistics)."""
    return {name: value.detach().to("cpu", copy=True) for name, value in _moving(model)}


@torch.no_grad()
def put_back(model: Any, weights: Weights) -> None:
    """Writes a snapshot into the model, in place."""
    for name, value in _moving(model):
        value.copy_(weights[name])


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
    """

    def __init__(self, decay: float, weights: Weights) -> None:
        self._decay, self.weights, self.updates = decay, weights, 0

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """Takes a step's weights in."""
        self.updates += 1
        decay = min(self._decay, self.updates / (self.updates + 9))
        for name, value in _moving(model):
            self.weights[name].lerp_(value.detach().to("cpu"), 1 - decay)


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
