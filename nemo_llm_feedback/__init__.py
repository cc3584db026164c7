"""Adapts NeMo ASR checkpoints to unlabeled audio with the feedback of a frozen LLM.

``restore`` and the model classes are imported on first use: NeMo takes 15 s to import, ``--help`` does not need it.
"""

from __future__ import annotations

from nemo_llm_feedback.core.version import __version__

__all__ = ["__version__", "restore"]


def __getattr__(name: str) -> object:
    if name == "restore":
        from nemo_llm_feedback.training.models import restore

        return restore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
