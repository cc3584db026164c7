"""A weighted sum of several rewards, in their units or normalised within the group.

R(h) = Σ_k w_k · f_k(r_k(h)), where f_k is, over the members of h's group that every component can judge:

- ``none``: r. Units add as they are: right for log-probabilities, of which the sum is a log-probability again.
- ``center``: r − mean. The same differences; only what is logged changes.
- ``z``: (r − mean) / standard deviation. Parts of different units count alike, but a group in which a part hardly
  varies has its noise blown up to the size of signal; deviations below a floor count as none.
- ``rank``: the rank, −½ (worst) to ½ (best), ties sharing theirs. Outliers lose their weight, distances are lost.

The frozen reference's log p is the component ``asr`` and the word count ``length``, so α·LLM + ASR + β·length is the
composite of ``llm``, ``asr`` and ``length`` with ``none``. A member that one component cannot judge is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_llm_feedback.core.config.reward import GROUP_NORMALIZATIONS
from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput
from nemo_llm_feedback.rewards.base import Reward, build_reward, register

_STD_FLOOR = 1e-6
_SHARED = ("asr", "length")  # parts that a reward with an ASR and a length term would give twice


@dataclass(frozen=True)
class Component:
    """One reward of a composite: its weight, and how it is normalised within the group."""

    reward: Reward
    weight: float
    normalize: str = "none"


@register("composite")
class CompositeReward:
    """A weighted sum of rewards.

    Args:
        components: at least one; weights are finite and not all 0. One of weight 0 is logged, and can make NaN.
        name: the reward's name.

    Raises:
        RewardError: no component, an unknown normalisation, or weights that are not finite or all 0.
    """

    def __init__(self, components: Sequence[Component], *, name: str = "composite") -> None:
        self.name = name
        self.components = tuple(components)
        weights = [component.weight for component in components]
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise RewardError(f"The weights {weights} of {name} must be finite and not all 0.")
        unknown = [c.normalize for c in components if c.normalize not in GROUP_NORMALIZATIONS]
        if unknown:
            raise RewardError(f"normalize={unknown[0]!r} is not one of {', '.join(GROUP_NORMALIZATIONS)}.")

    def with_weights(self, *, alpha: float, beta: float) -> CompositeReward:
        """The same reward with other weights of its first component and of ``length``: for the
        rewards that take the LLM's place in the formula.

        Raises:
            RewardError: weights that are not finite, or all 0.
        """
        weights = {self.components[0].reward.name: alpha, "length": beta}
        changed = [replace(c, weight=weights.get(c.reward.name, c.weight)) for c in self.components]
        return CompositeReward(changed, name=self.name)

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up scores that the components' caches knew so far; NaN before the first."""
        caches = {id(cache): cache for c in self.components if (cache := getattr(c.reward, "cache", None)) is not None}
        hits = sum(cache.hits for cache in caches.values())
        asked = hits + sum(cache.misses for cache in caches.values())
        return hits / asked if asked else math.nan

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], and every component's value and further parts, unweighted and not normalised.

        Raises:
            RewardError: a component cannot work.
        """
        outputs = [component.reward(groups) for component in self.components]

        def _combined(values: Sequence[Tensor]) -> Tensor:
            judged = torch.stack([value.isfinite() for value in values]).all(0)
            total = torch.zeros(judged.shape)
            for component, value in zip(self.components, values, strict=True):
                total = total + component.weight * normalized(value, judged, kind=component.normalize)
            return total.masked_fill(~judged, math.nan)

        total = _combined([output.values for output in outputs])
        parts: dict[str, Tensor] = {}
        for component, output in zip(self.components, outputs, strict=True):
            name = component.reward.name
            further = {k: v for k, v in output.parts.items() if k not in (name, *_SHARED)}
            for part, values in ({name: output.values} | further).items():
                count = sum(known == part or known.startswith(f"{part}#") for known in parts)
                parts[f"{part}#{count + 1}" if count else part] = values.masked_fill(total.isnan(), math.nan)
        return RewardOutput(total, parts, lambda logp: _combined([output.with_reference(logp) for output in outputs]))


def normalized(values: Tensor, mask: Tensor, *, kind: str) -> Tensor:
    """Brings rewards to a common unit within each group.

    Args:
        values: [B, N] rewards of the members of B groups.
        mask: [B, N] of bool, the members that count.
        kind: ``none``, ``center``, ``z`` or ``rank``.

    Returns:
        [B, N]; 0 outside the mask. A group of one, or whose members are all equal, is 0 but for ``none``.
    """
    kept = values.double().masked_fill(~mask, 0.0)
    if kind == "none":
        return kept.float()
    count = mask.sum(1, keepdim=True).clamp(min=1)
    if kind == "rank":
        lower = ((kept[:, None, :] < kept[:, :, None]) & mask[:, None, :]).sum(2)
        equal = ((kept[:, None, :] == kept[:, :, None]) & mask[:, None, :]).sum(2)
        rank = (lower + (equal - 1) / 2) / (count - 1).clamp(min=1) - 0.5
        return rank.masked_fill(~mask | (count == 1), 0.0).float()
    centred = (kept - kept.sum(1, keepdim=True) / count).masked_fill(~mask, 0.0)
    if kind == "z":
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
        centred = torch.where(deviation > _STD_FLOOR, centred / deviation.clamp(min=_STD_FLOOR), 0.0)
    return centred.float()


@register("rules")
def rules_reward(
    *,
    length: float = 0.0,
    repetition: float = 4.0,
    empty: float = 8.0,
    edit_distance: float = 0.5,
    entity_hits: float = 0.0,
    entity_false_alarms: float = 0.0,
) -> CompositeReward:
    """A weighted sum of rules, without an LLM. Arguments are the rules' weights; those of weight 0 are left out.

    Raises:
        RewardError: all weights are 0, or one is not finite.
    """
    weights = dict(locals())  # the arguments by name
    chosen = [Component(build_reward(rule), weight) for rule, weight in weights.items() if weight]
    return CompositeReward(chosen, name="rules")
