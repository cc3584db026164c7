"""Encodes audio in eval mode, by the model or by a frozen copy of the starting model (the reference)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_llm_feedback.asr.heads import Head, heads_of
from nemo_llm_feedback.asr.likelihood import MEMORY_BUDGET_MB, Band
from nemo_llm_feedback.asr.likelihood.autograd import in_modes, modes_of

_PARTS = ("preprocessor", "encoder", "decoder", "joint", "ctc_decoder")


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode with gradient: no SpecAugment, dither, dropout or batch statistics; every flag is restored after.

    NeMo's ``train(mode)`` would flip modules that a user froze, so each module's mode is kept.
    """
    with in_modes(modes_of(module.modules())):
        module.eval()
        yield


@contextmanager
def frozen_statistics(module: nn.Module, *, active: bool) -> Iterator[None]:
    """BatchNorm layers in eval mode, so that a step on pseudo-labels, or of a frozen encoder on labels, leaves their
    running statistics as they are."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if active else []
    with in_modes([(layer, False) for layer in layers]):
        yield


def layers_of(encoder: Any) -> list[nn.Module]:
    """The layers of a Conformer, or the blocks of a convolutional encoder (QuartzNet, Citrinet, ContextNet)."""
    layers: Any = getattr(encoder, "layers", None) or getattr(encoder, "encoder", ())
    return list(layers)


@contextmanager
def recomputed_layers(encoder: Any, *, active: bool) -> Iterator[None]:
    """While inside, the encoder's layers keep no activations and run again in the backward: memory of one layer.

    Exact, since the layers are in eval mode both times: no dropout, no batch statistics.
    """
    layers = layers_of(encoder) if active else []
    for layer in layers:
        forward = functools.partial(_evaluated, layer, layer.forward)
        layer.forward = functools.partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _evaluated(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a layer in eval mode: its second run is in the backward pass, when the model is in train mode again."""
    with evaluation_mode(layer):
        return forward(*args, **kwargs)


def encode(parts: Any, signal: Tensor, signal_len: Tensor, *, augment: bool = False) -> tuple[Tensor, Tensor]:
    """Runs preprocessor and encoder.

    Args:
        parts: a NeMo model or the frozen reference, in eval mode.
        signal: [B, S] waveform samples in [−1, 1].
        signal_len: [B] samples.
        augment: masks parts of the features by the model's SpecAugment.

    Returns:
        [B, D, T] encoder output and [B] frames.
    """
    return parts.encoder(**_features(parts, signal, signal_len, augment=augment))


def _features(parts: Any, signal: Tensor, signal_len: Tensor, *, augment: bool) -> dict[str, Tensor]:
    """[B, F, T] features and [B] frames, as the encoder's arguments."""
    features, lengths = parts.preprocessor(input_signal=signal, length=signal_len)
    if augment:
        with _drawn_by_torch(parts.spec_augmentation, features):
            features = parts.spec_augmentation(input_spec=features, length=lengths)
    return {"audio_signal": features, "length": lengths}


@contextmanager
def _drawn_by_torch(augmentation: nn.Module, features: Tensor) -> Iterator[None]:
    """While inside, masks that NeMo draws by Python follow torch's generator, which a checkpoint has, and rectangles
    (of QuartzNet) fit into the [B, F, T] features, where NeMo raises."""
    of_python: list[Any] = [
        m for m in augmentation.modules() if hasattr(m, "_rng") and not getattr(m, "use_vectorized_code", False)
    ]
    cut = [m for m in of_python if hasattr(m, "rect_time")]
    sizes = [(m.rect_freq, m.rect_time) for m in cut]
    for module in of_python:
        module._rng.seed(int(torch.randint(2**31, ())))
    for module, (high, wide) in zip(cut, sizes, strict=True):
        module.rect_freq, module.rect_time = min(high, features.shape[1]), min(wide, features.shape[2])
    try:
        yield
    finally:
        for module, (high, wide) in zip(cut, sizes, strict=True):
            module.rect_freq, module.rect_time = high, wide


def encode_both(
    model: Any, reference: FrozenReference, signal: Tensor, signal_len: Tensor, *, augment: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same features through the policy's encoder, with gradient, and the reference's, without.

    Args:
        model: the policy, in eval mode.
        reference: the frozen reference, of the same architecture.
        signal: [B, S] waveform samples in [−1, 1].
        signal_len: [B] samples.
        augment: masks parts of the features by the model's SpecAugment, the same for both.

    Returns:
        [B, D, T] the policy's encoder output, [B, D, T] the reference's, and [B] frames.
    """
    features = _features(model, signal, signal_len, augment=augment)
    encoded, lengths = model.encoder(**features)
    with torch.no_grad():
        frozen, _ = reference.encoder(**features)
    return encoded, frozen, lengths


class FrozenReference:
    """A frozen copy of a model. It is not a module, so that no state dict and no optimizer sees its weights.

    Args:
        model: the policy before its first update (and before a resumed checkpoint is loaded).
        which, memory_budget_mb, band: the heads to score with, as in :func:`nemo_llm_feedback.asr.heads.heads_of`.
    """

    preprocessor: Any
    encoder: Any

    def __init__(
        self, model: Any, *, which: str, memory_budget_mb: int = MEMORY_BUDGET_MB, band: Band | None = None
    ) -> None:
        self._heads: dict[str, Any] = {"which": which, "memory_budget_mb": memory_budget_mb, "band": band}
        # One deepcopy call: parts that refer to each other (fused joint → decoding → decoder) stay consistent.
        parts = copy.deepcopy({name: getattr(model, name) for name in _PARTS if hasattr(model, name)})
        for part in parts.values():
            part.eval().requires_grad_(False)
        self._parts = parts
        vars(self).update(parts)  # under the model's names, so that it passes for one
        self.cfg = model.cfg
        self.tokenizer = getattr(model, "tokenizer", None)
        self.heads: list[Head] = heads_of(self, **self._heads)

    def retaken(self, model: Any) -> FrozenReference:
        """A copy of the model as it is now, with the same heads."""
        return FrozenReference(model, **self._heads)

    def to(self, device: torch.device) -> FrozenReference:
        """Moves the copy to a device; returns the reference."""
        for part in self._parts.values():
            part.to(device)
        return self

    @property
    def memory_bytes(self) -> int:
        """Bytes of the copy's parameters."""
        return sum(p.numel() * p.element_size() for part in self._parts.values() for p in part.parameters())

    @torch.no_grad()
    def encode(self, signal: Tensor, signal_len: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] waveform samples and [B] samples → [B, D, T] encoder output and [B] frames, without gradient."""
        return encode(self, signal, signal_len)
