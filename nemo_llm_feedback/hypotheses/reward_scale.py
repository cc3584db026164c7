"""How much the LLM's say weighs, without a label: by how far the components of the reward spread within groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nemo_llm_feedback.core.config.reward import BETA_PER_ALPHA
from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.hypotheses.groups import ScoredGroup


def component_spread(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean over groups of the within-group standard deviation of each component, over judged members.

    Args:
        groups: at least one.

    Returns:
        Component → spread in its unit, NaN where no group has two judged members; groups of one judged member have
        no spread and are left out.
    """
    found = {}
    for name in groups[0].parts:
        rows = [[v for v in g.parts[name] if math.isfinite(v)] for g in groups]
        stds = [float(np.std(row)) for row in rows if len(row) > 1]
        found[name] = sum(stds) / len(stds) if stds else math.nan
    return found


def from_spread(
    spread: dict[str, float], *, factor: float, asr_weight: float, part: str = "llm"
) -> tuple[float, float]:
    """(α, β) with std(α·LLM) = factor · std(w·ASR) within groups, β = 2·α; rounded to two digits.

    β is not measured as the slope of the LLM's score on length: that came out near 15 nats a word, for words of
    garbage, and taught insertions (docs/results.md).

    Args:
        spread: of :func:`component_spread`, with ``part`` and ``asr``.
        factor: how many times the recogniser's say the LLM gets.
        asr_weight: w.
        part: what α weighs: ``llm``, or what stands in its place.

    Raises:
        RewardError: no spread to go by.
    """
    llm, asr = spread.get(part, math.nan), asr_weight * spread.get("asr", math.nan)
    if not (llm > 0 and asr > 0):
        raise RewardError(
            "the groups have no spread to scale reward.alpha by (all members are scored alike, or "
            "reward.asr_weight=0): raise proposals.beam or proposals.boosted, look at more rows, give transcripts to "
            "`tune`, or set reward.alpha."
        )
    alpha = float(f"{factor * asr / llm:.2g}")
    return alpha, float(f"{BETA_PER_ALPHA * alpha:.2g}")
