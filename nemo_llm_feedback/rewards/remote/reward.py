"""The LLM reward of a scoring server: ``reward=remote`` with vLLM or SGLang behind ``reward.settings.base_url``.

R(h) = α·logP_LLM(h | context) + w·log p_ref(h | audio) + β·length(h) as with a local LLM, cache included; only the
scorer is another. A failed request makes the groups that needed it NaN; they are counted, never cached, and stop the
run where they are too many. Such a group is asked for again when it is proposed anew, in the next refresh round.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.llm.view import LLMView
from nemo_llm_feedback.rewards.base import register
from nemo_llm_feedback.rewards.cache import ScoreCache, score_key
from nemo_llm_feedback.rewards.lm import LLMReward
from nemo_llm_feedback.rewards.lookup import View
from nemo_llm_feedback.rewards.remote.config import parse_remote
from nemo_llm_feedback.rewards.remote.scorer import PROBE_CONTEXT, RemoteScorer, agree

logger = logging.getLogger(__name__)

_RECENT = 100  # groups whose failures decide whether the run goes on
_FEWEST = 10  # as many groups count at least, so that one early failure is no 100 %


class RemoteReward(LLMReward):
    """:class:`LLMReward` on a server: a group with a failed request is NaN as a whole, and counted.

    Args:
        scorer: the server.
        max_failed: the run stops once a larger share of the last 100 groups failed (10 groups count at least).
        alpha, beta, normalize, asr_weight, allow_no_context, view, cache: as of :class:`LLMReward`.

    Attributes:
        remote: the server.
        num_groups, num_failed_groups: judged and failed groups so far.

    Raises:
        RewardError: wrong settings, or the cache has scores of another model under the same name; on call, as
            :class:`LLMReward`, or too many groups failed.
    """

    name = "remote"

    def __init__(
        self,
        scorer: RemoteScorer,
        *,
        max_failed: float,
        alpha: float,
        beta: float,
        normalize: str = "sum",
        asr_weight: float = 1.0,
        allow_no_context: bool = False,
        view: View | None = None,
        cache: ScoreCache | str | None = None,
    ) -> None:
        super().__init__(
            scorer,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            asr_weight=asr_weight,
            allow_no_context=allow_no_context,
            view=view,
            cache=cache,
        )
        self.remote = scorer
        self._max_failed = max_failed
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self.num_groups = 0
        self.num_failed_groups = 0
        self._check_cache()

    def _llm_part(self, groups: Sequence[HypothesisGroup]) -> list[list[float]]:
        """The log-probabilities of groups as the LLM sees them; NaN in all of a failed one.

        Raises:
            RewardError: too many groups failed.
        """
        self.remote.take_failures()
        rows = super()._llm_part(groups)
        failures = self.remote.take_failures()
        lost = [any((c, text) in failures for text in g.texts for c in (g.context, Context())) for g in groups]
        self._count(lost)
        return [[math.nan] * len(row) if is_lost else row for row, is_lost in zip(rows, lost, strict=True)]

    def _count(self, lost: Sequence[bool]) -> None:
        self._recent.extend(lost)
        self.num_groups += len(lost)
        self.num_failed_groups += sum(lost)
        if not any(lost):
            return
        logger.warning(
            "%d of %d groups got no reward from the scoring server (%d of %d so far).",
            sum(lost),
            len(lost),
            self.num_failed_groups,
            self.num_groups,
        )
        if sum(self._recent) > self._max_failed * max(len(self._recent), _FEWEST):
            raise RewardError(
                f"The scoring server failed {sum(self._recent)} of the last {len(self._recent)} groups, more than "
                f"reward.settings.max_failed={self._max_failed}: look at the warnings above and at the server's log. "
                "Answered scores are in the cache, and a run that is resumed does not ask for them again."
            )

    def _check_cache(self) -> None:
        """Compares the start-up check's score with that of the run that filled the cache."""
        scores = self.remote.probe_scores
        keys = {text: score_key(self.remote.identity, PROBE_CONTEXT, text) for text in scores}
        known = self.cache.get_many(keys.values())
        for text, key in keys.items():
            if key in known and not agree(known[key][0], scores[text].logp, scores[text].num_tokens):
                raise RewardError(
                    "reward.cache holds scores of another model that was served under the same name: give a new "
                    "reward.cache, or set reward.settings.version to tell the two apart."
                )
        self.cache.put_many(
            {keys[text]: (s.logp, s.num_tokens) for text, s in scores.items() if keys[text] not in known}
        )


@register("remote")
def remote_reward(
    settings: Mapping[str, Any],
    *,
    alpha: float,
    beta: float,
    normalize: str = "sum",
    asr_weight: float = 1.0,
    allow_no_context: bool = False,
    cache: ScoreCache | str | None = None,
) -> RemoteReward:
    """Makes the reward of a scoring server, and checks the server.

    Args:
        settings: what ``reward.settings`` holds; see :class:`~nemo_llm_feedback.rewards.remote.config.RemoteConfig`.
        alpha, beta, normalize, asr_weight, allow_no_context, cache: as of :class:`LLMReward`.

    Raises:
        ConfigError: faults of the settings.
        LLMError, RewardError: see :class:`RemoteScorer` and :class:`RemoteReward`.
    """
    config = parse_remote(settings)
    return RemoteReward(
        RemoteScorer(config),
        max_failed=config.max_failed,
        alpha=alpha,
        beta=beta,
        normalize=normalize,
        asr_weight=asr_weight,
        allow_no_context=allow_no_context,
        view=LLMView.of(config.prompting),
        cache=cache,
    )
