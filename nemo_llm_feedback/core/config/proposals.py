"""Settings of the hypothesis groups: where their members come from."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import non_negative, positive

SOURCE_NAMES = ("beam", "boosted", "term_swap", "llm_correction", "samples")


@dataclass(frozen=True)
class ProposalConfig:
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

    beam: int = 8
    boosted: int = 8
    term_swap: int = 4
    llm_correction: int = 0
    samples: int = 0
    max_members: int = 24
    boosting_weight: float = 1.0
    boosting_weights: tuple[float, ...] = (0.5, 1.0, 2.0)
    context_score: float = 1.0
    depth_scaling: float = 2.0
    swap_similarity: float = 50.0
    max_symbols: int = 10

    def validate(self) -> list[str]:
        """Returns every fault of this section as a sentence."""
        faults = non_negative("proposals", self, *SOURCE_NAMES, "boosting_weight")
        faults += positive("proposals", self, "context_score", "depth_scaling", "max_symbols")
        if not 0 < self.swap_similarity <= 100:
            faults.append(f"proposals.swap_similarity must be in (0, 100], got {self.swap_similarity}.")
        if self.beam + self.boosted + self.samples < 2:
            faults.append(
                "proposals.beam + boosted + samples must be at least 2: a group of one has nothing to prefer."
            )
        if not all(isinstance(w, (int, float)) and w > 0 for w in self.boosting_weights):
            faults.append(f"proposals.boosting_weights must be numbers > 0, got {list(self.boosting_weights)}.")
        if self.llm_correction not in (0, 1):
            faults.append(
                f"proposals.llm_correction must be 0 or 1, got {self.llm_correction}: the LLM writes one text a group."
            )
        if self.max_members < 2:
            faults.append(f"proposals.max_members must be at least 2, got {self.max_members}.")
        return faults
