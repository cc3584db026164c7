"""Fault 14: a hybrid asks its reward once; the values beside another head's reference follow from that judgement."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup, RewardOutput
from nemo_llm_feedback.llm import TextScore
from nemo_llm_feedback.rewards import CallableReward, Component, CompositeReward, LLMReward, Reward, build_reward

NAN, INF = math.nan, math.inf
REF = [[-0.1, -17.25, -INF, -3.7], [-2.0 / 3, -5.5], [-INF, -8.0, -1e-3]]
OTHER = [[-11.3, -INF, -4.9, -0.7], [-1.0 / 7, -1.0 / 7], [-2.2, NAN, -9.9]]


class CountingScorer:
    """A fake LLM that counts what it is asked; NaN for texts that contain 'nan'."""

    identity, uses_context = "counting", True

    def __init__(self) -> None:
        self.num_texts = 0

    def score(self, requests):
        self.num_texts += sum(len(texts) for _, texts in requests)
        return [
            [TextScore(NAN if "nan" in t else -(len(t) + 1) / 3, len(t) + 1) for t in texts] for _, texts in requests
        ]


def groups(ref: list[list[float]]) -> list[HypothesisGroup]:
    texts = [["a latte", "a large latte", "nan", ""], ["one two", "one"], ["tea tea", "nan tea", "a tea please"]]
    ref = [torch.tensor(row).tolist() for row in ref]  # float32 numbers, as the likelihood gives them
    return [
        HypothesisGroup(f"u{n}", tuple(Hypothesis(t, (), "samples") for t in row), Context("x", ("latte",)), tuple(r))
        for n, (row, r) in enumerate(zip(texts, ref, strict=True))
    ]


def padded(ref: list[list[float]], fill: float) -> Tensor:
    return torch.tensor([[*row, *[fill] * (4 - len(row))] for row in ref])


def rewards() -> dict[str, Reward]:
    llm = LLMReward(CountingScorer(), alpha=0.1, beta=0.3)
    plain = LLMReward(CountingScorer(), alpha=1.0, beta=0.0, asr_weight=0.0)
    asr, length, edits = build_reward("asr"), build_reward("length"), build_reward("edit_distance")
    rest = [Component(asr, 0.7), Component(length, 0.3)]
    return {
        "llm": llm,
        "llm_alpha_0": LLMReward(CountingScorer(), alpha=0.0, beta=0.3, asr_weight=0.7, normalize="word"),
        "llm_without_asr": plain,
        "asr": asr,
        "edit_distance": edits,
        "rules": build_reward("rules"),
        **{kind: CompositeReward([Component(plain, 0.1, kind), *rest]) for kind in ("none", "center", "z", "rank")},
        "normalised_asr": CompositeReward([Component(plain, 0.1), Component(asr, 0.7, "z"), Component(edits, 0.3)]),
        "nested": CompositeReward([Component(llm, 0.1, "rank"), Component(CompositeReward(rest), 3.0, "z")]),
    }


@pytest.mark.parametrize("name", list(rewards()))
def test_hybrids_ask_their_reward_once_and_get_each_heads_values_to_the_digit(name: str) -> None:
    reward = rewards()[name]
    output = reward(groups(REF))
    for ref in (OTHER, REF):
        expected = reward(groups(ref)).values
        for fill in (-INF, NAN, 0.0):
            assert torch.equal(output.with_reference(padded(ref, fill)).nan_to_num(7.25), expected.nan_to_num(7.25))
            assert output.with_reference(padded(ref, fill)).dtype == expected.dtype


def test_nothing_is_judged_again() -> None:
    scorer, calls = CountingScorer(), []

    def function(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return [1.0] * len(texts)

    llm = LLMReward(scorer, alpha=1.0, beta=0.0)
    reward = CompositeReward([Component(llm, 1.0), Component(CallableReward(function), 1.0)])
    output = reward(groups(REF))
    asked = scorer.num_texts
    output.with_reference(padded(OTHER, -INF))
    assert (scorer.num_texts, calls) == (asked, [9])


def test_rewards_without_an_asr_term_return_their_values_unchanged() -> None:
    for reward in (build_reward("length"), CallableReward(lambda texts: [1.0] * len(texts))):
        output = reward([replace(group, ref_logp=()) for group in groups(REF)])
        assert output.with_reference(padded(OTHER, -INF)) is output.values
    values = torch.zeros(2, 3)
    assert RewardOutput(values).with_reference(torch.ones(2, 3)) is values
