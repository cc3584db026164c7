"""All sections of a run together: they are checked as a whole, and unknown keys are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from nemo_llm_feedback.core.config.context import ContextConfig
from nemo_llm_feedback.core.config.faults import Section, build, key_faults, keys_of, refuse
from nemo_llm_feedback.core.config.nemo_sections import NEMO_SECTIONS, TopLevel, section_at, value_faults
from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.config.sections import (
    AUGMENTED_OBJECTIVES,
    NO_MODEL,
    RATIO_OBJECTIVES,
    SAMPLED_OBJECTIVES,
    FeedbackConfig,
    GuardConfig,
    LLMConfig,
    ObjectiveConfig,
    ParametersConfig,
    ProposalConfig,
)


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
        feedback, objective, proposals = self.feedback, self.objective, self.proposals
        made = [section for name in SECTIONS if (section := getattr(self, name)) is not None]
        bare = self.needs_context and not self.context.validate() and not self.context.load()
        others = proposals.beam or proposals.boosted or proposals.term_swap or proposals.llm_correction
        sampled = f"name={objective.name}" if objective.name in SAMPLED_OBJECTIVES else "correction=proposal"
        from_samples = not others and objective.correction != "proposal"
        hint = ", which has objective.augment" if objective.name == "self_training" else ""
        broken = {
            NO_MODEL: self.needs_llm and self.llm is None,
            "no context: the LLM reward needs context.description, context.terms or context.terms_file "
            "(or context.required=false when every manifest row has its own `context`).": bare,
            f"objective.{sampled} is unbiased only for samples: set proposals.beam=0 proposals.boosted=0 "
            "proposals.term_swap=0 proposals.llm_correction=0 proposals.samples=8.": self.wants_samples and others,
            f"objective.correction={objective.correction} weighs the members of an enumerated group, and these are "
            "samples: set objective.correction=proposal.": objective.name in RATIO_OBJECTIVES and from_samples,
            "objective.mass_weight is for distinct members, and samples repeat: set it to 0.": (
                self.wants_samples and objective.mass_weight > 0
            ),
            f"feedback.augment is not for objective.name={objective.name}{hint}.": (
                feedback.augment and objective.name not in AUGMENTED_OBJECTIVES
            ),
            "feedback.labelled=reward with feedback.use_text=false: no text would be read; leave one of them out.": (
                self.labelled == "reward" and not feedback.use_text
            ),
            f"reward.name={self.reward.name} compares with the row's own text: leave feedback.labelled="
            f"{feedback.labelled} out, or set it to reward.": self.reward.needs_text and self.labelled != "reward",
            f"feedback.labelled=reward, but reward.name={self.reward.name} reads no text of a row: set reward=wer. "
            "(feedback.use_text=false learns from the audio of rows with text by any other reward.)": (
                self.labelled == "reward" and not self.reward.may_read_text
            ),
            f"reward.trust makes texts level by log p_ref, which reward.name={self.reward.name} does not hold: leave "
            "it out.": bool(self.reward.trust) and self.reward.needs_text,
            f"feedback.generations={feedback.generations} needs held-out measurements, which choose the next teacher: "
            "set guards.every above 0, or null.": feedback.generations > 1 and not self.guards.measures,
            "feedback.score_ahead=true, but llm.phase=cached scores the whole pool at once: leave one of them out.": (
                feedback.score_ahead and self.scores_in_phases
            ),
            f"feedback.score_ahead=true, but objective.name={objective.name} asks no reward: leave it out.": (
                feedback.score_ahead and not self.needs_reward
            ),
            "feedback.weight and feedback.supervised_weight are both 0: nothing would be learned.": (
                feedback.weight == feedback.supervised_weight == 0
            ),
        }
        faults = [fault for section in made for fault in section.validate()]
        return faults + [sentence for sentence, is_so in broken.items() if is_so]

    @property
    def labelled(self) -> str:
        """What rows with text are for, with what stands for null."""
        return self.feedback.labelled or ("reward" if self.reward.needs_text else "supervised")

    @property
    def scores_in_phases(self) -> bool:
        """Whether the LLM scores the whole pool at once at the start of every refresh round."""
        return self.llm is not None and self.llm.phase == "cached" and self.needs_llm

    @property
    def learns_by_nemo(self) -> bool:
        """Whether one pseudo-label per utterance is learned by NeMo's training step (augmented self-training)."""
        return self.objective.name == "self_training" and self.objective.augment

    @property
    def wants_samples(self) -> bool:
        """Whether the objective is an estimate over samples of the policy, for which members of a beam are none."""
        weighted = self.objective.name in ("mwer", *RATIO_OBJECTIVES) and self.objective.correction == "proposal"
        return weighted or self.objective.name in SAMPLED_OBJECTIVES

    @property
    def on_policy(self) -> bool:
        """Whether the loss compares log p with that of the policy that proposed: groups of another are no use."""
        return self.wants_samples or self.objective.name in RATIO_OBJECTIVES

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


SECTIONS: dict[str, type[Section]] = {**get_type_hints(RunConfig), "llm": LLMConfig}


def plain(settings: Any) -> dict[str, Any]:
    """A configuration of OmegaConf as plain mappings and lists, with its references resolved; others as they are."""
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else settings
    return tree


def parse_run_config(tree: Mapping[str, Any]) -> RunConfig:
    """Builds the checked configuration from nested mappings or an OmegaConf config; NeMo's sections are checked, too.

    Raises:
        ConfigError: one message that lists every unknown key with the nearest known one, and every fault.
    """
    tree = plain(tree)
    faults = value_faults(tree)
    made: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        values = tree.get(name) or {}
        if name == "llm" and isinstance(values, Mapping) and not values.get("model"):
            faults += key_faults(cls, values, where=name)
        else:
            made[name], found = build(cls, values, where=name)
            faults += found
    if None in made.values():
        # A section with a faulty value cannot be compared with the others; the sound ones are still checked alone.
        faults += [fault for section in made.values() if section is not None for fault in section.validate()]
        refuse("the configuration has", faults)
    config = RunConfig(**made)
    refuse("the configuration has", faults + config.validate())
    return config


def check_keys(tree: Mapping[str, Any]) -> None:
    """Refuses keys of our sections and of NeMo's that nothing reads, and sections that are none.

    Args:
        tree: all sections of ``adapt`` as plain mappings.

    Raises:
        ConfigError: lists every unknown key with the nearest known one.
    """
    whole = [*SECTIONS, "model", "trainer", "exp_manager"]
    faults = [f"{name} must be a section of keys." for name in whole if not isinstance(tree.get(name), Mapping)]
    faults += [f"{key} must not be taken away; give it a value." for key in keys_of(TopLevel) if key not in tree]
    for path, cls in {**SECTIONS, **NEMO_SECTIONS}.items():
        if isinstance(keys := section_at(tree, path), Mapping):
            faults += key_faults(cls, keys, where=path)
    refuse("the configuration has", faults)
    read = keys_of(NEMO_SECTIONS["model"])
    if strange := [f"model.{key}" for key in tree["model"] if key not in read]:
        faults.append(f"{', '.join(strange)}: a run reads {', '.join(read)} of model; all else is the checkpoint's.")
    refuse("the configuration has", faults)
