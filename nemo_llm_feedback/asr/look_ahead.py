"""Streaming checkpoints with several look-aheads: the attention context that their encoder works in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nemo_llm_feedback.core.errors import ConfigError


def look_aheads(encoder: Any) -> list[list[int]]:
    """The attention contexts, in frames, of an encoder that has several; empty for any other."""
    known = getattr(encoder, "att_context_size_all", None) or []
    return [list(context) for context in known] if len(known) > 1 else []


def draw_look_ahead(encoder: Any, index: int) -> list[int] | None:
    """One of the contexts, as NeMo's training draws them, but the same for the same index on every rank.

    Args:
        encoder: NeMo's encoder.
        index: of the step or the refresh.

    Returns:
        None where there are not several.
    """
    contexts = look_aheads(encoder)
    return random.Random(index).choices(contexts, weights=encoder.att_context_probs)[0] if contexts else None


@contextmanager
def looking_ahead(context: Sequence[int] | None, *encoders: Any) -> Iterator[None]:
    """Inside, these encoders work in ``context`` when they are in eval mode; None = in the one that they have."""
    before = [encoder.att_context_size for encoder in encoders] if context is not None else []
    for encoder in encoders[: len(before)]:
        encoder.att_context_size = list(context or ())
    try:
        yield
    finally:
        for encoder, known in zip(encoders, before, strict=False):
            encoder.att_context_size = known


def keep_look_ahead(encoder: Any, context: Sequence[int]) -> None:
    """Makes one of several contexts the only one, in training and in evaluation; an export keeps all.

    Raises:
        ConfigError: the encoder does not have it.
    """
    known = look_aheads(encoder)
    if list(context) not in known:
        has = f"has {', '.join(map(str, known))}" if known else "has not several"
        raise ConfigError(
            f"feedback.look_ahead={list(context)}, but the checkpoint {has}: choose one of its, or null."
        )
    encoder.att_context_size, encoder.att_context_size_all, encoder.att_context_probs = (
        list(context),
        [list(context)],
        [1.0],
    )
