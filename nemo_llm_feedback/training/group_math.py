"""Arithmetic on groups of hypotheses: which members and groups count, and NaN-free means and softmaxes over them.

Tensors are [B, N], B groups of at most N members. Values outside a mask are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Beyond this log-ratio `bounded_exp` continues along its tangent: exp(10) is far outside any trust region, and a
# sequence's log-ratio of 90 would overflow float32 and put NaN into the gradient of terms that a min() did not choose.
_MAX_LOG_RATIO = 10.0


class Groups(NamedTuple):
    """What every objective is a function of: B groups of at most N hypotheses, as tensors of one shape [B, N].

    Attributes:
        logp: natural-log probability log p(h|x) of member n under the moving policy, marginal over alignments, ≤ 0,
            with gradient; −inf for a text that the audio is too short for.
        rewards: reward of the member, higher is better, no gradient; it already holds the frozen ASR score. NaN or
            ±inf: the reward could not judge the member.
        ref_logp: log p(h|x) under the frozen starting model, no gradient.
        mask: bool, True for members, False for padding. What the padding holds does not matter, NaN included.
        old_logp: log-probability under the policy that made the group, no gradient; or None. Where the members were
            *sampled*, that is the sampler.
        lengths: labels of the member, ≥ 0; or None where nothing asks for them.
    """

    logp: Tensor
    rewards: Tensor
    ref_logp: Tensor
    mask: Tensor
    old_logp: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def feasible(self) -> Tensor:
        """[B, N] bool: members that policy and reference can both produce at all (no log-probability of −inf)."""
        impossible = torch.isneginf(self.logp.detach()) | torch.isneginf(self.ref_logp.to(self.logp.device))
        return self.mask.to(self.logp.device) & ~impossible


def signal(rewards: Tensor, mask: Tensor, *, min_spread: float) -> Tensor:
    """Which groups can teach anything: at least two members, all judged, whose rewards differ enough.

    Args:
        rewards: [B, N] reward of each member, NaN or ±inf where it was not judged.
        mask: [B, N] bool, True for members (infeasible ones already removed).
        min_spread: reward units, ≥ 0; a group needs max − min > ``min_spread``.

    Returns:
        [B] bool.
    """
    judged = (torch.isfinite(rewards) | ~mask).all(dim=1)
    return judged & (mask.sum(dim=1) >= 2) & (reward_spread(rewards, mask) > min_spread)


def reward_spread(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] largest minus smallest finite reward among the members; 0 where there is no such member."""
    usable = mask & torch.isfinite(rewards)
    top = rewards.masked_fill(~usable, -torch.inf).amax(dim=1)
    bottom = rewards.masked_fill(~usable, torch.inf).amin(dim=1)
    return torch.where(usable.any(dim=1), top - bottom, torch.zeros_like(top))


def leave_one_out(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B, N] reward minus the mean reward of the *other* members (Kool et al. 2019), 0 outside ``mask``.

    Equals N/(N−1) · (R_i − mean R). The baseline of a member does not depend on that member, hence no bias.
    """
    count = mask.sum(dim=1, keepdim=True)
    return centred(rewards, mask) * count / (count - 1).clamp(min=1)


def centred(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B, N] reward minus the mean reward of the group's members, 0 outside ``mask``."""
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    filled = rewards.masked_fill(~mask, 0.0)
    return (filled - filled.sum(dim=1, keepdim=True) / count).masked_fill(~mask, 0.0)


def group_kl(p_scores: Tensor, q_scores: Tensor, mask: Tensor) -> Tensor:
    """KL(softmax(p_scores) ‖ softmax(q_scores)) over each group's members.

    Args:
        p_scores, q_scores: [B, N] unnormalised log-probabilities, finite on the members.
        mask: [B, N] bool, True for members.

    Returns:
        [B] nats, ≥ 0; 0 for a group without members.
    """
    log_p, log_q = log_softmax_over(p_scores, mask), log_softmax_over(q_scores, mask)
    return (probabilities(log_p, mask) * (log_p - log_q)).sum(dim=1)


@dataclass(frozen=True)
class Members:
    """What is left after the shared rules: values are 0 outside ``valid``, so that no arithmetic can make a NaN there.

    Attributes:
        logp: [B, N] with gradient.
        rewards: [B, N]; zeros where the objective has none (``judged`` is False).
        ref_logp: [B, N].
        valid: [B, N] bool, feasible members of the groups that are kept.
        kept: [B] bool, groups with signal; the others have no valid member.
        policy_grad: [B, N] P̂, the softmax of ``logp`` over the valid members, with gradient; ``policy`` without.
        judged: whether ``rewards`` means anything.
    """

    logp: Tensor
    rewards: Tensor
    ref_logp: Tensor
    valid: Tensor
    kept: Tensor
    policy_grad: Tensor
    judged: bool

    @property
    def policy(self) -> Tensor:
        """[B, N] P̂ without gradient."""
        return self.policy_grad.detach()


def usable_members(groups: Groups, min_spread: float, *, proposed: bool = False) -> Members:
    """Applies the rules that all rewarded objectives share: feasible members of groups with signal.

    Args:
        groups: all members.
        min_spread: see `signal`.
        proposed: members must also be feasible under ``old_logp``, where there is one.
    """
    valid = groups.feasible
    if proposed and groups.old_logp is not None:
        valid = valid & ~torch.isneginf(groups.old_logp.to(valid.device))
    return members(groups, valid, signal(groups.rewards.to(groups.logp), valid, min_spread=min_spread))


def members(groups: Groups, valid: Tensor, kept: Tensor, *, judged: bool = True) -> Members:
    """Empties the groups that are not kept and makes everything outside the valid members harmless.

    Args:
        groups: all members.
        valid: [B, N] bool, feasible members.
        kept: [B] bool, groups with signal.
        judged: False: the rewards are not read.
    """
    valid = valid & kept.unsqueeze(1)
    logp = groups.logp.masked_fill(~valid, 0.0)
    policy = probabilities(log_softmax_over(logp, valid), valid)
    rewards = constant(groups.rewards, logp, valid) if judged else torch.zeros_like(logp)
    return Members(logp, rewards, constant(groups.ref_logp, logp, valid), valid, kept, policy, judged)


def constant(values: Tensor, like: Tensor, valid: Tensor) -> Tensor:
    """``values`` on the device and in the precision of ``like``, without gradient, 0 outside ``valid``."""
    return values.detach().to(like).masked_fill(~valid, 0.0)


def _floor(x: Tensor) -> float:
    """A score whose softmax is exactly 0 beside any real one, yet finite: log_softmax of all −inf would be NaN."""
    return torch.finfo(x.dtype).min


def log_softmax_over(scores: Tensor, valid: Tensor) -> Tensor:
    """[B, N] log-softmax over the valid members; 0, not −inf, outside them."""
    return F.log_softmax(scores.masked_fill(~valid, _floor(scores)), dim=1).masked_fill(~valid, 0.0)


def log_mass(scores: Tensor, valid: Tensor) -> Tensor:
    """[B] log Σ exp(score) over the valid members; finite but meaningless for a group without any."""
    return torch.logsumexp(scores.masked_fill(~valid, _floor(scores)), dim=1)


def probabilities(log_probs: Tensor, valid: Tensor) -> Tensor:
    """[B, N] exp(log_probs), 0 outside the valid members."""
    return log_probs.exp().masked_fill(~valid, 0.0)


def member_mean(values: Tensor, valid: Tensor) -> Tensor:
    """[B] mean over the valid members."""
    return values.masked_fill(~valid, 0.0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), continued along its tangent beyond x = 10."""
    return x.clamp(max=_MAX_LOG_RATIO).exp() * (1 + (x - _MAX_LOG_RATIO).clamp(min=0))


def k3_penalty(logp: Tensor, ref_logp: Tensor, valid: Tensor) -> Tensor:
    """[B] mean over the valid members of exp(δ) − δ − 1 with δ = ref_logp − logp."""
    delta = ref_logp - logp
    return member_mean(bounded_exp(delta) - delta - 1, valid)


def effective_members(weights: Tensor) -> Tensor:
    """[B] effective number of members, (Σw)² / Σw²."""
    return weights.detach().sum(dim=1).square() / weights.detach().square().sum(dim=1).clamp(min=1e-30)
