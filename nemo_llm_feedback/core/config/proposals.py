"""Settings of the hypothesis groups: where their members come from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section

SOURCE_NAMES = ("beam", "boosted", "term_swap", "llm_correction", "samples")


@dataclass(frozen=True, config=STRICT)
class ProposalConfig(Section):
    """Where the members of a group come from.

    Attributes:
        beam: members from NeMo's batched beam decoder (0 = none).
        boosted: members from the same beam with NeMo's phrase boosting on the context's terms (0 = none; ignored for
            utterances without terms).
        term_swap: members in which a span is replaced by a context term that looks like it, the most probable ones of
            each of two rounds (0 = none).
        llm_correction: 1 adds the LLM's own rewrite of the group's best members, for instruct models (0 = none).
        samples: members sampled from the model (0 = none).
        max_members: largest group after removing duplicates; the plain beam's members are kept first.
        boosting_weight: weight of the boosting tree in the beam.
        boosting_weights: weights of which training takes, before its first step, the one whose groups have the best
            members by the reward on a few utterances of the pool; empty = ``boosting_weight``.
        context_score: NeMo's ``context_score`` of the boosting tree.
        depth_scaling: NeMo's ``depth_scaling`` of the boosting tree.
        swap_similarity: smallest similarity of a span and the term that replaces it, 0 to 100.
        max_symbols: largest number of labels a transducer beam emits in one frame.
    """

    beam: NonNegativeInt = 8
    boosted: NonNegativeInt = 8
    term_swap: NonNegativeInt = 4
    llm_correction: Annotated[int, Field(ge=0, le=1)] = 0
    samples: NonNegativeInt = 0
    max_members: Annotated[int, Field(ge=2)] = 24
    boosting_weight: NonNegativeFloat = 1.0
    boosting_weights: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    context_score: PositiveFloat = 1.0
    depth_scaling: PositiveFloat = 2.0
    swap_similarity: Annotated[float, Field(gt=0, le=100)] = 50.0
    max_symbols: PositiveInt = 10

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        if self.beam + self.boosted + self.samples < 2:
            return ["proposals.beam + boosted + samples must be at least 2: a group of one has nothing to prefer."]
        return []
