"""The LLM's log-probability as a reward: R(h) = α·logP_LLM(h | context) + w·log p_ref(h | audio) + β·length(h).

log p_ref comes from a frozen copy of the starting model, never from the model that learns: that would reinforce
itself. Without it a fluent unrelated sentence beats the truth. The length term balances a summed log-probability's
preference for short texts. How it is hacked: deletions (raise β), fluent filler under ``normalize=token`` (lower β,
keep w = 1), listed terms parroted anywhere (put distractors in the list; ``normalize=pmi``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.core.types import Context, HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.llm import TextScore
from nemo_llm_feedback.rewards.asking import AskingReward, Pair, ScoreCache, View
from nemo_llm_feedback.rewards.base import reference_scores, register

NORMALIZATIONS = ("sum", "token", "word", "pmi")
_NO_CONTEXT = Context()


class Scorer(Protocol):
    """What the reward needs of an LLM; ``llm.LLMScorer`` is one."""

    @property
    def identity(self) -> str:
        """Changes whenever anything does that scores depend on."""

    @property
    def uses_context(self) -> bool:
        """Whether the prompt shows the context to the LLM at all."""

    def score(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> Sequence[Sequence[TextScore]]:
        """Returns the score of each text behind its context, per (context, texts) request."""


@register("llm")
class LLMReward(AskingReward):
    """α·logP_LLM(h | context) + asr_weight·log p_ref(h | audio) + β·length(h).

    A member is NaN where the LLM's score is not finite (it does not fit the LLM) or its ``ref_logp`` is not (−∞: the
    audio is too short for it, so no comparison means anything).

    Args:
        scorer: the LLM.
        alpha: weight of the LLM's log-probability (natural log, after ``normalize``).
        beta: reward per word, or per character in scripts written without spaces.
        normalize: form of the LLM's log-probability: ``sum``; ``token`` or ``word``, divided by their number; ``pmi``,
            minus the same without context.
        asr_weight: weight of ``group.ref_logp``; 0 = groups need none.
        allow_no_context: score groups that have no context instead of refusing.
        view: how groups are shown to the LLM; as they are by default.
        cache: store of raw scores, or the path of one on disk (see ``open_cache``); in memory by default.

    Raises:
        RewardError: unknown ``normalize`` or weights that are not finite.
    """

    name = "llm"

    def __init__(
        self,
        scorer: Scorer,
        *,
        alpha: float,
        beta: float,
        normalize: str = "sum",
        asr_weight: float = 1.0,
        allow_no_context: bool = False,
        view: View | None = None,
        cache: ScoreCache | str | None = None,
    ) -> None:
        if normalize not in NORMALIZATIONS:
            raise RewardError(f"reward.normalize={normalize!r} is not one of {', '.join(NORMALIZATIONS)}.")
        _check_weights(alpha, beta, asr_weight)
        super().__init__(scorer, cache=cache, view=view, allow_no_context=allow_no_context)
        self._normalize = normalize
        self._alpha, self._beta, self._asr_weight = alpha, beta, asr_weight

    def with_weights(self, *, alpha: float, beta: float) -> LLMReward:
        """The same reward, LLM and cache, with other weights.

        Raises:
            RewardError: weights that are not finite.
        """
        _check_weights(alpha, beta, self._asr_weight)
        other = copy.copy(self)
        other._alpha, other._beta = alpha, beta
        return other

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N] and the unweighted parts ``llm`` (nats), ``asr`` (nats; where used) and ``length``.

        Raises:
            RewardError: a group has no context or no reference scores, or too many groups get no score.
        """
        length = _padded([[float(text_length(text)) for text in group.texts] for group in groups])  # as it is written
        groups = self._shown(groups)
        asr = _padded([list(reference_scores(group)) for group in groups]) if self._asr_weight else None
        llm = _padded(self._counted(groups))

        def _combined(asr: Tensor) -> Tensor:
            value = self._alpha * llm + self._asr_weight * asr.double() + self._beta * length
            judged = value.isfinite() & llm.isfinite()  # alpha = 0 does not excuse an NaN
            return value.masked_fill(~judged, math.nan).float()

        parts = {"llm": llm, "length": length} | ({} if asr is None else {"asr": asr})
        values = _combined(torch.zeros_like(llm) if asr is None else asr)
        masked = {name: part.float().masked_fill(~values.isfinite(), math.nan) for name, part in parts.items()}
        return RewardOutput(values, masked, None if asr is None else _combined)

    def _counted(self, groups: Sequence[HypothesisGroup]) -> list[list[float]]:
        """The LLM's part, after counting the groups that failed."""
        broken = self._num_broken()
        rows = self._llm_part(groups)
        self._count(rows, broken=broken)
        return rows

    def _llm_part(self, groups: Sequence[HypothesisGroup]) -> list[list[float]]:
        pairs = [(group.context, text) for group in groups for text in group.texts]
        if self._normalize == "pmi":
            pairs += [(_NO_CONTEXT, text) for group in groups for text in group.texts]
        found = self._scores(pairs, [self._scorer.identity], self._ask)
        scores = {pair: score for pair, (score,) in found.items()}
        return [[self._normalized(scores, group.context, text) for text in group.texts] for group in groups]

    def _ask(self, requests: list[tuple[Context, list[str]]]) -> list[list[list[TextScore]]]:
        return [[[score] for score in row] for row in self._scorer.score(requests)]

    def _normalized(self, scores: dict[Pair, TextScore], context: Context, text: str) -> float:
        logp, num_tokens = scores[context, text]
        if self._normalize == "token":
            return logp / num_tokens
        if self._normalize == "word":
            return logp / max(1, text_length(text))
        if self._normalize == "pmi":
            return logp - scores[_NO_CONTEXT, text].logp
        return logp


def _padded(rows: list[list[float]]) -> Tensor:
    """[B, N] float64: a sum is rounded to float32 once, at its end."""
    return pad_groups(rows, dtype=torch.float64)


def _check_weights(alpha: float, beta: float, asr_weight: float) -> None:
    if not all(map(math.isfinite, (alpha, beta, asr_weight))):
        raise RewardError(f"alpha={alpha}, beta={beta} and asr_weight={asr_weight} must be finite numbers.")
