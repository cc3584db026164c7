"""Rewards that need no LLM: simple rules, and any Python function.

The rules alone are hacked at once (``length`` by insertions, ``negative_length`` by deletions, ``repetition`` by the
empty text): they are components and controls, not goals.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from nemo_llm_feedback.errors import RewardError
from nemo_llm_feedback.normalize import UNSPACED, text_length
from nemo_llm_feedback.rewards.base import register
from nemo_llm_feedback.types import HypothesisGroup, RewardOutput, pad_groups

Judge = Callable[..., Sequence[float | None]]


class RuleReward:
    """A reward that judges each text for itself.

    Args:
        name: the part's name in the output.
        rule: text → reward, any finite number; NaN = cannot judge.
    """

    def __init__(self, name: str, rule: Callable[[str], float]) -> None:
        self.name = name
        self._rule = rule

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], which are also the only part."""
        values = pad_groups([[float(self._rule(text)) for text in group.texts] for group in groups])
        return RewardOutput(values, {self.name: values})


@register("length")
def length_reward() -> RuleReward:
    """More words are better (characters in scripts written without spaces)."""
    return RuleReward("length", text_length)


@register("negative_length")
def negative_length_reward() -> RuleReward:
    """Fewer words are better."""
    return RuleReward("negative_length", lambda text: -text_length(text))


def repetition(text: str) -> float:
    """Returns the share of a text's units that repeat the unit before or close an earlier pair, in [0, 1].

    Units are words, or characters where ``text_length`` counts those. 0 for texts of fewer than two units.
    """
    units = UNSPACED.sub(lambda match: f" {match.group()} ", text).split()
    if len(units) < 2:
        return 0.0
    seen: set[tuple[str, str]] = set()
    repeats = 0
    for pair in itertools.pairwise(units):
        repeats += pair[0] == pair[1] or pair in seen
        seen.add(pair)
    return repeats / (len(units) - 1)


@register("repetition")
def repetition_reward() -> RuleReward:
    """Minus the share of repeated words and word pairs, in [−1, 0]."""
    return RuleReward("repetition", lambda text: -repetition(text))


@register("callable")
class CallableReward:
    """A Python function as a reward.

    Args:
        function: called once for all groups with the list of texts and, as far as its signature takes them, the
            keyword arguments ``descriptions``, ``terms``, ``utterances``, ``sources`` and ``ref_logp``: lists with one
            entry a text. Returns one number a text, None (or NaN) where it cannot judge.
        name: the part's name; the function's own by default.

    Raises:
        RewardError: ``function`` is no function; on call, it failed or returned something else.
    """

    def __init__(self, function: Judge, *, name: str | None = None) -> None:
        if not callable(function):
            raise RewardError(f"A callable reward needs a function, got {function!r}.")
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._taken = {p.name for p in parameters}

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], which are also the only part.

        Raises:
            RewardError: the function raised, or did not return one number or None a text.
        """
        texts = [text for group in groups for text in group.texts]
        try:
            answers = list(self._function(texts, **self._keywords(groups)))
            numbers = [math.nan if answer is None else float(answer) for answer in answers]
        except Exception as error:  # whatever the user's function raises is reported under its name
            raise RewardError(f"The reward function {self.name} failed: {type(error).__name__}: {error}") from error
        if len(numbers) != len(texts):
            raise RewardError(
                f"The reward function {self.name} returned {len(numbers)} values for {len(texts)} texts."
            )
        rest = iter(numbers)
        values = pad_groups([[next(rest) for _ in group.hypotheses] for group in groups])
        values[values.isinf()] = math.nan
        return RewardOutput(values, {self.name: values})

    def _keywords(self, groups: Sequence[HypothesisGroup]) -> dict[str, list[Any]]:
        members = [(group, n) for group in groups for n in range(len(group))]
        offered: dict[str, list[Any]] = {
            "descriptions": [group.context.description for group, _ in members],
            "terms": [list(group.context.terms) for group, _ in members],
            "utterances": [group.utterance for group, _ in members],
            "sources": [group.hypotheses[n].source for group, n in members],
            "ref_logp": [group.ref_logp[n] if group.ref_logp else math.nan for group, n in members],
        }
        return {name: column for name, column in offered.items() if self._takes_all or name in self._taken}
