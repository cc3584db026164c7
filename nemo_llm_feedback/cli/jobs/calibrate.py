"""The calibrate job: what 4 bits cost. The same groups are judged by the LLM as a run would load it and in full."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_llm_feedback.cli.jobs.nbest_probe import baseline, open_look
from nemo_llm_feedback.cli.options import ProbeOptions
from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.config.sections import ComputeDtype
from nemo_llm_feedback.core.errors import ConfigError, LLMError
from nemo_llm_feedback.evaluation.rank_agreement import RankAgreement, best_member, rank_agreement
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.llm import check_llm_folder, open_llm
from nemo_llm_feedback.training.setup import make_reward

# Above these, 4 bits blur what the reward is there to tell apart; see `advice`.
_NOISE, _RANKS = 0.1, 0.95


@dataclass(frozen=True)
class Flip:
    """An utterance in which the two LLMs make the reward choose differently.

    Attributes:
        quantised, full: the texts chosen.
        margin: by how much the full LLM's reward prefers its own choice, ≥ 0; small margins are ties.
    """

    utterance: str
    quantised: str
    full: str
    margin: float


@dataclass(frozen=True)
class Calibration:
    """The quantised LLM compared with the full one on the same groups.

    Attributes:
        quantised, full: what each was: identity of the scorer.
        groups, members: how many were judged by both.
        max_difference, mean_difference: of |Δ| of a text's log-probability, in nats.
        centred_difference: mean |Δ| after each group's mean Δ is taken away: an offset common to a group changes
            nothing that learns from it.
        noise: root mean square of the centred Δ ÷ that of the full score about its group's mean.
        ranks: agreement of the LLM scores within groups.
        reward_ranks: agreement of the whole rewards, with the acoustic score and the length in them.
        flips: utterances whose best-rewarded member differs.
    """

    quantised: str
    full: str
    groups: int
    members: int
    max_difference: float
    mean_difference: float
    centred_difference: float
    noise: float
    ranks: RankAgreement
    reward_ranks: RankAgreement
    flips: tuple[Flip, ...]


def calibrate(options: ProbeOptions, *, dtype: ComputeDtype = "auto") -> Calibration:
    """Judges the groups of some rows with both LLMs, one after the other in memory.

    Args:
        options: the flags.
        dtype: ``llm.compute_dtype`` of the full LLM; ``auto`` is 16 bit on a GPU, 32 bit on a CPU.

    Raises:
        FeedbackError: unusable input, before any model is loaded.
    """
    look = open_look(options)
    config = look.config
    if config.reward.name != "llm" or config.llm is None:
        raise ConfigError(f"calibrate compares LLMs, reward.name={config.reward.name} needs none: use reward=llm.")
    if config.llm.quantization == "none":
        raise ConfigError("llm.quantization=none is the full LLM itself: set llm.quantization to nf4 or int8.")
    full = dataclasses.replace(config.llm, quantization="none", compute_dtype=dtype)
    faults = check_llm_folder(full)
    if faults:
        raise LLMError("the full LLM cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))

    judge = look.open_judge()
    groups = look.make_groups(look.load_model(), judge)
    assert judge.scorer is not None
    quantised_name = _name(config.llm, judge.scorer.identity)
    del judge  # the full LLM needs the room
    full_scorer = open_llm(full)
    judged = make_reward(config, full_scorer)([g.group for g in groups])
    head = next(iter(groups[0].rewards))
    sizes = [len(g.group) for g in groups]
    return compare_scores(
        groups,
        llm=(
            [g.parts["llm"] for g in groups],
            [row[:n] for row, n in zip(judged.parts["llm"].tolist(), sizes, strict=True)],
        ),
        rewards=(
            [g.rewards[head] for g in groups],
            [row[:n] for row, n in zip(judged.values.tolist(), sizes, strict=True)],
        ),
        names=(quantised_name, _name(full, full_scorer.identity)),
    )


Judgements = tuple[list[list[float]], list[list[float]]]  # quantised, full; one list a group, one value a member


def compare_scores(
    groups: Sequence[ScoredGroup], *, llm: Judgements, rewards: Judgements, names: tuple[str, str]
) -> Calibration:
    """The statistics; see :class:`Calibration`.

    Args:
        groups: of all rows.
        llm: the LLM's log-probabilities in nats.
        rewards: the whole rewards.
        names: of the two LLMs.
    """
    differences: list[float] = []
    centred: list[float] = []
    signal: list[float] = []
    used = 0
    for ours, theirs in zip(*llm, strict=True):
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if math.isfinite(a) and math.isfinite(b)]
        if not pairs:
            continue
        used += 1
        deltas = [a - b for a, b in pairs]
        differences += deltas
        centred += _centred(deltas)
        signal += _centred([b for _, b in pairs])
    flips = []
    for g, ours, theirs in zip(groups, *rewards, strict=True):
        a, b = (best_member(row, otherwise=baseline(g)) for row in (ours, theirs))
        if g.group.texts[a] != g.group.texts[b]:
            flips.append(Flip(g.group.utterance, g.group.texts[a], g.group.texts[b], theirs[b] - theirs[a]))
    sizes = [abs(d) for d in differences]
    return Calibration(
        quantised=names[0],
        full=names[1],
        groups=used,
        members=len(sizes),
        max_difference=max(sizes, default=math.nan),
        mean_difference=_mean(sizes),
        centred_difference=_mean([abs(d) for d in centred]),
        noise=_rms(centred) / _rms(signal) if _rms(signal) > 0 else math.nan,
        ranks=rank_agreement(*llm),
        reward_ranks=rank_agreement(*rewards),
        flips=tuple(flips),
    )


def calibration_text(found: Calibration, *, show: int = 5) -> str:
    """The comparison for a terminal, with the ``show`` most decided of the changed choices."""
    flips = sorted(found.flips, key=lambda flip: -flip.margin)
    share = 100 * len(flips) / found.groups if found.groups else math.nan
    lines = [
        f"quantised  {found.quantised}",
        f"full       {found.full}",
        f"{found.groups} groups, {found.members} members",
        f"|Δ log p|            max {found.max_difference:.3f}, mean {found.mean_difference:.3f} nat",
        f"within groups        mean {found.centred_difference:.3f} nat, {100 * found.noise:.1f} % of the spread",
        f"rank agreement       LLM: Spearman {found.ranks.spearman:.4f}, Kendall {found.ranks.kendall:.4f}; "
        f"whole reward: {found.reward_ranks.spearman:.4f}, {found.reward_ranks.kendall:.4f}",
        f"choice changes       {len(flips)} of {found.groups} ({share:.1f} %)",
    ]
    for flip in flips[:show]:
        lines += [f"  {flip.utterance}  margin {flip.margin:.3f}"]
        lines += [f"    quantised  {flip.quantised}", f"    full       {flip.full}"]
    return "\n".join([*lines, advice(found)])


def advice(found: Calibration) -> str:
    """One sentence: whether the quantised LLM will do."""
    if not found.noise <= _NOISE or not found.ranks.spearman >= _RANKS:
        return (
            f"The quantised LLM blurs the groups (over {100 * _NOISE:.0f} % of their spread, or Spearman under "
            f"{_RANKS}): use llm=int8 or llm=full if the memory allows, or a larger LLM in 4 bit."
        )
    return "The quantised LLM orders the groups as the full one does."


def _name(config: LLMConfig, identity: str) -> str:
    return f"{config.model} {config.quantization} ({identity})"


def _centred(values: Sequence[float]) -> list[float]:
    return [value - sum(values) / len(values) for value in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(_mean([value**2 for value in values]))


def calibration_json(found: Calibration) -> dict[str, Any]:
    """The comparison as plain data."""
    return asdict(found) | {"advice": advice(found)}
