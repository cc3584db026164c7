"""Rank correlation within groups: does one judgement order the members of an utterance as another does?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import kendalltau, spearmanr


@dataclass(frozen=True)
class RankAgreement:
    """Mean over groups of the rank correlation of two judgements, each in [−1, 1]; NaN without a usable group.

    Attributes:
        spearman: Spearman's ρ, ties sharing their mean rank.
        kendall: Kendall's τ-b, which discounts ties.
        groups: how many had two judged members that differ in both judgements.
        skipped: the others, about which ranks say nothing.
    """

    spearman: float
    kendall: float
    groups: int
    skipped: int


def rank_agreement(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> RankAgreement:
    """Compares two judgements group by group; members that either could not judge are left out.

    Args:
        first, second: one list a group, one value a member, higher is better; NaN = not judged.
    """
    rhos, taus = [], []
    for one, two in zip(first, second, strict=True):
        pairs = [(a, b) for a, b in zip(one, two, strict=True) if math.isfinite(a) and math.isfinite(b)]
        if len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
            continue
        a, b = zip(*pairs, strict=True)
        rhos.append(float(spearmanr(a, b).statistic))
        taus.append(float(kendalltau(a, b).statistic))
    count = len(rhos)
    mean_rho, mean_tau = (sum(x) / count if count else math.nan for x in (rhos, taus))
    return RankAgreement(mean_rho, mean_tau, count, len(first) - count)


def best_member(rewards: Sequence[float], *, otherwise: int) -> int:
    """Index of the largest finite reward, the first of equals; ``otherwise`` if there is none."""
    judged = [n for n, reward in enumerate(rewards) if math.isfinite(reward)]
    return max(judged, key=rewards.__getitem__) if judged else otherwise
