"""Picks α and β of reward = α·LLM + w·ASR + β·length: by WER where rows have text, else as ``adapt`` does.

The choice by labels is a plain grid over the scored N-best: its WER is that of the rows on which it was chosen, and
flatters. Without labels α makes the spread of the LLM's term within groups so many times that of the recogniser's
(``reward.spread_factor``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemo_llm_feedback.cli.jobs.nbest_probe import greedy_members
from nemo_llm_feedback.core.config import RewardConfig
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.rank_agreement import best_members
from nemo_llm_feedback.evaluation.records import Table
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.reward_scale import component_deviations, component_spread, from_spread

ALPHAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
BETAS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class GridPoint:
    """Error rates in % of the best-rewarded members under α and β; NaN where there are no such words."""

    alpha: float
    beta: float
    wer: float
    ewer: float


@dataclass(frozen=True)
class Weights:
    """α and β of a reward.

    Attributes:
        alpha, beta: values for ``reward.alpha`` and ``reward.beta``.
        origin: ``settings``; ``spread`` = by the spread within the groups at hand; ``labels`` = by the rows with text.
        grid: everything that was tried on labels.
    """

    alpha: float
    beta: float
    origin: Literal["settings", "spread", "labels"]
    grid: tuple[GridPoint, ...] = ()

    def __str__(self) -> str:
        return f"reward.alpha={self.alpha:g} reward.beta={self.beta:g}"

    @property
    def sentence(self) -> str:
        """The weights and where they come from."""
        origin = {"settings": "as set", "spread": "by the spread of these rows, as adapt takes it from its pool"}
        return f"{self}, {origin.get(self.origin, 'by the rows with text')}"


def by_spread(nbest: NBestBatch, settings: RewardConfig) -> Weights:
    """The weights that ``adapt`` would take if these groups were its pool.

    Raises:
        RewardError: no spread to go by.
    """
    return Weights(*from_spread(component_spread(component_deviations(nbest)), settings), "spread")


def choose(nbest: NBestBatch, *, alpha: float, beta: float, asr_weight: float = 1.0, part: str = "llm") -> list[int]:
    """Per utterance the member with the largest α·LLM + w·ASR + β·length; the recogniser's where none is judged.

    Args:
        nbest: judged by a reward that has these parts.
        alpha: α.
        beta: β.
        asr_weight: w.
        part: the part of the reward that α weighs.
    """
    rewards = alpha * nbest.parts[part].double() + beta * nbest.parts["length"].double()
    for name in ("asr", "trust") if asr_weight else ():
        if name in nbest.parts:
            rewards = rewards + asr_weight * nbest.parts[name].double()
    return best_members(rewards, otherwise=greedy_members(nbest))


def tune_by_labels(
    nbest: NBestBatch,
    scores: Callable[[Sequence[int]], CorpusScores],
    settings: RewardConfig,
    *,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> Weights:
    """The point of the grid with the lowest WER; of equals that with the lowest EWER, then the smallest α and β.

    Args:
        nbest: N-best with all parts of the reward.
        scores: index of a member per utterance → scores of these, over the utterances that have text.
        settings: settings of the reward.
        alphas, betas: the grid.
    """
    fixed: dict[str, Any] = {"asr_weight": settings.asr_weight, "part": settings.weighed_part}
    grid = []
    for alpha, beta in itertools.product(alphas, betas):
        found = scores(choose(nbest, alpha=alpha, beta=beta, **fixed))
        grid.append(GridPoint(alpha, beta, found.value("wer"), found.value("ewer")))
    best = min(grid, key=lambda p: (p.wer, p.ewer if math.isfinite(p.ewer) else 0.0, p.alpha, p.beta))
    return Weights(best.alpha, best.beta, "labels", tuple(grid))


def tuned_text(found: Weights) -> str:
    """What was tried and, last, the settings to give to ``adapt``."""
    if not found.grid:
        return f"no row has text: the weights are those that adapt takes from the spread of its pool\n{found}"
    alphas, betas = (sorted({getattr(p, name) for p in found.grid}) for name in ("alpha", "beta"))
    wer = {(p.alpha, p.beta): p.wer for p in found.grid}
    rows = [[f"{alpha:g}", *(f"{wer[alpha, beta]:.1f}" for beta in betas)] for alpha in alphas]
    caption = "WER in % of the best-rewarded members of the rows with text; choosing on them flatters."
    lines = [Table(["α \\ β", *(f"{beta:g}" for beta in betas)], rows, caption).to_text()]
    if found.alpha in (0.0, alphas[-1]) or found.beta == betas[-1]:
        lines.append("The choice is at the edge of the grid: doubt it, or try larger ones with --alpha and --beta.")
    return "\n".join([*lines, str(found)])
