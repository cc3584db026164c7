"""Trust in other recognisers: the share that they hear, the largest gap, the bonus, the members left out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from nemo_llm_feedback.core.config import RewardConfig
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.hypotheses.maker import judged
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.reward_scale import component_deviations
from nemo_llm_feedback.hypotheses.trust import (
    Contest,
    SourceTrust,
    Trust,
    bonuses,
    contests,
    rivals,
    source_trust,
    trusted_sources,
)

OTHERS = (6.0, 7.0, 8.0, 9.0, 11.0, 12.0, 13.0, 14.0)


def _member(length: int, *sources: str) -> Hypothesis:
    return Hypothesis("a" * length, (1,) * length, sources[0], tuple(sources[1:]))


def test_a_source_that_is_always_right_is_trusted_as_far_as_any_text_is_away() -> None:
    assert source_trust([Contest(1.0, OTHERS)] * 20) == SourceTrust(heard=1.0, trust=14.0, utterances=20)


def test_a_source_that_is_right_half_of_the_time_is_trusted_as_far_as_its_right_texts() -> None:
    """Its made-up texts win half of their contests: S = ¾, π = ½. At 6 nats ½·⅛ of the kept texts would be made up."""
    found = source_trust([Contest(1.0, OTHERS), Contest(10.0, OTHERS)] * 20)
    assert found == SourceTrust(heard=0.5, trust=1.0, utterances=40)


@pytest.mark.parametrize("seed", range(20))
def test_a_source_that_writes_fluent_nonsense_is_not_trusted(seed: int) -> None:
    """The transcripts of other rows: on this audio they are no better than any of the source's texts."""
    gaps = np.random.default_rng(seed).gamma(4.0, 2.0, size=(64, 9))
    assert source_trust([Contest(row[0], tuple(row[1:])) for row in gaps.tolist()]).trust == 0.0


def test_few_texts_are_no_evidence() -> None:
    """Of two texts both win, as a made-up source's do in one case of nine each."""
    assert source_trust([Contest(1.0, OTHERS)] * 2) == SourceTrust(0.0, 0.0, 2)
    assert source_trust([]) == SourceTrust(0.0, 0.0, 0)


def test_a_heard_text_is_level_with_our_best_and_one_too_far_away_is_left_out() -> None:
    group = [_member(5, "greedy"), _member(6, "beam"), _member(10, "cloud"), _member(8, "cloud"), _member(10, "other")]
    logp = [-12.0, -10.0, -70.0, -100.0, -11.0]
    trusted = trusted_sources(group, logp, {"cloud": 6.0})
    # 60 nats on 10 labels are 6 a label, 90 on 8 more; the source that nothing is known of has no trust at all.
    assert trusted == [(), (), ("cloud",), None, None]
    assert bonuses(group[:3], logp[:3], [(), (), ("cloud",)]) == [0.0, 0.0, 60.0]
    assert trusted_sources(group, logp, {"cloud": 0.0, "other": 0.1})[2:] == [None, None, ("other",)]


def test_texts_of_one_source_keep_their_distance_and_ours_stay_whoever_wrote_them_too() -> None:
    group = [_member(5, "greedy"), _member(10, "cloud"), _member(10, "cloud"), _member(5, "beam", "cloud", "liar")]
    logp = [-10.0, -50.0, -55.0, -30.0]
    trusted = trusted_sources(group, logp, {"cloud": 9.0})
    assert trusted == [(), ("cloud",), ("cloud",), ("cloud",)]
    # The best text of the source is the one that our beam found, too; all are raised by as much as it.
    assert bonuses(group, logp, [("cloud",) if n else () for n in range(4)]) == [0.0, 20.0, 20.0, 20.0]
    assert trusted_sources(group, logp, {"cloud": 0.0})[3] == ()


def test_rivals_are_the_nearest_in_length_of_other_utterances_and_contests_are_per_label() -> None:
    texts = [(1,) * 4, (2,) * 5, (3,) * 9, (1,) * 4]
    rows = tuple((Hypothesis("o", (7,), "greedy"), Hypothesis("t", text, "cloud")) for text in texts)
    ref = torch.tensor([[-2.0, -10.0]] * 4)
    nbest = NBestBatch(tuple("abcd"), (Context(),) * 4, rows, {"ctc": ref}, {"ctc": ref})
    found = rivals(nbest, head="ctc", count=1)
    assert found == {"cloud": [[texts[1]], [texts[0]], [texts[1]], [texts[1]]]}
    scores = [dict.fromkeys(row, -27.0) for row in found["cloud"]]
    assert contests(nbest, found, scores, head="ctc")["cloud"] == [
        Contest(2.0, (5.0,)),
        Contest(1.6, (6.25,)),
        Contest(8 / 9, (5.0,)),
        Contest(2.0, (5.0,)),
    ]


def _reward(groups: Sequence[HypothesisGroup]) -> RewardOutput:
    """asr_weight 0.5, and a judge that cannot judge texts of one letter."""
    asr = pad_groups([list(group.ref_logp) for group in groups])
    judge = pad_groups([[math.nan if len(t) == 1 else 3.0 for t in group.texts] for group in groups])
    return RewardOutput(0.5 * asr + judge, {"asr": asr}, lambda logp: 0.5 * logp + judge)


def test_the_reward_has_a_part_trust_for_every_head_by_its_own_scores() -> None:
    members = ((_member(2, "greedy"), _member(4, "liar"), _member(4, "cloud")), (_member(1, "greedy"),))
    ref = {
        "ctc": torch.tensor([[-10.0, -11.0, -30.0], [-5.0, -math.inf, -math.inf]]),
        "rnnt": torch.tensor([[-20.0, -11.0, -26.0], [-5.0, -math.inf, -math.inf]]),
    }
    found = judged("ab", (Context(),) * 2, members, ref, _reward, Trust({"cloud": 5.0}, weight=0.5))  # type: ignore[arg-type]
    assert found.sources == [(("greedy",), ("cloud",)), (("greedy",),)]
    nan = math.nan
    torch.testing.assert_close(found.parts["trust"], torch.tensor([[0.0, 20.0], [nan, nan]]), equal_nan=True)
    torch.testing.assert_close(found.rewards["ctc"], torch.tensor([[-2.0, -2.0], [nan, nan]]), equal_nan=True)
    torch.testing.assert_close(found.rewards["rnnt"], torch.tensor([[-7.0, -7.0], [nan, nan]]), equal_nan=True)
    torch.testing.assert_close(found.ref_logp["ctc"], torch.tensor([[-10.0, -30.0], [-5.0, -math.inf]]))


def test_without_trust_members_of_others_are_as_any() -> None:
    assert Trust.of(RewardConfig()) is None
    assert Trust.of(RewardConfig(trust={"cloud": 2.0}, asr_weight=0.5)) == Trust({"cloud": 2.0}, 0.5)
    members = ((_member(2, "greedy"), _member(4, "cloud")),)
    found = judged("a", (Context(),), members, {"ctc": torch.tensor([[-1.0, -99.0]])}, _reward)  # type: ignore[arg-type]
    assert "trust" not in found.parts
    assert found.sizes == [2]


def test_the_spread_that_sets_alpha_is_that_of_our_own_members() -> None:
    members = ((_member(2, "greedy"), _member(3, "beam", "cloud"), _member(4, "cloud")),)
    scores = torch.tensor([[-10.0, -14.0, -90.0]])
    nbest = NBestBatch(("a",), (Context(),), members, {"ctc": scores}, {"ctc": scores}, parts={"asr": scores})
    assert component_deviations(nbest) == {"asr": [2.0]}
