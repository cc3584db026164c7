"""Rescoring for code that knows nothing of it: the ``rescoring`` key of decoding configurations, and ``install``."""

from __future__ import annotations

import functools
from typing import Any

from nemo.collections.asr import models as nemo_models
from nemo.core import ModelPT
from nemo.utils import logging

from nemo_llm_feedback.asr.checkpoints import SUPPORTED
from nemo_llm_feedback.core.config.rescoring import RescoringConfig
from nemo_llm_feedback.core.errors import CheckpointError
from nemo_llm_feedback.rescoring.model import (
    RescoringMixin,
    attach,
    has_key,
    rescorer_of,
    take_key,
)
from nemo_llm_feedback.rescoring.scoring import Rescorer

_STOCK = tuple(getattr(nemo_models, name) for name in SUPPORTED)
_undo: list[tuple[type, str, Any]] = []


def accept_key(cls: type) -> None:
    """Lets ``change_decoding_strategy`` of a model class switch rescoring on by the key ``rescoring``.

    Only what is passed to that method counts: the key in a checkpoint's own configuration switches nothing on.
    """
    inherited = cls.change_decoding_strategy  # type: ignore[attr-defined]

    @functools.wraps(inherited)
    def change_decoding_strategy(self: Any, decoding_cfg: Any = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, RescoringMixin) or not has_key(decoding_cfg):
            return inherited(self, decoding_cfg, *args, **kwargs)
        rest, settings = take_key(decoding_cfg)
        attach(self, rescorer_of(settings))
        return self.change_decoding_strategy(rest, *args, **kwargs)

    cls.change_decoding_strategy = change_decoding_strategy  # type: ignore[attr-defined]


def install(settings: RescoringConfig | None = None) -> None:
    """Teaches NeMo's stock classes rescoring, for this process.

    Args:
        settings: every supported model that is restored from now on rescores by them (the LLM is loaded with the
            first); None = the ``rescoring`` key in decoding configurations, and nothing else, switches it on.
    """
    uninstall()
    for cls in _STOCK:
        _undo.append((cls, "change_decoding_strategy", cls.__dict__.get("change_decoding_strategy")))
        accept_key(cls)
    if settings is not None:
        _undo.append((ModelPT, "restore_from", ModelPT.__dict__["restore_from"]))
        ModelPT.restore_from = classmethod(_restoring(ModelPT.__dict__["restore_from"].__func__, settings))


def uninstall() -> None:
    """Takes :func:`install` back; models that rescore already go on."""
    while _undo:
        cls, name, before = _undo.pop()
        if before is None:
            delattr(cls, name)
        else:
            setattr(cls, name, before)


def _restoring(original: Any, settings: RescoringConfig) -> Any:
    rescorers: list[Rescorer] = []

    @functools.wraps(original)
    def restore_from(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, *args, **kwargs)
        if not isinstance(model, ModelPT):  # return_config=True
            return model
        if not rescorers:
            rescorers.append(Rescorer.from_settings(settings, allow_dotted=True))
        try:
            attach(model, rescorers[0])
        except CheckpointError as error:
            logging.warning(f"not rescored: {error}")
        return model

    return restore_from
