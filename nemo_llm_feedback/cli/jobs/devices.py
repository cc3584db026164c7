"""What a run asks of its GPU, checked before any work: that there is one, its number formats and its memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from nemo.utils import logging
from omegaconf import DictConfig, ListConfig

from nemo_llm_feedback.asr.reference import layers_of
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.llm import estimate_memory, pick_placement, resolve_folder

_GB = 2**30
_CUDA = 2**30  # bytes that CUDA and its libraries take themselves
# Bytes that a FastConformer keeps for its backward pass in float32, counted by what autograd saves: a layer per frame
# and channel, a layer per frame, head and frame that it attends to, the subsampling per frame and channel of its own.
_LAYER, _ATTENTION, _SUBSAMPLING = 153, 8, 1970
_HALF = 2 / 3  # of them under bf16-mixed, which keeps norms and softmax in float32


def check_gpu(cfg: DictConfig) -> None:
    """Refuses a trainer whose GPU is not there, or has no bfloat16 where the precision asks for it.

    Raises:
        ConfigError: the setting that helps is in the message.
    """
    accelerator, precision = str(cfg.trainer.get("accelerator")), str(cfg.trainer.get("precision"))
    if not torch.cuda.is_available():
        if accelerator in ("gpu", "cuda"):
            raise ConfigError("trainer.accelerator asks for a GPU and there is none; use trainer=cpu or trainer=auto.")
        return
    if accelerator != "cpu" and "bf16" in precision and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"trainer.precision={precision} needs a GPU that computes in bfloat16 (compute capability 8.0 and more), "
            f"which {torch.cuda.get_device_name()} does not: set trainer.precision=32."
        )


def one_device(devices: Any) -> bool:
    """Whether Lightning's ``devices`` is a single one: 1, or a list with one index."""
    return str(devices) in ("0", "1") or (isinstance(devices, (list, ListConfig)) and len(devices) == 1)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run needs on its GPU, by estimate.

    Attributes:
        trained: weights with their gradients and AdamW's two moments.
        reference: the frozen copies of the starting model and of the teacher.
        llm: the LLM's weights where it shares the GPU; 0 otherwise.
        joint: the budget of the likelihood.
        activations: what the encoder keeps of a batch for its backward pass; 0 where it is not a Conformer.
        recomputed: what it keeps with ``parameters.recompute_encoder``; the same where that is on.
        waits: whether the LLM is in memory only between the steps.
    """

    trained: int
    reference: int
    llm: int
    joint: int
    activations: int
    recomputed: int
    waits: bool = False

    @property
    def at_least(self) -> int:
        """Without activations, which depend on the batch."""
        return _CUDA + self.trained + self.reference + (self.joint if self.waits else self.llm + self.joint)

    @property
    def total(self) -> int:
        """The most at any time; an LLM that waits and the activations are not there at once."""
        if not self.waits:
            return self.at_least + self.activations
        return max(self.at_least + self.activations, self.at_least + self.llm)

    def ways_out(self) -> dict[str, int]:
        """Setting → bytes that the run would need with it, of those that lessen them."""
        found = {}
        if self.recomputed < self.activations:
            found["parameters.recompute_encoder=true"] = replace(self, activations=self.recomputed)
        if self.activations:
            found["half the model.train_ds.batch_size with twice the trainer.accumulate_grad_batches"] = replace(
                self, activations=self.activations // 2
            )
        if self.llm and not self.waits:
            found["llm.phase=cached"] = replace(self, waits=True)
        if self.llm:
            found["reward=remote with a server on another GPU"] = replace(self, llm=0)
        return {setting: plan.total for setting, plan in found.items() if plan.total < self.total}


def memory_plan(model: Any, *, mixed: bool, device: torch.device) -> MemoryPlan:
    """The memory of a run.

    Args:
        model: prepared by ``setup_feedback``.
        mixed: whether it trains in bf16-mixed.
        device: where it trains.
    """
    setup = model.feedback_setup
    config, llm = setup.config, 0
    if config.llm is not None and config.needs_llm and pick_placement(config.llm)[0] == device:
        llm = estimate_memory(resolve_folder(config.llm), config.llm)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return MemoryPlan(
        trained=4 * parameters + (16 if config.parameters.ema_decay else 12) * trainable,
        reference=setup.reference.memory_bytes * (2 if config.feedback.generations > 1 else 1),
        llm=llm,
        joint=config.feedback.memory_budget_mb * 2**20,
        activations=_activations(model, mixed=mixed, recompute=config.parameters.recompute_encoder),
        recomputed=_activations(model, mixed=mixed, recompute=True),
        waits=config.scores_in_phases,
    )


def _activations(model: Any, *, mixed: bool, recompute: bool) -> int:
    """Bytes for the longest rows in one batch."""
    setup, encoder = model.feedback_setup, model.encoder
    layers, width = len(layers_of(encoder)), getattr(encoder, "d_model", 0)
    if not width or not any(parameter.requires_grad for parameter in encoder.parameters()):
        return 0
    frame = float(model.cfg.preprocessor.window_stride) * encoder.subsampling_factor  # seconds
    longest = max((row.duration for row in setup.staged.rows), default=0.0) / frame
    given = setup.train_ds
    frames = float(given.get("batch_duration") or 0) / frame or float(given.get("batch_size") or 1) * longest
    channels = int(model.cfg.encoder.get("subsampling_conv_channels") or -1)
    attended = _ATTENTION * int(model.cfg.encoder.get("n_heads") or 1) * longest
    per_frame = layers * (_LAYER * width + attended) + _SUBSAMPLING * (channels if channels > 0 else width)
    if recompute:  # one layer at a time, and what enters each
        per_frame += (4 * width - _LAYER * width - attended) * max(0, layers - 1)
    return round(frames * per_frame * (_HALF if mixed else 1))


def check_memory(model: Any, cfg: DictConfig) -> None:
    """Says before the first step that the GPU's memory will not do, with the settings that help.

    Args:
        model: prepared by ``setup_feedback``, with a trainer.
        cfg: the composed configuration.

    Raises:
        ConfigError: weights, optimizer and LLM alone do not fit. That a batch may not is a warning.
    """
    device = model.trainer.strategy.root_device
    if device.type != "cuda":
        return
    plan = memory_plan(model, mixed="bf16" in str(cfg.trainer.get("precision")), device=device)
    gc.collect()  # an earlier run of this process may not have given all back
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if plan.total <= free:
        return
    parts = {"weights, gradients and AdamW": plan.trained, "frozen reference": plan.reference, "LLM": plan.llm}
    parts |= {"joint": plan.joint, "encoder's activations": plan.activations, "CUDA": _CUDA}
    ways = plan.ways_out()
    helps = ", or ".join(f"{setting} ({need / _GB:.1f} GB)" for setting, need in ways.items())
    message = (
        f"{device} has {free / _GB:.1f} GB free and the run needs about {plan.total / _GB:.1f} GB "
        f"({', '.join(f'{name} {size / _GB:.1f}' for name, size in parts.items() if size)}): set "
        f"{helps or 'parameters.lora_rank=16 or parameters.freeze_encoder=true, which have fewer weights learn'}."
    )
    if plan.at_least > free:
        raise ConfigError(message)
    logging.warning(message)
