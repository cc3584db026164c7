"""Adds LoRA to the encoder by PEFT before training, and merges it into plain weights on export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_llm_feedback.asr.reference import layers_of
from nemo_llm_feedback.core.config import ParametersConfig
from nemo_llm_feedback.core.errors import ConfigError

# Linear layers hold some 80 % of a Conformer's weights, and less than 5 % of those of a convolutional encoder.
_LEAST_LINEAR = 0.25


def choose_parameters(model: Any, config: ParametersConfig) -> None:
    """Freezes parameters and adds LoRA to the encoder, as the settings ask for.

    Args:
        model: a NeMo model; changed in place.
        config: the settings of what learns.

    Raises:
        ConfigError: PEFT is not installed, or the encoder has no layers that the settings can work on.
    """
    if config.recompute_encoder and not layers_of(model.encoder):
        raise ConfigError(
            f"parameters.recompute_encoder: {type(model.encoder).__name__} has no layers that can be computed one by "
            "one; use parameters.recompute_encoder=false."
        )
    if config.freeze_encoder:
        model.encoder.requires_grad_(False)
    if config.lora_rank:
        inject(model, rank=config.lora_rank, alpha=config.lora_alpha)


def inject(model: Any, *, rank: int, alpha: int) -> None:
    """Puts LoRA on every linear layer of the encoder and freezes the encoder's plain weights.

    Args:
        model: a NeMo model; changed in place.
        rank: rank of the update.
        alpha: scale; the update of a weight is alpha / rank · B·A.

    Raises:
        ConfigError: PEFT is not installed, or linear layers are too small a part of the encoder.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"parameters.lora_rank needs PEFT ({error}): pip install peft.") from None
    linear = {name: module for name, module in model.encoder.named_modules() if isinstance(module, nn.Linear)}
    size = sum(p.numel() for p in model.encoder.parameters())
    share = sum(module.weight.numel() for module in linear.values()) / max(size, 1)
    if share < _LEAST_LINEAR:
        raise ConfigError(
            f"parameters.lora_rank: LoRA learns in linear layers, which hold {100 * share:.0f} % of this encoder's "
            "weights (a convolutional encoder?), so it would learn next to nothing; use parameters.lora_rank=0."
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(linear)), model.encoder)


def has_lora(model: Any) -> bool:
    """Whether :func:`inject` was called on the model."""
    return any(name.endswith(".base_layer.weight") for name, _ in model.encoder.named_parameters())


def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict under the names of the stock model, with every LoRA update added to its weight."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    plain: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            continue
        owner, _, leaf = key.rpartition(".base_layer.")
        if not owner:
            plain[key] = value
            continue
        update = layers[owner].get_delta_weight("default") if leaf == "weight" else 0
        plain[f"{owner}.{leaf}"] = (value + update).to(value.dtype)
    return plain


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """While inside, ``model.state_dict()`` returns :func:`merged_state_dict`; for saving."""
    if not has_lora(model):
        yield
        return
    with torch.no_grad():
        plain = merged_state_dict(model)
    model.state_dict = lambda *args, **kwargs: plain
    try:
        yield
    finally:
        del model.state_dict
