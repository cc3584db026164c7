"""Streaming checkpoints with several look-aheads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import build_nemo
from nemo.collections.asr.modules import ConformerEncoder


def streaming_nemo(path: Path, tokenizer_dir: Path, *, contexts: list[list[int]]) -> Path:
    """A tiny CTC checkpoint with these attention contexts, the first of which is the default."""
    encoder = {"att_context_size": contexts, "att_context_style": "chunked_limited", "conv_context_size": "causal"}
    encoder |= {"causal_downsampling": True, "conv_norm_type": "layer_norm"}
    settings = {f"encoder__{key}": value for key, value in encoder.items()}
    return build_nemo("ctc_bpe", path, tokenizer_dir=tokenizer_dir, **settings)


def seen_by_encoders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[int]]]:
    """(gradient, context) of every pass of all encoders from now on."""
    seen: list[tuple[bool, list[int]]] = []
    honest = ConformerEncoder._create_masks

    def watched(self: Any, *args: Any, **settings: Any) -> Any:
        seen.append((torch.is_grad_enabled(), list(settings["att_context_size"])))
        return honest(self, *args, **settings)

    monkeypatch.setattr(ConformerEncoder, "_create_masks", watched)
    return seen
