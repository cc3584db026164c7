"""From groups and log-probabilities to one loss: the objective of the run plus its anchors, for every head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_llm_feedback.core.config import SOURCE_NAMES, ObjectiveConfig
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.core.types import pad_groups
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.training.objectives import (
    OBJECTIVES,
    ObjectiveOutput,
    hyperparameters,
    kl_anchor,
    mass_anchor,
    self_training,
    sequence_k3,
)


@dataclass(frozen=True)
class Term:
    """A part of a step's loss.

    Attributes:
        value: scalar, mean over its items.
        count: items (groups with signal, rows) on this rank.
        weight: factor in the loss.
    """

    value: Tensor
    count: float
    weight: float = 1.0


def total(terms: Mapping[str, Term], shares: Mapping[str, float] | None = None) -> Tensor:
    """The weighted sum of the terms.

    Args:
        terms: at least one.
        shares: a further factor of each (see ``distributed.shares``); 1 if None.
    """
    parts = [term.weight * (shares[name] if shares else 1.0) * term.value for name, term in terms.items()]
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class GroupLoss:
    """The loss of a batch of groups under one head.

    Attributes:
        terms: ``objective`` and the anchors.
        metrics: name → value.
        metric_counts: those metrics that are means over the groups with signal → their number; the others are means
            over all groups.
    """

    terms: dict[str, Term]
    metrics: dict[str, Tensor]
    metric_counts: dict[str, float]


def group_loss(config: ObjectiveConfig, logp: Tensor, groups: Sequence[ScoredGroup], *, head: str) -> GroupLoss:
    """The run's objective and anchors for one head.

    Args:
        config: which objective, with its hyperparameters and anchor weights.
        logp: [B, N] policy log p of each member, natural log, with gradient; padding holds −inf.
        groups: B scored groups.
        head: whose rewards and reference scores to use.

    Returns:
        The terms of the loss and their metrics.
    """
    rewards = pad_groups([g.rewards[head] for g in groups]).to(logp.device)
    ref_logp = pad_groups([g.ref_logp[head] for g in groups], fill=float("-inf")).to(logp.device)
    old_logp = pad_groups([g.old_logp[head] for g in groups]).to(logp.device)
    mask = member_mask(groups).to(logp.device)
    chosen = {name: getattr(config, name) for name in hyperparameters(config.name)}
    output = OBJECTIVES[config.name](logp, rewards=rewards, ref_logp=ref_logp, mask=mask, old_logp=old_logp, **chosen)
    count = float(output.metrics["groups"])
    terms, metrics = {"objective": Term(output.loss, count)}, dict(output.metrics)
    counts = {name: count for name in metrics if name not in ("groups", "signal_fraction")}
    anchors = {
        "pseudo_label": (config.pseudo_label_weight, lambda: _pseudo_label(logp, rewards, ref_logp, mask)),
        "mass": (config.mass_weight, lambda: mass_anchor(logp, ref_logp=ref_logp, mask=mask)),
        "kl_anchor": (config.reference_kl_weight, lambda: kl_anchor(logp, ref_logp=ref_logp, mask=mask)),
    }
    for name, (weight, anchor) in anchors.items():
        if weight > 0:
            term = anchor()
            terms[name] = Term(term.loss, float(term.metrics["groups"]), weight)
            metrics[f"anchor_{name}"] = term.loss.detach()
    metrics["k3_reference"] = sequence_k3(logp.detach(), ref_logp=ref_logp, mask=mask).loss
    return GroupLoss(terms, metrics, counts)


def _pseudo_label(logp: Tensor, rewards: Tensor, ref_logp: Tensor, mask: Tensor) -> ObjectiveOutput:
    return self_training(logp, rewards=rewards, ref_logp=ref_logp, mask=mask, label="reward", min_confidence=0.0)


def member_mask(groups: Sequence[ScoredGroup]) -> Tensor:
    """[B, N] bool, True for members."""
    sizes = torch.tensor([len(g.group) for g in groups])
    return torch.arange(int(sizes.max()))[None, :] < sizes[:, None]


def group_metrics(groups: Sequence[ScoredGroup], logp: Tensor, *, head: str) -> dict[str, float]:
    """What is logged of a batch of groups beside the objective's own metrics.

    Args:
        groups: B scored groups.
        logp: [B, N] policy log p, without gradient.
        head: whose scores to read.

    Returns:
        ``reward/<part>`` means over members; ``members`` = mean distinct members; ``unique_fraction`` of members;
        ``empty_fraction`` = groups whose most probable member is empty; ``length_ratio`` = expected length under the
        policy ÷ under the reference; ``reward_length_correlation`` within groups; ``reward_gap`` = best reward −
        reward of the policy's favourite, nats; ``best_from_<source>`` = share of groups whose best member it gave.
    """
    sizes = [len(g.group) for g in groups]
    ref = pad_groups([g.ref_logp[head] for g in groups], fill=float("-inf"))
    policy = torch.softmax(logp.detach().float().cpu().nan_to_num(nan=-1e4, neginf=-1e4), dim=1)
    reference = torch.softmax(ref.nan_to_num(neginf=-1e4), dim=1)
    lengths = pad_groups([[float(text_length(t)) for t in g.group.texts] for g in groups], fill=0.0)
    favourite = policy.argmax(dim=1).tolist()
    out = {
        "members": sum(sizes) / len(sizes),
        "unique_fraction": sum(len(set(g.group.texts)) for g in groups) / sum(sizes),
        "empty_fraction": sum(not g.group.texts[n] for g, n in zip(groups, favourite, strict=True)) / len(groups),
        "length_ratio": float((policy * lengths).sum() / (reference * lengths).sum().clamp(min=1e-6)),
    }
    for name in groups[0].parts:
        values = torch.tensor([v for g in groups for v in g.parts[name]])
        out[f"reward/{name}"] = float(values[torch.isfinite(values)].mean())
    rewards = pad_groups([g.rewards[head] for g in groups])
    judged = [b for b in range(len(groups)) if torch.isfinite(rewards[b, : sizes[b]]).all()]
    if judged:
        best = {b: int(rewards[b, : sizes[b]].argmax()) for b in judged}
        out["reward_gap"] = sum(float(rewards[b, best[b]] - rewards[b, favourite[b]]) for b in judged) / len(judged)
        out["reward_length_correlation"] = _within_group_correlation(
            [rewards[b, : sizes[b]] for b in judged], [lengths[b, : sizes[b]] for b in judged]
        )
        for source in ("greedy", *SOURCE_NAMES):
            share = sum(groups[b].group.hypotheses[n].source == source for b, n in best.items()) / len(judged)
            out[f"best_from_{source}"] = share
    return out


def _within_group_correlation(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """Pearson correlation of the group-centred values, pooled; 0 where one of them does not vary."""
    x = torch.cat([v - v.mean() for v in xs])
    y = torch.cat([v - v.mean() for v in ys])
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale > 1e-12 else 0.0
