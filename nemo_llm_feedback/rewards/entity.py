"""Rewards about the context's terms: an LLM log-probability that weighs them, and two rules without an LLM.

``entity`` is logP_LLM(h | context) + (weight − 1)·T(h), where T sums over the tokens of h that belong to a listed
term. Log-probabilities are ≤ 0, so plain weighting (``relative: false``) makes every mention of a term dearer; by
default T is therefore what the list does for these tokens, log p(token | context) − log p(token | context without
terms): above 0 where the list makes them likelier, below where it does not.

A small LLM can charge ten nats more for one listed name than for another of which it knows as little, and then puts
the cheaper name where the other was spoken. With ``shared_price`` every mention of a listed term counts the same, the
mean over the list of what each would count alone. That is a class of words whose members are equally likely (Brown et
al., Class-based n-gram models of natural language, 1992, eq. 3, with P(w | class) = 1/K): the LLM decides where a name
fits, the recogniser which one.

``entity_hits`` counts the listed terms that a member mentions. ``entity_false_alarms`` counts, negatively, those
mentions that nothing in the recogniser's best transcript looks or sounds like. Without a transcript a false alarm
cannot be known, only suspected: the definition is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context, HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.llm import LLMScorer, TextScore
from nemo_llm_feedback.llm.queries import score_terms
from nemo_llm_feedback.llm.term_ranking import find_terms, likeness
from nemo_llm_feedback.rewards.asking import AskingReward, Pair, ScoreCache, View
from nemo_llm_feedback.rewards.base import register
from nemo_llm_feedback.rewards.rules import GroupRuleReward, best_transcript


class _Spelled(NamedTuple):
    """The log-probability of a text, in nats: outside and inside its mentions, and inside without the term list."""

    outside: float
    inside: float
    baseline: float


@register("entity")
class EntityReward(AskingReward):
    """The LLM's log-probability with another weight on the tokens of listed terms.

    Args:
        scorer: the LLM.
        weight: weight of those tokens; 1 gives the plain log-probability.
        relative: weigh what the term list changes for them instead of their whole log-probability.
        shared_price: every mention counts the mean over the listed terms, not what its tokens cost. For terms that
            the LLM knows equally little; of a menu it may well know which item is likely.
        cache, view, allow_no_context: see :class:`~nemo_llm_feedback.rewards.asking.AskingReward`.

    Raises:
        RewardError: the weight is negative.
    """

    name = "entity"

    def __init__(
        self,
        scorer: LLMScorer,
        *,
        weight: float = 2.0,
        relative: bool = True,
        shared_price: bool = False,
        cache: ScoreCache | str | None = None,
        view: View | None = None,
        allow_no_context: bool = False,
    ) -> None:
        if not weight >= 0:
            raise RewardError(f"reward.settings.weight={weight} must be ≥ 0; 1 weighs all tokens alike.")
        super().__init__(scorer, cache=cache, view=view, allow_no_context=allow_no_context)
        self._weight, self._relative, self._shared_price = weight, relative, shared_price

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N] in nats, and the parts ``entity`` (the same) and ``entity_terms``, in nats.

        ``entity_terms`` is T or, with a shared price, what the mentions count in place of their tokens.

        Raises:
            RewardError: a group has no context, or too many groups get no score.
        """
        shown, broken = self._shown(groups), self._num_broken()
        asked = [(group.context, text) for group in shown for text in group.texts]
        if self._shared_price:
            asked += [(group.context, term) for group in shown for term in group.context.terms]
        found = self._find(asked)
        values, terms = [], []
        for group in shown:
            rows = [found[group.context, text] for text in group.texts]
            if self._shared_price:
                # The mean over the terms that the LLM can score, else NaN.
                worth = [self._worth(found[group.context, term]) for term in group.context.terms]
                scored = [value for value in worth if math.isfinite(value)]
                price = sum(scored) / len(scored) if scored else math.nan
                mentions = [len(find_terms(text, group.context.terms)) for text in group.texts]
                part = [n * price if n else 0.0 for n in mentions]
                values.append([row.outside + counted for row, counted in zip(rows, part, strict=True)])
            else:
                part = [row.inside - row.baseline for row in rows]
                values.append([row.outside + self._worth(row) for row in rows])
            terms.append(part)
        self._count(values, broken=broken)
        padded = pad_groups(values)
        return RewardOutput(padded, {self.name: padded, "entity_terms": pad_groups(terms)})

    def _worth(self, row: _Spelled) -> float:
        """What the mentions of a text count, in nats."""
        return row.inside + (self._weight - 1) * (row.inside - row.baseline)

    def _find(self, pairs: Sequence[Pair]) -> dict[Pair, _Spelled]:
        kinds = ("total", "inside", *(["baseline"] if self._relative else []))
        found = self._scores(pairs, [f"entity:{self._scorer.identity}:{kind}" for kind in kinds], self._ask)
        return {
            pair: _Spelled(row[0].logp - row[1].logp, row[1].logp, row[2].logp if self._relative else 0.0)
            for pair, row in found.items()
        }

    def _ask(self, requests: list[tuple[Context, list[str]]]) -> list[list[list[TextScore]]]:
        asked = [(context, context.terms, texts) for context, texts in requests]
        rows = [[list(score) for score in row] for row in score_terms(self._scorer, asked)]
        if self._relative:
            bare = [(replace(context, terms=()), terms, texts) for context, terms, texts in asked]
            for row, baselines in zip(rows, score_terms(self._scorer, bare), strict=True):
                for scores, baseline in zip(row, baselines, strict=True):
                    scores.append(baseline.inside)
        return rows


@register("entity_hits")
def entity_hits_reward() -> GroupRuleReward:
    """The number of different listed terms that a member mentions."""
    return GroupRuleReward("entity_hits", lambda group: [float(len(_mentioned(group, text))) for text in group.texts])


@register("entity_false_alarms")
def entity_false_alarms_reward(*, min_likeness: float = 60.0) -> GroupRuleReward:
    """Minus the number of different listed terms in a member that the recogniser's best transcript does not support.

    Args:
        min_likeness: a term is supported where the likeness (0 to 100, see ``llm.term_ranking``) of it and some span
            of the recogniser's best transcript (see ``rules.best_transcript``) is at least this.
    """

    def _false_alarms(group: HypothesisGroup) -> list[float]:
        mentioned = [_mentioned(group, text) for text in group.texts]
        terms = sorted(set().union(*mentioned))
        likest = dict(zip(terms, likeness(terms, [best_transcript(group)]).tolist(), strict=True)) if terms else {}
        return [0.0 - sum(likest[term] < min_likeness for term in found) for found in mentioned]

    return GroupRuleReward("entity_false_alarms", _false_alarms)


def _mentioned(group: HypothesisGroup, text: str) -> set[str]:
    return {mention.term for mention in find_terms(text, group.context.terms)}
