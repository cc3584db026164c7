"""The plugin's sections together: checked as a whole, unknown keys refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_llm_feedback.core.config.context import ContextConfig
from nemo_llm_feedback.core.config.faults import Section, build, key_faults, listing
from nemo_llm_feedback.core.config.learning import (
    AUGMENTED_OBJECTIVES,
    SAMPLED_OBJECTIVES,
    FeedbackConfig,
    ObjectiveConfig,
)
from nemo_llm_feedback.core.config.llm import NO_MODEL, LLMConfig
from nemo_llm_feedback.core.config.proposals import ProposalConfig
from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.config.training import GuardConfig, ParametersConfig
from nemo_llm_feedback.core.errors import ConfigError


@dataclass(frozen=True)
class RunConfig:
    """The plugin's sections of a run's configuration, checked."""

    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    llm: LLMConfig | None = None
    context: ContextConfig = field(default_factory=ContextConfig)
    parameters: ParametersConfig = field(default_factory=ParametersConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)

    def validate(self) -> list[str]:
        """Returns every fault of all sections, and of their combination, as sentences."""
        faults = [f for section in self.sections for f in section.validate()]
        if self.needs_llm and self.llm is None:
            faults.append(NO_MODEL)
        if self.needs_context and not self.context.validate() and not self.context.load():
            faults.append(
                "no context: the LLM reward needs context.description, context.terms or context.terms_file "
                "(or context.required=false when every manifest row has its own `context`)."
            )
        proposals = self.proposals
        others = proposals.beam or proposals.boosted or proposals.term_swap or proposals.llm_correction
        if self.wants_samples and others:
            key = f"name={self.objective.name}" if self.objective.name in SAMPLED_OBJECTIVES else "correction=proposal"
            faults.append(
                f"objective.{key} is unbiased only for samples: "
                "set proposals.beam=0 proposals.boosted=0 proposals.term_swap=0 proposals.llm_correction=0 "
                "proposals.samples=8."
            )
        if self.feedback.augment and self.objective.name not in AUGMENTED_OBJECTIVES:
            own = ", which has objective.augment" if self.objective.name == "self_training" else ""
            faults.append(
                f"feedback.augment is for distill and mwer, not for objective.name={self.objective.name}{own}."
            )
        if self.feedback.weight == 0 and self.feedback.supervised_weight == 0:
            faults.append("feedback.weight and feedback.supervised_weight are both 0: nothing would be learned.")
        return faults

    @property
    def sections(self) -> list[Section]:
        """All sections that there are; a run without LLM has no ``llm``."""
        return [s for s in (getattr(self, name) for name in SECTIONS) if s is not None]

    @property
    def scores_in_phases(self) -> bool:
        """Whether the LLM scores the whole pool at once at the start of every refresh round."""
        return self.llm is not None and self.llm.phase == "cached" and self.needs_llm

    @property
    def wants_samples(self) -> bool:
        """Whether the objective is an estimate over samples of the policy, for which members of a beam are none."""
        weighted = self.objective.name == "mwer" and self.objective.correction == "proposal"
        return weighted or self.objective.name in SAMPLED_OBJECTIVES

    @property
    def needs_reward(self) -> bool:
        """Whether the objective reads rewards at all (plain self-training does not)."""
        return self.objective.name != "self_training" or self.objective.label == "reward"

    @property
    def needs_llm(self) -> bool:
        """Whether the LLM of the section ``llm`` is asked, for rewards or for proposals."""
        return bool(self.proposals.llm_correction) or (self.needs_reward and self.reward.needs_llm)

    @property
    def needs_context(self) -> bool:
        """Whether every unlabeled row must have a context."""
        return self.context.required and self.needs_reward and self.reward.reads_context


SECTIONS: dict[str, type[Section]] = {
    "feedback": FeedbackConfig,
    "objective": ObjectiveConfig,
    "proposals": ProposalConfig,
    "reward": RewardConfig,
    "llm": LLMConfig,
    "context": ContextConfig,
    "parameters": ParametersConfig,
    "guards": GuardConfig,
}


def parse_run_config(tree: Mapping[str, Any]) -> RunConfig:
    """Builds the checked configuration from plain nested mappings (only our sections are read).

    Raises:
        ConfigError: one message that lists every unknown key with the nearest known one, and every fault.
    """
    faults: list[str] = []
    made: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        values = tree.get(name)
        if values is None or (name == "llm" and isinstance(values, Mapping) and not values.get("model")):
            faults += key_faults(cls, values or (), where=name)
        elif not isinstance(values, Mapping):
            faults.append(f"{name} must be a section of keys, got {type(values).__name__}.")
        else:
            section, found = build(cls, values, where=name)
            faults += found
            made[name] = section
    # A section with a faulty value cannot be compared with the others; the sound ones are still checked alone.
    if None in made.values():
        faults += [fault for section in made.values() if section is not None for fault in section.validate()]
    else:
        config = RunConfig(**made)
        faults += config.validate()
    if faults:
        raise ConfigError("the configuration has " + listing(faults))
    return config


def check_keys(tree: Mapping[str, Any]) -> None:
    """Refuses unknown keys of our sections.

    Raises:
        ConfigError: lists every unknown key with the nearest known one.
    """
    faults = [fault for name, keys in tree.items() for fault in key_faults(SECTIONS[name], keys or (), where=name)]
    if faults:
        raise ConfigError("the configuration has " + listing(faults))
