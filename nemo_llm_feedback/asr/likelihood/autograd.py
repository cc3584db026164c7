"""Functions with a hand-written backward that has no backward of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Makes a second differentiation raise, also where the first one's result has other differentiable parts.

    PyTorch's own ``once_differentiable`` lets the result pass as a constant when the incoming gradient is one: a
    gradient penalty would then lose its terms without a word.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Grads:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        return tuple(grad if grad is None else _refuse(grad) for grad in found)

    return wrapped


def _refuse(grad: Tensor) -> Tensor:
    return _Refuse.apply(grad, torch.zeros((), requires_grad=True))


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError("the exact log-likelihood is differentiable once: leave out create_graph=True.")
