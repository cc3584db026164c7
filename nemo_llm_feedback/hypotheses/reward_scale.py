"""Sets the weight of the LLM without labels, by how far the parts of the reward spread within each N-best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import pad_groups
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.trust import is_own


def component_deviations(nbest: NBestBatch) -> dict[str, list[float]]:
    """Component of the reward → standard deviation within each N-best that has two judged members, in its unit.

    Members that only other recognisers wrote are left out: they may be far from all others, and are weighed by
    ``trust.py``.
    """
    own = pad_groups([[is_own(member) for member in row] for row in nbest.hypotheses], fill=False, dtype=torch.bool)
    found: dict[str, list[float]] = {}
    for name, values in nbest.parts.items():
        rows = [row[row.isfinite() & ours].double().numpy() for row, ours in zip(values, own, strict=True)]
        found[name] = [float(np.std(row)) for row in rows if len(row) > 1]
    return found


def component_spread(deviations: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean within-group standard deviation of each component of the reward.

    Args:
        deviations: what :func:`component_deviations` gave, for one batch or for several joined.

    Returns:
        Component → spread in its unit; NaN where no utterance has two judged members.
    """
    return {name: sum(stds) / len(stds) if stds else math.nan for name, stds in deviations.items()}


def from_spread(spread: Mapping[str, float], settings: RewardConfig) -> tuple[float, float]:
    """(α, β) with std(α·LLM) = ``spread_factor`` · std(w·ASR) within groups; β as set, or 2·α; rounded to two digits.

    β is not measured as the slope of the LLM's score on length: that came out near 15 nats per word, for words of
    garbage, and taught insertions (docs/results.md).

    Args:
        spread: what :func:`component_spread` gave, with ``settings.weighed_part`` and ``asr``.
        settings: settings of the reward.

    Raises:
        RewardError: no spread to go by.
    """
    llm, asr = spread.get(settings.weighed_part, math.nan), settings.asr_weight * spread.get("asr", math.nan)
    if not (llm > 0 and asr > 0):
        raise RewardError(
            "the groups have no spread to scale reward.alpha by (all members are scored alike, or "
            "reward.asr_weight=0): raise proposals.beam or proposals.boosted, take more rows, or set reward.alpha "
            "(`score --tune --alpha 1` picks it where rows have text)."
        )
    alpha = float(f"{settings.spread_factor * asr / llm:.2g}")
    return alpha, float(f"{settings.beta_beside(alpha):.2g}") if settings.beta is None else settings.beta
