"""Adapts NeMo ASR checkpoints to unlabeled audio with the feedback of a frozen LLM.

``adapt``, ``evaluate``, ``transcribe`` and ``score`` are the commands of the same names; ``restore`` gives a NeMo
model with the feedback loss for a trainer of your own; ``enable_rescoring`` lets a stock NeMo model rescore its beam.
All are imported on first use: NeMo takes 15 s to import, ``--help`` does not need it.
"""

from __future__ import annotations

import importlib

from nemo_llm_feedback.core.version import __version__

_PLACES = {
    "adapt": "cli.api",
    "evaluate": "cli.jobs.evaluate",
    "transcribe": "cli.jobs.transcribe",
    "score": "cli.api",
    "compose_config": "core.config.compose",
    "restore": "training.models",
    "enable_rescoring": "rescoring",
    "LLMReward": "rewards",
    "Reward": "rewards",
    "load_llm": "llm",
    "FeedbackError": "core.errors",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(importlib.import_module(f"nemo_llm_feedback.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
