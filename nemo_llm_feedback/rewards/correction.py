"""A reward by edit distance: the LLM writes a corrected transcript, and each hypothesis is compared with it.

R(h) = −(words to insert, delete or substitute between h and the correction). One text is generated per group, so the
LLM's opinion of the other members does not enter: a coarse reward that needs an instruct model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Context, HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.llm import TextScore
from nemo_llm_feedback.llm.encoding import hash_of
from nemo_llm_feedback.llm.generation import Corrector
from nemo_llm_feedback.rewards.asking import AskingReward, ScoreCache, score_key
from nemo_llm_feedback.rewards.base import register
from nemo_llm_feedback.rewards.rules import word_distance

logger = logging.getLogger(__name__)

_Item = tuple[Context, tuple[str, ...], tuple[str, ...]]  # of a group: context, N-best as it is listed, texts


@register("correction")
class CorrectionReward(AskingReward):
    """Minus the edit distance in words to the LLM's correction of the group.

    The N-best is listed for the LLM by the frozen reference's score where groups have one, else in the group's order.
    A group without a usable correction is NaN as a whole and counted.

    Args:
        corrector: writes the correction.
        normalizer: name of the run's text normalisation, under which texts are compared.
        cache, allow_no_context: see :class:`~nemo_llm_feedback.rewards.asking.AskingReward`.

    Attributes:
        num_unusable: distinct groups without a usable correction so far.
    """

    name = "correction"

    def __init__(
        self,
        corrector: Corrector,
        *,
        normalizer: str = "basic",
        cache: ScoreCache | str | None = None,
        allow_no_context: bool = False,
    ) -> None:
        # The corrector shows groups to the LLM by itself; distances are those of the texts as they are.
        super().__init__(corrector, cache=cache, view=None, allow_no_context=allow_no_context)
        self._corrector = corrector
        self._normalize: Callable[[str], str] = get_normalizer(normalizer)
        self._identity = f"{corrector.identity}:{normalizer}"
        self.num_unusable = 0

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], in words ≤ 0, which are also the only part.

        Raises:
            RewardError: a group has no context.
        """
        items = [(group.context, _by_score(group), group.texts) for group in self._shown(groups)]
        keys = {}
        for item in items:
            context, nbest, texts = item
            keys[item] = [score_key(f"{self._identity}:{hash_of(nbest)}", context, text) for text in texts]
        found = self._look_up(keys, self._ask)
        values = pad_groups([[value for value, _ in found[item]] for item in items])
        return RewardOutput(values, {self.name: values})

    def _ask(self, items: list[_Item]) -> dict[_Item, list[TextScore]]:
        answers = self._corrector([context for context, _, _ in items], [nbest for _, nbest, _ in items])
        corrections = [self._normalize(answer) if answer else "" for answer in answers]
        lacking = corrections.count("")
        if lacking and not self.num_unusable:
            logger.warning("The LLM's correction of a group is unusable: its reward is NaN. Later ones are counted.")
        self.num_unusable += lacking
        return {
            item: [TextScore(self._value(text, correction), 1) for text in item[2]]
            for item, correction in zip(items, corrections, strict=True)
        }

    def _value(self, text: str, correction: str) -> float:
        return 0.0 - word_distance(self._normalize(text), correction) if correction else math.nan


def _by_score(group: HypothesisGroup) -> tuple[str, ...]:
    """The distinct texts, most probable first; equally probable ones by their spelling."""
    texts = group.texts
    if len(group.ref_logp) == len(group):
        texts = tuple(text for _, text in sorted(zip((-logp for logp in group.ref_logp), texts, strict=True)))
    return tuple(dict.fromkeys(texts))
