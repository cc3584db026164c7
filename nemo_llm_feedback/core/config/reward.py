"""Settings of the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, get_args

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section, build

# Rewards that ask the LLM of the section ``llm``; those that read a context beside them; those whose value is
# combined as alpha·value + asr_weight·log p_ref + beta·length.
LLM_REWARDS = ("llm", "judge", "correction", "entity")
CONTEXT_REWARDS = (*LLM_REWARDS, "remote")
ASR_WEIGHTED_REWARDS = ("judge", "correction", "entity", "rules")
# Those whose `alpha` can come from the pool: what it weighs is a log-probability, as what it is weighed against.
SCALED_REWARDS = ("llm", "remote", "entity")
TEXT_REWARD = "wer"  # compares with the row's own text
DEFAULT_ALPHA, BETA_PER_ALPHA = 1.0, 2.0
GroupNormalization = Literal["none", "center", "z", "rank"]
GROUP_NORMALIZATIONS: tuple[str, ...] = get_args(GroupNormalization)


@dataclass(frozen=True, config=STRICT)
class RewardConfig(Section):
    """R(h) = alpha·logP_LLM(h | context) + logP_ref(h | audio) + beta·length(h), the one form used everywhere.

    Attributes:
        name: short name of the reward in the registry, or ``package.module:attribute`` from your YAML. ``judge``,
            ``correction``, ``entity`` and ``rules`` stand in the LLM's place in the formula; a single rule,
            ``callable``, ``wer``, a reward by path and ``composite`` are the whole reward (docs/rewards.md).
        alpha: weight of the LLM's log-probability, or of what stands in its place; null: ``adapt`` takes that of
            ``llm``, ``remote`` and ``entity`` from the pool before the first step (``spread_factor``), all else is 1.
        beta: bonus per word (a character in scripts written without spaces), in nats; null = 2·alpha for ``llm``,
            ``remote`` (both with ``normalize=sum``) and ``entity``, which fall with every word, and 0 for all else. 0
            to 4·alpha did alike on two dev sets (docs/results.md), and much more teaches insertions.
        spread_factor: where the pool sets alpha: the mean within-group standard deviation of alpha·logP_LLM is so many
            times that of asr_weight·logP_ref. From 3 on the choice hardly changes, and more only costs false alarms
            (docs/results/trust.md).
        normalize: ``sum``, ``token``, ``word`` or ``pmi`` form of the LLM term (``llm`` and ``remote``).
        asr_weight: weight of the frozen reference's log p; 1 in the one parameterisation, 0 for the ablation.
        trust: other recognisers under the manifest key ``hypotheses`` → the largest gap to our own best text, in nats
            of log p_ref per label, up to which a text of theirs is a member, level with our best; 0 = none may be less
            probable. null: ``adapt`` finds it on the pool, where asr_weight is not 0; what is not named then has 0.
        cache: file or folder of LLM scores, which later runs may share; null = ``llm_scores.sqlite`` in the run's
            folder (where there is no run: memory), ``:memory:`` = memory only.
        settings: extra keyword arguments of a reward other than ``llm``; for ``composite`` its ``components``, a list
            of ``{name, weight, normalize, settings}``.
    """

    name: str = "llm"
    alpha: NonNegativeFloat | None = None
    beta: float | None = None
    spread_factor: PositiveFloat = 3.0
    normalize: Literal["sum", "token", "word", "pmi"] = "sum"
    asr_weight: NonNegativeFloat = 1.0
    trust: dict[str, NonNegativeFloat] | None = None
    cache: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences, and the faults of a composite."""
        if self.name == "composite":
            return _composite_faults(self.settings)
        if self.weighed and not (any(self.weights) or self.asr_weight):
            return ["reward.alpha, reward.asr_weight and reward.beta are all 0: every text would be worth the same."]
        return []

    @property
    def weighed(self) -> bool:
        """Whether alpha, asr_weight and beta play a part; some rewards are taken as they are."""
        return self.name in (*CONTEXT_REWARDS, *ASR_WEIGHTED_REWARDS)

    @property
    def weights(self) -> tuple[float, float]:
        """(alpha, beta), with what stands for null where there is no pool to go by."""
        alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        return alpha, self.beta_beside(alpha)

    def beta_beside(self, alpha: float) -> float:
        """Beta, with what stands for null beside this alpha."""
        falls = self.name in SCALED_REWARDS and self.normalize == "sum"  # with every word
        by_length = BETA_PER_ALPHA * alpha if falls else 0.0
        return by_length if self.beta is None else self.beta

    @property
    def scaled_by_pool(self) -> bool:
        """Whether ``adapt`` takes alpha from the spread of the pool's groups; nothing to weigh against = no."""
        return self.alpha is None and self.name in SCALED_REWARDS and self.asr_weight > 0

    @property
    def trusts_by_pool(self) -> bool:
        """Whether ``adapt`` finds the trust in other recognisers on the pool: log p_ref must be in the reward."""
        return self.trust is None and self.weighed and self.asr_weight > 0

    @property
    def weighed_part(self) -> str:
        """The part of the reward that alpha weighs, by its name in the reward's output."""
        return "llm" if self.name == "remote" else self.name

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that take part: this one, or the components of a composite."""
        if self.name != "composite":
            return (self.name,)
        items = self.settings.get("components")
        named = items if isinstance(items, (list, tuple)) else ()
        return tuple(str(item.get("name")) for item in named if isinstance(item, Mapping))

    @property
    def needs_llm(self) -> bool:
        """Whether the reward asks the LLM of the section ``llm``."""
        return any(name in LLM_REWARDS for name in self.names)

    @property
    def needs_text(self) -> bool:
        """Whether the reward can judge only rows with text."""
        return TEXT_REWARD in self.names

    @property
    def may_read_text(self) -> bool:
        """Whether the reward may read the row's own text: ``wer`` does, and the user's code can."""
        own = any(":" in name or name in ("callable", "python") for name in self.names)
        return self.needs_text or own

    @property
    def reads_context(self) -> bool:
        """Whether the reward shows a context to an LLM, here or on a server."""
        return any(name in CONTEXT_REWARDS for name in self.names)


@dataclass(frozen=True, config=STRICT)
class _Component(Section):
    name: str
    weight: float = 1.0
    normalize: GroupNormalization = "none"
    settings: dict[str, Any] | None = None


def _composite_faults(settings: Mapping[str, Any]) -> list[str]:
    where = "reward.settings.components"
    items = settings.get("components")
    others = [key for key in settings if key != "components"]
    faults = [f"unknown key reward.settings.{key} of composite: it has components." for key in others]
    if not isinstance(items, (list, tuple)) or not items:
        return [*faults, f"{where} must be a list of {{name, weight, normalize, settings}}, at least one."]
    built = [build(_Component, item, where=f"{where}[{n}]") for n, item in enumerate(items)]
    faults += [fault for _, found in built for fault in found]
    parts = [part for part, _ in built]
    if any(part is not None and part.name == "composite" for part in parts):
        faults.append(f"{where} holds a composite itself: list its components here.")
    if all(part is not None and part.weight == 0 for part in parts):
        faults.append(f"{where} have weight 0 all of them: there would be no reward.")
    return faults
