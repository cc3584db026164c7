"""Tiny transducers in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers.oracles import TinyDecoder, TinyJoint
from torch import Tensor, nn

LABELS, WIDTH = 3, 4
FAMILIES = [None, (0, 1), (0, 1, 2, 3, 4)]


LENGTHS = torch.tensor([5, 3, 0, 1])


Model = tuple[nn.Module, nn.Module]


def make_model(durations: Sequence[int] | None, *, seed: int = 0, scale: float = 1.0) -> Model:
    torch.manual_seed(seed)
    joint = TinyJoint(6, WIDTH, num_classes=LABELS, num_extra_outputs=len(durations or ()))
    with torch.no_grad():
        joint.joint_net[-1].weight *= scale
    return TinyDecoder(LABELS, WIDTH).double().eval(), joint.double().eval()


def random_frames(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
