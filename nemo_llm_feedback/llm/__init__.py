"""The scoring LLM. ``load_llm(config).score([(context, texts)])`` returns log p(text | context) of every text.

Nothing heavy is imported before ``load_llm`` is called; ``check_llm_folder`` refuses an unusable LLM unloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_llm_feedback.llm.folder import check_llm_folder, estimate_memory, resolve_folder

if TYPE_CHECKING:
    from nemo_llm_feedback.core.config import LLMConfig
    from nemo_llm_feedback.llm.scorer import LLMScorer, TextScore

__all__ = ["LLMScorer", "TextScore", "check_llm_folder", "estimate_memory", "load_llm", "open_llm", "resolve_folder"]


def load_llm(config: LLMConfig) -> LLMScorer:
    """Loads the LLM that ``config`` names, frozen, and checks its scoring on a short example.

    Raises:
        LLMError: settings, files, template or tokenizer cannot be used, or the check failed.
    """
    from nemo_llm_feedback.llm.scorer import load_llm as load

    return load(config)


def open_llm(config: LLMConfig) -> LLMScorer:
    """Checks the LLM's files; its weights are loaded at the first text that must be scored.

    Raises:
        LLMError: settings, files, template or tokenizer cannot be used.
    """
    from nemo_llm_feedback.llm.scorer import open_llm as open_

    return open_(config)


def __getattr__(name: str) -> object:
    """Gives ``LLMScorer`` and ``TextScore`` without importing transformers before they are asked for."""
    if name in ("LLMScorer", "TextScore"):
        from nemo_llm_feedback.llm import scorer

        return getattr(scorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
