"""Base class of the rewards that ask an LLM: it caches the answers and refuses groups without context."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.llm import TextScore
from nemo_llm_feedback.rewards.cache import ScoreCache, open_cache, score_key

Item = TypeVar("Item", bound=Hashable)
Pair = tuple[Context, str]
View = Callable[[HypothesisGroup], HypothesisGroup]
"""How a group is shown to the LLM: the same members, perhaps with other terms and another spelling."""


class AskingReward:
    """What the rewards that ask an LLM share.

    Args:
        reads_context: whether the LLM's prompt shows the context at all.
        cache: store of raw scores, or the path of one on disk (see ``open_cache``); in memory by default.
        view: how groups are shown to the LLM; as they are by default.
        allow_no_context: take groups that have no context instead of refusing.
    """

    def __init__(
        self, *, reads_context: bool, cache: ScoreCache | str | None, view: View | None, allow_no_context: bool
    ) -> None:
        self.cache = open_cache(cache)
        self._view = view
        self._needs_context = reads_context and not allow_no_context

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up scores that the cache knew so far; NaN before the first."""
        asked = self.cache.hits + self.cache.misses
        return self.cache.hits / asked if asked else math.nan

    def _shown(self, groups: Sequence[HypothesisGroup]) -> list[HypothesisGroup]:
        """The groups as the LLM sees them.

        Raises:
            RewardError: names the first utterance without context where one is needed, and the fix.
        """
        for group in groups:
            if self._needs_context and not group.context:
                raise RewardError(
                    f"Utterance {group.utterance} has no context for the LLM: set context.description, context.terms "
                    "or context.terms_file, or a 'context' in the manifest row (context.required=false goes without)."
                )
        return [self._view(group) for group in groups] if self._view else list(groups)

    def _look_up(
        self, keys: Mapping[Item, Sequence[str]], ask: Callable[[list[Item]], Sequence[Sequence[TextScore]]]
    ) -> dict[Item, Sequence[TextScore]]:
        """Returns the scores of every item, asking for those that the cache lacks and keeping the answers.

        Args:
            keys: item → the keys of its scores, of which it may have several.
            ask: items → their scores, in the order of their keys.
        """
        known = self.cache.get_many([key for row in keys.values() for key in row])
        found: dict[Item, Sequence[TextScore]] = {
            item: [known[key] for key in row] for item, row in keys.items() if all(key in known for key in row)
        }
        lacking = [item for item in keys if item not in found]
        if lacking:
            answers = dict(zip(lacking, ask(lacking), strict=True))
            self.cache.put_many({k: s for item, row in answers.items() for k, s in zip(keys[item], row, strict=True)})
            found.update(answers)
        return found

    def _scores(
        self,
        pairs: Sequence[Pair],
        identities: Sequence[str],
        ask: Callable[[list[tuple[Context, list[str]]]], Sequence[Sequence[Sequence[TextScore]]]],
    ) -> dict[Pair, Sequence[TextScore]]:
        """Returns the scores of (context, text) pairs.

        Args:
            pairs: what is scored; a pair may come several times.
            identities: for each score of a pair, a name of everything else that it depends on.
            ask: (context, its texts) → per context, per text its scores; a context comes once, so that its prompt is
                run once.
        """

        def _by_context(lacking: list[Pair]) -> list[Sequence[TextScore]]:
            texts: dict[Context, list[str]] = {}
            for context, text in lacking:
                texts.setdefault(context, []).append(text)
            requests = list(texts.items())
            answers = {
                (context, text): scores
                for (context, column), rows in zip(requests, ask(requests), strict=True)
                for text, scores in zip(column, rows, strict=True)
            }
            return [answers[pair] for pair in lacking]

        keys = {pair: [score_key(identity, *pair) for identity in identities] for pair in dict.fromkeys(pairs)}
        return self._look_up(keys, _by_context)
