"""Errors for users of the package. Every message names what is wrong and the fix, and may list several faults."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


@contextmanager
def refused(head: str, *kinds: type[Exception]) -> Iterator[None]:
    """What a library raises while inside, as a ConfigError of one line.

    Args:
        head: what the message begins with.
        kinds: the errors by which the library refuses what it is given.
    """
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{head} {' '.join(str(error).split())}") from None


def short(value: object) -> str:
    """A value as it is shown in a message, at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"


def reason(error: Exception) -> str:
    """The first line of a library's error, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def list_faults(head: str, items: Iterable[object]) -> str:
    """A message with one line per item, the first `MAX_LISTED` of them."""
    lines = [f"\n  {item}" for item in items]
    more = f"\n  … and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return head + "".join(lines[:MAX_LISTED]) + more
