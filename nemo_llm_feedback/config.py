"""All settings of the plugin, each with its one default. NeMo's own sections (``model``, ``trainer``, ``exp_manager``)
stay NeMo's; the sections below are ours, are checked before any work, and unknown keys are refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_llm_feedback.errors import ConfigError
from nemo_llm_feedback.llm_config import LLMConfig
from nemo_llm_feedback.types import Context

OBJECTIVE_NAMES = ("distill", "mwer", "reinforce", "grpo", "dpo", "self_training")
SAMPLED_OBJECTIVES = ("reinforce",)
SOURCE_NAMES = ("beam", "boosted", "term_swap", "samples")
HEADS = ("auto", "ctc", "transducer", "both")
NORMALIZERS = ("none", "lower", "basic")


@dataclass(frozen=True)
class FeedbackConfig:
    """How the feedback enters the training step.

    Attributes:
        weight: factor of the feedback loss; 0 leaves NeMo's own step untouched.
        supervised_weight: factor of NeMo's own loss on the rows that have text (replay).
        heads: which head of the model learns: ``ctc``, ``transducer``, ``both`` (hybrids), ``auto`` = all it has.
        use_text: False treats every row of the training manifest as unlabeled and never reads its text.
        normalizer: text normalisation under which hypotheses of a group must differ and rewards read them.
        on_bad_audio: ``error`` lists unreadable audio and stops; ``skip`` lists it and goes on without.
        refresh_every: optimizer steps for which a proposed group is kept; 1 proposes anew at every step.
        patience_rounds: refresh rounds without a rise of the pool's mean reward after which training stops; 0 = never.
        survey_utterances: unlabeled rows looked at before training, for scales and the share with signal.
        log_hypotheses_every: optimizer steps between two tables of hypotheses in the log; 0 = never.
        memory_budget_mb: upper bound of the transducer joint's working memory in the feedback loss.
    """

    weight: float = 1.0
    supervised_weight: float = 1.0
    heads: str = "auto"
    use_text: bool = True
    normalizer: str = "basic"
    on_bad_audio: str = "error"
    refresh_every: int = 50
    patience_rounds: int = 4
    survey_utterances: int = 64
    log_hypotheses_every: int = 50
    memory_budget_mb: int = 512

    def validate(self) -> list[str]:
        """Returns every fault of this section as a sentence."""
        faults = _non_negative(
            "feedback", self, "weight", "supervised_weight", "log_hypotheses_every", "patience_rounds"
        )
        faults += _positive("feedback", self, "refresh_every", "survey_utterances", "memory_budget_mb")
        faults += _choice("feedback.heads", self.heads, HEADS)
        faults += _choice("feedback.normalizer", self.normalizer, NORMALIZERS)
        faults += _choice("feedback.on_bad_audio", self.on_bad_audio, ("error", "skip"))
        return faults


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised over a group. Names and formulas are those of ``objectives.py``.

    Attributes:
        name: one of ``distill``, ``mwer``, ``reinforce``, ``grpo``, ``dpo``, ``self_training``.
        min_spread: a group whose rewards spread less than this (max − min, nats) has no signal and is skipped; for
            ``dpo`` the smallest reward gap of a pair.
        temperature: ``distill``, ``mwer``: softmax temperature of the reward's distribution, in nats.
        correction: ``mwer``: ``none``, ``anchored`` or ``proposal``.
        mixture: ``mwer`` anchored: share of the reward's distribution in the weights, 0 to 1.
        clip: ``grpo``: ratio clip ε.
        kl_weight: ``grpo``: weight of the k3 KL to the reference.
        standardize: ``grpo``: divide advantages by the group's standard deviation.
        std_floor: ``grpo``: smallest such divisor, nats.
        beta: ``dpo``: strength of the implied anchor, per nat.
        label: ``self_training``: the frozen model's best (``reference``) or the best-rewarded (``reward``).
        min_confidence: ``self_training``: smallest share of the pseudo-label in its group, 0 to 1.
        augment: ``self_training``: through NeMo's own training step (SpecAugment, dropout); False: exact likelihood in
            eval mode.
        pseudo_label_weight: anchor: weight of −log p(best-rewarded member) added to the objective.
        mass_weight: anchor: weight of −log Σ p(members), which keeps probability from leaking out of the group;
            ``conf/objective/distill.yaml`` sets 1, which makes the sum the cross-entropy of soft labels.
        kl_anchor_weight: anchor: weight of KL(reference ‖ policy) over the group.
    """

    name: str = "distill"
    min_spread: float = 0.01
    temperature: float = 1.0
    correction: str = "anchored"
    mixture: float = 0.5
    clip: float = 0.2
    kl_weight: float = 0.04
    standardize: bool = True
    std_floor: float = 0.1
    beta: float = 0.1
    label: str = "reference"
    min_confidence: float = 0.0
    augment: bool = True
    pseudo_label_weight: float = 0.0
    mass_weight: float = 0.0
    kl_anchor_weight: float = 0.0

    def validate(self) -> list[str]:
        """Returns every fault of this section as a sentence."""
        faults = _choice("objective.name", self.name, OBJECTIVE_NAMES)
        faults += _choice("objective.correction", self.correction, ("none", "anchored", "proposal"))
        faults += _choice("objective.label", self.label, ("reference", "reward"))
        faults += _positive("objective", self, "temperature", "clip", "beta", "std_floor")
        anchors = ("pseudo_label_weight", "mass_weight", "kl_anchor_weight")
        faults += _non_negative("objective", self, "min_spread", "kl_weight", *anchors)
        for name in ("mixture", "min_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"objective.{name} is a share and must be in [0, 1], got {getattr(self, name)}.")
        if self.name == "mwer" and self.correction == "proposal":
            faults.append(
                "objective.correction=proposal needs groups of samples only: set proposals.beam=0 proposals.boosted=0."
            )
        return faults


@dataclass(frozen=True)
class ProposalConfig:
    """Where the members of a group come from.

    Attributes:
        beam: members from NeMo's batched beam decoder (0 = none).
        boosted: members from the same beam with NeMo's phrase boosting on the context's terms (0 = none; ignored for
            utterances without terms).
        term_swap: members in which a span is replaced by a context term that looks like it, the most probable ones of
            each of two rounds (0 = none).
        samples: members sampled from the model (0 = none).
        max_members: largest group after removing duplicates; the plain beam's members are kept first.
        boosting_weight: weight of the boosting tree in the beam.
        context_score: NeMo's ``context_score`` of the boosting tree.
        depth_scaling: NeMo's ``depth_scaling`` of the boosting tree.
        swap_similarity: smallest similarity of a span and the term that replaces it, 0 to 100.
        max_symbols: largest number of labels a transducer beam emits in one frame.
    """

    beam: int = 8
    boosted: int = 8
    term_swap: int = 4
    samples: int = 0
    max_members: int = 24
    boosting_weight: float = 1.0
    context_score: float = 1.0
    depth_scaling: float = 2.0
    swap_similarity: float = 50.0
    max_symbols: int = 10

    def validate(self) -> list[str]:
        """Returns every fault of this section as a sentence."""
        faults = _non_negative("proposals", self, *SOURCE_NAMES, "boosting_weight")
        faults += _positive("proposals", self, "context_score", "depth_scaling", "max_symbols")
        if not 0 < self.swap_similarity <= 100:
            faults.append(f"proposals.swap_similarity must be in (0, 100], got {self.swap_similarity}.")
        if self.beam + self.boosted + self.samples < 2:
            faults.append(
                "proposals.beam + boosted + samples must be at least 2: a group of one has nothing to prefer."
            )
        if self.max_members < 2:
            faults.append(f"proposals.max_members must be at least 2, got {self.max_members}.")
        return faults


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
        faults = _non_negative("reward", self, "alpha", "asr_weight")
        faults += _choice("reward.normalize", self.normalize, ("sum", "token", "word", "pmi"))
        return faults


@dataclass(frozen=True)
class ContextConfig:
    """What is known about the domain.

    Attributes:
        description: completes "The following is a transcript of …", e.g. ``an order at a coffee shop``.
        terms: terms that may occur.
        terms_file: one term a line, a JSON list, or a JSON object of lists.
        required: False lets the LLM reward run without any context.
    """

    description: str = ""
    terms: tuple[str, ...] = ()
    terms_file: str | None = None
    required: bool = True

    def validate(self) -> list[str]:
        """Returns every fault of this section as a sentence."""
        try:
            self.load()
        except ConfigError as error:
            return [str(error)]
        return []

    def load(self) -> Context:
        """Returns the run's context: the description, and the terms of both keys in order, without repetition.

        Raises:
            ConfigError: the terms file is missing, empty or of another form.
        """
        terms = list(self.terms) + (read_terms(self.terms_file) if self.terms_file else [])
        return Context(description=self.description.strip(), terms=tuple(dict.fromkeys(t for t in terms if t)))


@dataclass(frozen=True)
class RunConfig:
    """The plugin's sections of a run's configuration, checked."""

    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    llm: LLMConfig | None = None
    context: ContextConfig = field(default_factory=ContextConfig)

    def validate(self) -> list[str]:
        """Returns every fault of all sections, and of their combination, as sentences."""
        faults = [f for section in _sections(self) for f in section.validate()]
        needs_llm = self.reward.name == "llm" and self.needs_reward
        if needs_llm and self.llm is None:
            faults.append(
                "llm.model is missing: give a folder or hub id of a causal LM, e.g. Qwen/Qwen2.5-7B-Instruct."
            )
        if needs_llm and not faults and self.context.required and not self.context.load():
            faults.append(
                "no context: the LLM reward needs context.description, context.terms or context.terms_file "
                "(or context.required=false when every manifest row has its own `context`)."
            )
        others = self.proposals.beam or self.proposals.boosted or self.proposals.term_swap
        if self.objective.name in SAMPLED_OBJECTIVES and others:
            faults.append(
                f"objective.name={self.objective.name} is unbiased only for samples: "
                "set proposals.beam=0 proposals.boosted=0 proposals.term_swap=0 proposals.samples=8."
            )
        if self.feedback.weight == 0 and self.feedback.supervised_weight == 0:
            faults.append("feedback.weight and feedback.supervised_weight are both 0: nothing would be learned.")
        return faults

    @property
    def needs_reward(self) -> bool:
        """Whether the objective reads rewards at all (plain self-training does not)."""
        return self.objective.name != "self_training" or self.objective.label == "reward"


SECTIONS: dict[str, type] = {
    "feedback": FeedbackConfig,
    "objective": ObjectiveConfig,
    "proposals": ProposalConfig,
    "reward": RewardConfig,
    "llm": LLMConfig,
    "context": ContextConfig,
}


def parse_run_config(tree: Mapping[str, Any]) -> RunConfig:
    """Builds the checked configuration from plain nested mappings (only our sections are read).

    Raises:
        ConfigError: one message that lists every unknown key with the nearest known one, and every fault.
    """
    sections = {name: tree[name] for name in SECTIONS if isinstance(tree.get(name), Mapping)}
    check_keys(sections)
    faults: list[str] = []
    parts: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        values = tree.get(section)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            faults.append(f"{section} must be a section of keys, got {type(values).__name__}.")
            continue
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        if section == "llm" and not kept.get("model"):
            continue
        try:
            parts[section] = cls(**kept)
        except (TypeError, ValueError) as error:
            faults.append(f"{section}: {error}")
    if not faults:
        config = RunConfig(**parts)
        faults = _type_faults(config) or config.validate()
        if not faults:
            return config
    raise ConfigError("the configuration has " + _listing(faults))


def check_keys(tree: Mapping[str, Any]) -> None:
    """Refuses unknown keys of our sections.

    Raises:
        ConfigError: lists every unknown key with the nearest known one.
    """
    faults = []
    for section, values in tree.items():
        known = {f.name for f in dataclasses.fields(SECTIONS[section])}
        faults += [_unknown(f"{section}.{key}", key, known) for key in values or () if key not in known]
    if faults:
        raise ConfigError("the configuration has " + _listing(faults))


def read_terms(path: str | Path) -> list[str]:
    """Reads terms: a JSON list of strings, a JSON object of such lists (nested), or one term a line.

    Raises:
        ConfigError: no such file, not text, no term in it, or JSON of another form.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"context.terms_file={path} cannot be read ({error}); give a UTF-8 text or JSON file."
        ) from None
    if file.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        try:
            terms = _flatten(json.loads(text), path)
        except json.JSONDecodeError as error:
            raise ConfigError(f"context.terms_file={path} is not valid JSON ({error}).") from None
    else:
        terms = [line.strip() for line in text.splitlines()]
    terms = list(dict.fromkeys(t for t in terms if t))
    if not terms:
        raise ConfigError(f"context.terms_file={path} has no term in it.")
    return terms


def _flatten(node: Any, path: str | Path) -> list[str]:
    if isinstance(node, str):
        return [node.strip()]
    if isinstance(node, list):
        return [t for item in node for t in _flatten(item, path)]
    if isinstance(node, dict):
        return [t for item in node.values() for t in _flatten(item, path)]
    raise ConfigError(
        f"context.terms_file={path} holds {node!r}; terms must be strings in lists or an object of lists."
    )


def _sections(config: RunConfig) -> list[Any]:
    return [s for s in (getattr(config, name) for name in SECTIONS) if s is not None]


def _type_faults(config: RunConfig) -> list[str]:
    """Numbers given as words and the like; dataclasses do not check types themselves."""
    faults = []
    for name, section in ((n, getattr(config, n)) for n in SECTIONS):
        for f in dataclasses.fields(section) if section is not None else ():
            value, kind = getattr(section, f.name), str(f.type)
            if value is None and "None" in kind:
                continue
            wanted = kind.split(" |")[0]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            wrong = (
                (wanted == "float" and not number)
                or (wanted == "int" and not (isinstance(value, int) and not isinstance(value, bool)))
                or (wanted == "bool" and not isinstance(value, bool))
                or (wanted == "str" and not isinstance(value, str))
            )
            if wrong:
                faults.append(f"{name}.{f.name} must be {wanted}, got {value!r}.")
    return faults


def _unknown(path: str, key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
    return f"unknown key {path}; did you mean {path.rsplit('.', 1)[0]}.{near[0]}?"


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    return [] if value in allowed else [f"{name}={value!r} must be one of {', '.join(allowed)}."]


def _positive(section: str, config: Any, *names: str) -> list[str]:
    return [f"{section}.{n} must be > 0, got {getattr(config, n)}." for n in names if not getattr(config, n) > 0]


def _non_negative(section: str, config: Any, *names: str) -> list[str]:
    return [f"{section}.{n} must be ≥ 0, got {getattr(config, n)}." for n in names if not getattr(config, n) >= 0]


def _listing(faults: list[str]) -> str:
    head = "1 fault:" if len(faults) == 1 else f"{len(faults)} faults:"
    return head + "".join(f"\n  - {fault}" for fault in faults)
