"""Tools for backward passes that run modules again: the same train/eval modes and dropout, no double backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

Grads = tuple[Tensor | None, ...]
Modes = list[tuple[nn.Module, bool]]


def differentiable_once(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Makes a second differentiation raise, also where the first one's result has other differentiable parts.

    PyTorch's ``once_differentiable`` returns a constant when the incoming gradient is one: a gradient penalty would
    then silently lose its terms.
    """

    @functools.wraps(backward)
    def _once(ctx: Any, *grads: Tensor) -> Grads:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        # An input that needs a gradient, so that the refusal is part of the second graph.
        trip = torch.zeros((), requires_grad=True)
        return tuple(grad if grad is None else _Refuse.apply(grad, trip) for grad in found)

    return _once


class _Refuse(torch.autograd.Function):
    """Identity whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, trip: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        """Raises."""
        raise RuntimeError("the exact log-likelihood is differentiable once: leave out create_graph=True.")


def modes_of(modules: Iterable[nn.Module]) -> Modes:
    """Modules with their train (True) or eval mode."""
    return [(module, module.training) for module in modules]


@contextmanager
def in_modes(modes: Modes) -> Iterator[None]:
    """Inside, the modules are in these modes; afterwards in those they had, also where they were changed inside.

    Each flag is set by itself: NeMo's ``train(mode)`` would flip modules that a user froze.
    """
    before = modes_of(module for module, _ in modes)
    try:
        for module, training in modes:
            module.training = training
        yield
    finally:
        for module, training in before:
            module.training = training


RandomState = tuple[Tensor, tuple[list[int], list[Tensor]]]


def random_state(like: Tensor) -> RandomState:
    """States of the random number generators of the CPU and of the tensor's device."""
    return torch.get_rng_state(), get_device_states(like)


@contextmanager
def replayed(state: RandomState | None) -> Iterator[None]:
    """Inside, random numbers repeat from ``state``, so that dropout draws the masks of the forward pass again."""
    if state is None:
        yield
        return
    host, (devices, states) = state
    with torch.random.fork_rng(devices):
        torch.set_rng_state(host)
        set_device_states(devices, states)
        yield
