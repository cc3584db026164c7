"""Errors for users of the package. Every message names what is wrong and the fix, and may list several faults."""

from collections.abc import Iterable

MAX_LISTED = 20


class FeedbackError(Exception):
    """Base class of all errors that this package raises for its users."""


class ConfigError(FeedbackError, ValueError):
    """A setting is unknown, missing, out of range or contradicts another one."""


class ManifestError(FeedbackError, ValueError):
    """A manifest has unreadable lines or rows, or rows that the run cannot use."""


class CheckpointError(FeedbackError, ValueError):
    """A checkpoint is not a ``.nemo``, or its class is not supported."""


class LLMError(FeedbackError, ValueError):
    """An LLM folder, hub id, template or tokenizer cannot be used for scoring."""


class RewardError(FeedbackError, RuntimeError):
    """A reward failed while scoring."""


class TrainingError(FeedbackError, RuntimeError):
    """Training had to stop: non-finite steps, or no group with signal."""


class DecodingError(FeedbackError, RuntimeError):
    """A decoder cannot give what was asked of it."""


def list_faults(head: str, items: Iterable[object]) -> str:
    """A message with one line per item, the first `MAX_LISTED` of them."""
    lines = [f"\n  {item}" for item in items]
    more = f"\n  … and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return head + "".join(lines[:MAX_LISTED]) + more
