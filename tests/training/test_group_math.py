"""Which groups count, baselines, and arithmetic that stays finite."""

from __future__ import annotations

import math

import torch

from nemo_llm_feedback.training.group_math import bounded_exp, group_kl, leave_one_out, reward_spread, signal


def test_leave_one_out_excludes_the_member_itself():
    rewards = torch.tensor([[1.0, 4.0, 10.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(leave_one_out(rewards, mask), torch.tensor([[1 - 7.0, 4 - 5.5, 10 - 2.5, 0.0]]))
    assert (leave_one_out(rewards, torch.tensor([[True, False, False, False]])) == 0).all()


def test_signal():
    nan, inf = math.nan, math.inf
    rows = [
        ([1.0, 2.0, nan], [1, 1, 0]),  # the NaN is padding
        ([1.0, 1.0, 1.0], [1, 1, 1]),  # no spread
        ([1.0, nan, 3.0], [1, 1, 1]),  # one not judged
        ([5.0, nan, nan], [1, 0, 0]),  # alone
        ([0.0, 1.0, -inf], [1, 1, 1]),
        ([0.0, 0.5, 9.0], [1, 1, 0]),  # spread exactly 0.5
    ]
    rewards, mask = torch.tensor([r for r, _ in rows]), torch.tensor([m for _, m in rows]).bool()
    assert signal(rewards, mask, min_spread=0.0).tolist() == [True, False, False, False, False, True]
    assert signal(rewards, mask, min_spread=0.5).tolist() == [True, False, False, False, False, False]
    assert signal(rewards, torch.zeros_like(mask), min_spread=0.0).tolist() == [False] * 6


def test_bounded_exp_is_exp_and_then_its_tangent():
    x = torch.tensor([-100.0, 0.0, 9.9, 15.0], dtype=torch.float64, requires_grad=True)
    y = bounded_exp(x)
    e10 = math.exp(10)
    expected = torch.tensor([math.exp(-100), 1.0, math.exp(9.9), e10 * 6], dtype=torch.float64)
    torch.testing.assert_close(y, expected)
    slopes = torch.tensor([math.exp(-100), 1.0, math.exp(9.9), e10], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slopes)


def test_reward_spread_looks_at_judged_members_only():
    rewards = torch.tensor([[1.0, 5.0, math.nan], [2.0, 9.0, -9.0], [math.nan, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, False, False]])
    assert reward_spread(rewards, mask).tolist() == [4.0, 0.0, 0.0]


def test_group_kl_of_an_empty_group_is_zero():
    scores = torch.tensor([[1.0, 2.0], [math.nan, -math.inf]])
    mask = torch.tensor([[True, True], [False, False]])
    assert group_kl(scores, scores.flip(1), mask)[1] == 0
    p = torch.softmax(torch.tensor([1.0, 2.0]), dim=0)
    torch.testing.assert_close(group_kl(scores, scores.flip(1), mask)[0], p[1] - p[0])
