"""Objectives on toys that can be enumerated: exact gradients, unbiased estimates, members from outside the policy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nemo_llm_feedback.training.objectives import OBJECTIVES, Groups, ObjectiveOutput, hyperparameters


def run(
    name: str, logp: Tensor, rewards: Tensor, ref: Tensor, old: Tensor | None = None, **settings
) -> ObjectiveOutput:
    """Calls an objective with all members valid and, where it asks for a spread, any spread."""
    if "min_spread" in hyperparameters(name):
        settings["min_spread"] = 0.0
    mask = torch.ones_like(logp, dtype=torch.bool)
    return OBJECTIVES[name](Groups(logp, rewards, ref, mask, old, torch.full_like(logp, 6)), **settings)


def grad(loss: Tensor, parameters: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameters)[0]


# --- against exact expectations -------------------------------------------------------------------------------------


class Toy:
    """A policy over all 27 strings of three symbols, positions independent; everything can be enumerated."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(3, 3, dtype=torch.float64, generator=generator).requires_grad_()
        self.strings = torch.tensor(list(itertools.product(range(3), repeat=3)))
        self.rewards = torch.randn(27, dtype=torch.float64, generator=generator) * 2

    def logp(self, strings: Tensor) -> Tensor:
        """[..., 3] strings → [...] log-probability."""
        return torch.log_softmax(self.logits, dim=1)[torch.arange(3), strings].sum(dim=-1)

    def exact_gradient(self) -> Tensor:
        """Gradient of −E[R] over the whole space."""
        return grad(-(self.logp(self.strings).exp() * self.rewards).sum(), self.logits)


def test_mwer_gradient_is_the_exact_expected_reward_gradient():
    toy = Toy(0)
    logp = toy.logp(toy.strings)[None]
    out = run("mwer", logp, toy.rewards[None], logp, correction="none", temperature=1.0, mixture=0.5)
    assert (grad(out.loss, toy.logits) - toy.exact_gradient()).abs().max() < 1e-8


def sampled_gradients(toy: Toy, sampler: Tensor, name: str, *, old: bool, **settings) -> Tensor:
    """[G, 3, 3] gradients of 4,000 single groups of 4 independent samples of the ``sampler`` logits."""
    draws = torch.distributions.Categorical(logits=sampler.detach()).sample((4000, 4))  # [G, 4, 3]
    rewards = toy.rewards[(draws * torch.tensor([9, 3, 1])).sum(dim=-1)]
    old_logp = torch.log_softmax(sampler.detach(), dim=1)[torch.arange(3), draws].sum(dim=-1)
    logits = toy.logits.detach().expand(4000, 3, 3).clone().requires_grad_()
    table = torch.log_softmax(logits, dim=2).unsqueeze(1).expand(4000, 4, 3, 3)
    logp = table.gather(3, draws.unsqueeze(-1)).squeeze(-1).sum(dim=-1)
    loss = run(name, logp, rewards, old_logp, old=old_logp if old else None, **settings)
    # groups without spread are dropped from the mean and have gradient 0: rescale to one group each
    return grad(loss.loss * loss.metrics["groups"], logits)


@pytest.mark.parametrize("stale", [False, True])
def test_reinforce_is_unbiased(stale):
    torch.manual_seed(1)
    toy = Toy(2)
    sampler = toy.logits + 0.3 * torch.randn(3, 3, dtype=torch.float64) if stale else toy.logits
    gradients = sampled_gradients(toy, sampler, "reinforce", old=stale)
    error = gradients.mean(dim=0) - toy.exact_gradient()
    standard_error = gradients.std(dim=0) / math.sqrt(len(gradients))
    assert (error.abs() < 3 * standard_error).all()
    assert standard_error.max() < 0.05  # tight enough to notice a wrong factor
    assert toy.exact_gradient().abs().max() > 0.2


def test_leave_one_out_lowers_the_variance():
    torch.manual_seed(3)
    toy = Toy(2)
    toy.rewards += 10.0
    baseline = sampled_gradients(toy, toy.logits, "reinforce", old=False).var(dim=0).sum()
    draws = torch.distributions.Categorical(logits=toy.logits.detach()).sample((4000, 4))
    rewards = toy.rewards[(draws * torch.tensor([9, 3, 1])).sum(dim=-1)]
    score = torch.nn.functional.one_hot(draws, 3) - torch.softmax(toy.logits.detach(), dim=1)
    plain = -(rewards[..., None, None] * score).mean(dim=1)
    assert baseline < plain.var(dim=0).sum() / 5


# --- members that the policy did not propose ------------------------------------------------------------------------


def train(name: str, steps: int, **settings) -> dict[str, float]:
    """Plain gradient descent on six independent positions whose policy is all but sure of 'aaaaaa'.

    The group: the policy's own four strings, a good one ('acccca', log p about −36) and a bad one that it did not
    propose. Returns log p of the good, the bad and the favourite string, and the probability that the group holds.
    """
    logits = torch.zeros(6, 5, dtype=torch.float64)
    logits[:, 0] = 9.0
    logits.requires_grad_()
    own = [[0] * 6, [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    strings = torch.tensor([*own, [0, 2, 2, 2, 2, 0], [3] * 6])
    rewards = torch.tensor([[0.0, 1.0, -1.0, 0.5, 10.0, -20.0]], dtype=torch.float64)
    score = lambda: torch.log_softmax(logits, dim=1)[torch.arange(6), strings].sum(dim=-1)[None]  # noqa: E731
    start = score().detach()
    for _ in range(steps):
        loss = run(name, score(), rewards, start, **settings).loss
        with torch.no_grad():
            logits -= 0.5 * grad(loss, logits)
    end = score().detach()[0]
    return {"good": end[4].item(), "bad": end[5].item(), "favourite": end[0].item(), "mass": end.exp().sum().item()}


def test_bare_mwer_cannot_raise_a_foreign_member():
    assert train("mwer", 300, correction="none", temperature=1.0, mixture=0.5)["good"] < -35
    # weights of the KL-regularised optimum alone fail as well: it is sure of one member and sees no alternative
    assert train("mwer", 300, correction="kl_optimum", temperature=1.0, mixture=1.0)["good"] < -30


RATIOS = {
    "temperature": 1.0,
    "mixture": 0.5,
    "clip": 0.2,
    "kl_weight": 0.0,
    "standardize": True,
    "std_floor": 0.1,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", {**RATIOS, "correction": "proposal"}),
        ("dpo", {"beta": 0.1, "rejected": "worst", "reference_free": False}),
    ],
)
def test_the_forms_for_samples_push_an_improbable_member_of_an_enumerated_group_further_down(name, settings):
    end = train(name, 20, **settings)
    assert end["bad"] < -57  # started at −54
    assert end["good"] < -31  # and the good one, at −36, hardly moved


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mwer", {"correction": "kl_optimum", "temperature": 1.0, "mixture": 0.1}),
        ("mwer", {"correction": "kl_optimum", "temperature": 1.0, "mixture": 0.9}),
        ("grpo", {**RATIOS, "correction": "kl_optimum"}),
        ("gspo", {**RATIOS, "correction": "kl_optimum"}),
        ("dpo", {"beta": 0.5, "rejected": "probable", "reference_free": True}),
        ("distill", {"temperature": 1.0}),
        ("self_training", {"label": "reward", "min_confidence": 0.0}),
    ],
)
def test_objectives_that_raise_a_foreign_member(name, settings):
    end = train(name, 300, **settings)
    assert end["good"] > -1.0
    assert end["favourite"] < -5.0
    assert end["bad"] > -60  # started at −54: no effort is spent on what is improbable anyway


def test_kl_optimum_mwer_gradient_does_not_depend_on_how_improbable_the_member_is():
    rewards = torch.tensor([[0.0, 30.0]], dtype=torch.float64)
    for improbable in (-40.0, -400.0, -4000.0):
        logp = torch.tensor([[-1.0, improbable]], dtype=torch.float64, requires_grad=True)
        out = run("mwer", logp, rewards, logp, correction="kl_optimum", temperature=1.0, mixture=0.5)
        torch.testing.assert_close(grad(out.loss, logp), torch.tensor([[7.5, -7.5]], dtype=torch.float64))
        bare = run("mwer", logp, rewards, logp, correction="none", temperature=1.0, mixture=0.5)
        assert grad(bare.loss, logp).abs().max() < 1e-14
