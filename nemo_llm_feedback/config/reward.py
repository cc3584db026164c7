"""Settings of the reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_llm_feedback.config.faults import choice, non_negative


@dataclass(frozen=True)
class RewardConfig:
    """R(h) = alpha·logP_LLM(h | context) + logP_ref(h | audio) + beta·length(h), the one form used everywhere.

    Attributes:
        name: short name of the reward in the registry, or ``package.module:attribute`` from your own YAML.
        alpha: weight of the LLM's log-probability.
        beta: bonus a word (a character in scripts written without spaces), in nats; 0 to 4·alpha did alike on two dev
            sets (docs/results.md), and much more teaches insertions.
        normalize: ``sum``, ``token``, ``word`` or ``pmi`` form of the LLM term.
        asr_weight: weight of the frozen reference's log p; 1 in the one parameterisation, 0 for the ablation.
        cache: file or folder for LLM scores that survive the run; null = memory only.
        settings: extra keyword arguments of a reward other than ``llm``.
    """

    name: str = "llm"
    alpha: float = 1.0
    beta: float = 2.0
    normalize: str = "sum"
    asr_weight: float = 1.0
    cache: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> list[str]:
        """Returns every fault of this section as a sentence."""
        faults = non_negative("reward", self, "alpha", "asr_weight")
        faults += choice("reward.normalize", self.normalize, ("sum", "token", "word", "pmi"))
        return faults
