"""An LLM that turns NaN in the middle of a run: groups are counted, warned of, and stop the run past a limit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.llm import LLMScorer, load_llm
from nemo_llm_feedback.rewards import build_reward

COFFEE = Context("an order at a coffee shop", ("latte",))
SETTINGS: dict[str, dict[str, Any]] = {
    "llm": {"alpha": 1.0, "beta": 1.0},
    "entity": {},
    "judge": {"answers": ["y", "n"]},
}


def group(name: str, *texts: str) -> HypothesisGroup:
    members = tuple(Hypothesis(text, (n + 1,)) for n, text in enumerate(texts))
    return HypothesisGroup(name, members, COFFEE, (-1.0,) * len(texts))


@pytest.fixture
def llm(tmp_path: Path) -> LLMScorer:
    return load_llm(LLMConfig(model=str(make_tiny_llm(tmp_path)), quantization="none", device="cpu"))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_groups_without_a_score_are_counted_as_groups_and_stop_the_run_past_a_fifth(
    name: str, llm: LLMScorer, caplog: Any
) -> None:
    """Texts were counted: one utterance with 24 hypotheses weighed as much as 24 of one."""
    reward: Any = build_reward(name, scorer=llm, **SETTINGS[name])
    good = [group(f"g{n}", f"a latte {n}", f"a cup {n}") for n in range(8)]
    assert reward(good).values.isfinite().all()
    llm.model.model.norm.weight.data.fill_(math.nan)
    assert reward(good).values.isfinite().all(), "these are in the cache"
    many = [f"order number {n}" for n in range(24)]
    values = reward([group("a", *many), group("b", "tea")]).values
    assert values[0].isnan().all()
    assert values[1].isnan().all()
    assert (reward.failed.num_groups, reward.failed.num_failed) == (18, 2)
    assert llm.num_broken >= 25
    assert "2 of 2 groups got no reward from the LLM (2 of 18 so far)" in caplog.text
    reward([group("c", "milk", "a latte 1")])  # 3 of 19; one of the members is known
    with pytest.raises(RewardError, match=r"failed 5 of the last 21 groups, more than a share of 0\.2"):
        reward([group("d", "oat milk"), group("e", "soy")])


def test_a_text_that_the_llm_cannot_read_is_no_failure(llm: LLMScorer) -> None:
    reward: Any = build_reward("llm", scorer=llm, alpha=1.0, beta=1.0)
    for n in range(20):
        values = reward([group("a", "a latte", f"latte {n} " * 400)]).values[0]
        assert math.isfinite(values[0])
        assert math.isnan(values[1])
    assert reward.failed.num_failed == 0
