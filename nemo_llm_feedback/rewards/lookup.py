"""What the rewards that ask an LLM share: looking scores up before asking, and refusing groups without context."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.rewards.cache import CachedScore, ScoreCache

Item = TypeVar("Item", bound=Hashable)
View = Callable[[HypothesisGroup], HypothesisGroup]
"""How a group is shown to the LLM: the same members, perhaps with other terms and another spelling."""


def look_up(
    cache: ScoreCache,
    keys: Mapping[Item, Sequence[str]],
    ask: Callable[[list[Item]], Sequence[Sequence[CachedScore]]],
) -> dict[Item, list[CachedScore]]:
    """Returns the scores of every item, asking for those that the cache lacks and keeping the answers.

    Args:
        cache: the store; it never keeps values that are not finite.
        keys: item → the keys of its scores, of which it may have several.
        ask: items → their scores, in the order of their keys.
    """
    known = cache.get_many([key for row in keys.values() for key in row])
    found = {item: [known[key] for key in row] for item, row in keys.items() if all(key in known for key in row)}
    lacking = [item for item in keys if item not in found]
    answers = ask(lacking) if lacking else []
    for item, scores in zip(lacking, answers, strict=True):
        found[item] = list(scores)
        cache.put_many(dict(zip(keys[item], scores, strict=True)))
    return found


def by_context(items: Sequence[tuple[Context, str]]) -> list[tuple[Context, list[str]]]:
    """The texts of each context, so that its prompt runs once."""
    texts: dict[Context, list[str]] = {}
    for context, text in items:
        texts.setdefault(context, []).append(text)
    return list(texts.items())


def check_contexts(groups: Sequence[HypothesisGroup], *, needed: bool) -> None:
    """Refuses groups without context where one is needed.

    Raises:
        RewardError: names the first such utterance and the fix.
    """
    for group in groups:
        if needed and not group.context:
            raise RewardError(
                f"Utterance {group.utterance} has no context for the LLM: set context.description, context.terms "
                "or context.terms_file, or a 'context' in the manifest row (context.required=false goes without)."
            )
