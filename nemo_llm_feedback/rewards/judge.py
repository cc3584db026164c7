"""The LLM as a judge: it is asked whether a transcript is right and answers with one of a few fixed tokens.

``yes_no`` is P(yes) / (P(yes) + P(no)), in [0, 1]; ``log_odds`` is log P(yes) − log P(no), in nats, which does not
saturate and adds to log-probabilities; ``rating`` is the expectation Σ k·P(k) / Σ P(k) of a digit. The probability
that the LLM puts on the fixed answers at all is returned beside it: where it is small, the LLM would rather answer
something else, and its judgement means little.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from nemo_llm_feedback.core.errors import LLMError, RewardError
from nemo_llm_feedback.core.types import Context, HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.llm import LLMScorer, TextScore
from nemo_llm_feedback.llm.prompts import ANSWERS, read_template
from nemo_llm_feedback.llm.queries import AnswerScorer
from nemo_llm_feedback.rewards.asking import AskingReward, ScoreCache, View
from nemo_llm_feedback.rewards.base import register

logger = logging.getLogger(__name__)

Mode = Literal["yes_no", "log_odds", "rating"]
_LITTLE = 0.5


@register("judge")
class JudgeReward(AskingReward):
    """A judgement of each member, as a number.

    Args:
        scorer: the LLM.
        mode: ``yes_no``, ``log_odds`` (two answers, the good one first) or ``rating`` (answers that are numbers).
        template: path of a ``judge`` template; null = the built-in one of the mode.
        answers: single-token answers, for yes and no the good one first; null = Yes and No, or 1 to 5, for a base LLM
            in lower case and with a leading space where that is one token.
        cache, view, allow_no_context: see :class:`~nemo_llm_feedback.rewards.asking.AskingReward`.

    Raises:
        LLMError: the template is faulty, or an answer is not one token.
        RewardError: the answers do not fit the mode.
    """

    name = "judge"

    def __init__(
        self,
        scorer: LLMScorer,
        *,
        mode: Mode = "yes_no",
        template: str | None = None,
        answers: Sequence[Any] | None = None,
        cache: ScoreCache | str | None = None,
        view: View | None = None,
        allow_no_context: bool = False,
    ) -> None:
        asked = self._answer_scorer(scorer, "rating" if mode == "rating" else "yes_no", template, answers)
        super().__init__(asked, cache=cache, view=view, allow_no_context=allow_no_context)
        self._mode = mode
        self._numbers = _numbers(asked.answers, mode)
        self._warned = False

    @staticmethod
    def _answer_scorer(
        scorer: LLMScorer, use: str, template: str | None, answers: Sequence[Any] | None
    ) -> AnswerScorer:
        """Asks the LLM by a template of this use."""
        chat = scorer.encoder.chat
        prompt = read_template(template, chat=chat, use=use, key="reward.settings.template")
        words = [str(answer) for answer in answers] if answers else ANSWERS[use]
        if chat or answers:
            return AnswerScorer(scorer, template=prompt, answers=words)
        try:
            return AnswerScorer(scorer, template=prompt, answers=[f" {word.lower()}" for word in words])
        except LLMError:  # some tokenizers keep digits apart from a space
            return AnswerScorer(scorer, template=prompt, answers=[word.lower() for word in words])

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N] and the parts ``judge`` (the same) and ``judge_mass`` (probability, 0 to 1, that the
        LLM puts on all answers together).

        Raises:
            RewardError: a group has no context, or too many groups get no answer.
        """
        shown, broken = self._shown(groups), self._num_broken()
        pairs = [(group.context, text) for group in shown for text in group.texts]
        found = self._scores(pairs, [f"{self._scorer.identity}:{a}" for a in self._scorer.answers], self._ask)
        logps = {pair: [score.logp for score in scores] for pair, scores in found.items()}
        rows = [[self._value(logps[g.context, text]) for text in g.texts] for g in shown]
        self._count(rows, broken=broken)
        values = pad_groups(rows)
        mass = pad_groups([[sum(map(math.exp, logps[g.context, text])) for text in g.texts] for g in shown])
        mass = mass.clamp(max=1.0)  # a difference of rounded sums
        little = values.isfinite().any() and float(mean := mass[values.isfinite()].mean()) < _LITTLE
        if little and not self._warned:
            self._warned = True
            logger.warning(
                "The LLM puts only %.1f %% of its probability on the judge's answers %s: its judgement means little. "
                "Use an instruct model, or other reward.settings.answers or reward.settings.template.",
                100 * mean,
                ", ".join(map(repr, self._scorer.answers)),
            )
        return RewardOutput(values, {self.name: values, "judge_mass": mass})

    def _ask(self, requests: list[tuple[Context, list[str]]]) -> list[list[list[TextScore]]]:
        return [[[TextScore(float(logp), 1) for logp in text] for text in row] for row in self._scorer(requests)]

    def _value(self, logps: Sequence[float]) -> float:
        if not all(map(math.isfinite, logps)):
            return math.nan
        if self._mode == "log_odds":
            return logps[0] - logps[1]
        top = max(logps)
        weights = [math.exp(logp - top) for logp in logps]
        return sum(number * weight for number, weight in zip(self._numbers, weights, strict=True)) / sum(weights)


def _numbers(answers: Sequence[str], mode: str) -> tuple[float, ...]:
    """What each answer is worth."""
    if mode not in get_args(Mode):
        raise RewardError(f"reward.settings.mode={mode!r} is not one of {', '.join(get_args(Mode))}.")
    if mode != "rating":
        if len(answers) != 2:
            raise RewardError(f"reward.settings.mode={mode} needs two answers, the good one first, got {answers}.")
        return (1.0, 0.0)
    try:
        return tuple(float(answer) for answer in answers)
    except ValueError:
        raise RewardError(f"reward.settings.mode=rating needs answers that are numbers, got {answers}.") from None
