"""What backward passes that evaluate modules again share: no second backward, and the forward's modes and dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Grads = tuple[Tensor | None, ...]
Modes = list[tuple[nn.Module, bool]]


def differentiable_once(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Makes a second differentiation raise, also where the first one's result has other differentiable parts.

    PyTorch's own ``once_differentiable`` lets the result pass as a constant when the incoming gradient is one: a
    gradient penalty would then silently lose its terms.
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


RandomState = tuple[Tensor, Tensor | None]


def random_state(like: Tensor) -> RandomState:
    """The states of the CPU's random numbers and of those of the tensor's device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(like.device) if like.is_cuda else None


@contextmanager
def replayed(state: RandomState | None, like: Tensor) -> Iterator[None]:
    """Inside, random numbers repeat from ``state``, so that the dropout masks of the forward pass come again."""
    if state is None:
        yield
        return
    host, device = state
    with torch.random.fork_rng([like.device] if device is not None else []):
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, like.device)
        yield
