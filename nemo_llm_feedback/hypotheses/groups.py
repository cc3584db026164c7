"""One utterance's hypotheses as lists; what ``cli/jobs`` still reads until it takes ``NBestBatch``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_llm_feedback.core.types import HypothesisGroup
from nemo_llm_feedback.hypotheses.nbest import NBestBatch


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its scores per head."""

    group: HypothesisGroup
    rewards: dict[str, list[float]]
    ref_logp: dict[str, list[float]]
    parts: dict[str, list[float]]


def groups_of(nbest: NBestBatch) -> list[ScoredGroup]:
    """The utterances of a batch."""
    first = next(iter(nbest.ref_logp))

    def row(values: dict[str, Tensor], b: int, size: int) -> dict[str, list[float]]:
        return {name: v[b, :size].tolist() for name, v in values.items()}

    return [
        ScoredGroup(group, row(nbest.rewards, b, n), row(nbest.ref_logp, b, n), row(nbest.parts, b, n))
        for b, (group, n) in enumerate(zip(nbest.groups(first), nbest.sizes, strict=True))
    ]
