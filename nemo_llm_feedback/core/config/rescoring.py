"""Settings of rescoring at inference: how many hypotheses, what judges them, and what is known about the domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.context import ContextConfig
from nemo_llm_feedback.core.config.faults import STRICT, Section, build, refuse
from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.config.run import parse_run_config
from nemo_llm_feedback.core.config.sections import LLMConfig, NormalizerName, ProposalConfig, language_faults
from nemo_llm_feedback.core.errors import ConfigError

SHARED_SECTIONS = ("reward", "llm", "context")
KEYS_OF_ADAPT = {
    "external": "proposals.external",
    "language": "proposals.language",
    "normalizer": "feedback.normalizer",
    "memory_budget_mb": "feedback.memory_budget_mb",
}
"""Key of `RescoringConfig` without a flag of its own → the key of ``adapt`` by which ``transcribe --set`` sets it."""
DEFAULT_NBEST = 8
"""Beam size where a greedy strategy is replaced by a beam and no size is given."""


@dataclass(frozen=True, config=STRICT)
class RescoringConfig(Section):
    """How the N-best of NeMo's beam decoders are rescored.

    Attributes:
        nbest: size of the first pass's beam; null = that of the user's beam strategy, and 8 where the strategy is
            greedy, which has no N-best (it is replaced by the family's batched beam).
        boosted, term_swap, boosting_weight: further hypotheses of utterances whose context has terms, as in the groups
            of ``adapt`` (``ProposalConfig``): a rescored transcript is then what training would prefer; 0 = none.
        external, language: texts under the manifest key ``hypotheses``, as in the groups of ``adapt``; 0 = none.
        normalizer: text normalisation under which hypotheses count as one, and in which the reward sees them.
        memory_budget_mb: most MiB for the joint while the exact log p is computed.
        reward: the section ``reward`` as in ``adapt``; null = the exact log p(y|x) alone.
        llm: the section ``llm`` as in ``adapt``.
        context: the section ``context`` as in ``adapt``.
    """

    nbest: Annotated[int, Field(ge=2)] | None = None
    boosted: NonNegativeInt = ProposalConfig.boosted
    term_swap: NonNegativeInt = ProposalConfig.term_swap
    boosting_weight: NonNegativeFloat = ProposalConfig.boosting_weight
    external: NonNegativeInt = ProposalConfig.external
    language: str = ProposalConfig.language
    normalizer: NormalizerName = "basic"
    memory_budget_mb: PositiveInt = 512
    reward: RewardConfig | None = field(default_factory=RewardConfig)
    llm: LLMConfig | None = None
    context: ContextConfig = field(default_factory=ContextConfig)

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        return language_faults("language", self.language)


def parse_rescoring_config(tree: Mapping[str, Any]) -> RescoringConfig:
    """Builds checked settings from plain nested mappings, as in conf/rescoring.yaml.

    Raises:
        ConfigError: one message that lists every unknown key with the nearest known one, and every fault.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"the rescoring settings must be a mapping of keys, got {type(tree).__name__}.")
    simple = {key: value for key, value in tree.items() if key not in SHARED_SECTIONS}
    config, faults = build(RescoringConfig, simple, where="")
    faults += config.validate() if config is not None else []
    judged = tree.get("reward", {}) is not None
    shared = {key: tree.get(key) for key in SHARED_SECTIONS} if judged else {"reward": {"name": "length"}}
    try:
        run = parse_run_config({**shared, "context": tree.get("context")})
    except ConfigError as error:
        faults += [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
    else:
        if run.reward.needs_text:
            faults.append(
                "reward.name=wer compares with the row's own text, which rescoring does not have: see score."
            )
    refuse("the rescoring settings have", faults)
    assert config is not None
    return replace(config, reward=run.reward if judged else None, llm=run.llm, context=run.context)
