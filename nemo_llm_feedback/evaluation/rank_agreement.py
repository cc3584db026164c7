"""Rank correlation within N-best lists: do two judgements order the hypotheses of an utterance alike?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import kendalltau, spearmanr
from torch import Tensor


@dataclass(frozen=True)
class RankAgreement:
    """Mean over groups of the rank correlation of two judgements, each in [−1, 1]; NaN without a usable group.

    Attributes:
        spearman: Spearman's ρ, ties sharing their mean rank.
        kendall: Kendall's τ-b, which discounts ties.
        groups: how many had two judged members that differ in both judgements.
        skipped: the others, for which ranks are undefined.
    """

    spearman: float
    kendall: float
    groups: int
    skipped: int


def rank_agreement(first: Tensor, second: Tensor) -> RankAgreement:
    """Compares two judgements group by group; members that either could not judge are left out.

    Args:
        first, second: [B, N] values of N members of B groups, higher is better; NaN = not judged, and padding.
    """
    rhos, taus = [], []
    for one, two, judged in zip(first, second, first.isfinite() & second.isfinite(), strict=True):
        a, b = one[judged].tolist(), two[judged].tolist()
        if len(set(a)) > 1 and len(set(b)) > 1:
            rhos.append(float(spearmanr(a, b).statistic))
            taus.append(float(kendalltau(a, b).statistic))
    count = len(rhos)
    mean_rho, mean_tau = (sum(x) / count if count else math.nan for x in (rhos, taus))
    return RankAgreement(mean_rho, mean_tau, count, len(first) - count)


def best_members(rewards: Tensor, *, otherwise: Sequence[int]) -> list[int]:
    """Index of the largest finite reward of each group, the first of equals.

    Args:
        rewards: [B, N]; NaN = not judged, and padding.
        otherwise: B indices, for groups without a judged member.
    """
    judged = rewards.isfinite()
    best = rewards.masked_fill(~judged, -math.inf).argmax(dim=1).tolist()
    return [n if some else m for n, some, m in zip(best, judged.any(dim=1).tolist(), otherwise, strict=True)]
