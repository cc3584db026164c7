"""Other recognisers' texts at inference: level with our best where they are trusted, left out where not."""

from __future__ import annotations

from nemo_llm_feedback.core.config import RewardConfig
from nemo_llm_feedback.core.config.rescoring import RescoringConfig
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.hypotheses.trust import Trust
from nemo_llm_feedback.rescoring.scoring import Rescorer


def _texts(rescorer: Rescorer) -> list[tuple[str, float, float | None]]:
    """Text, score and part ``trust`` of the group's members, best first, where log p(y|x) alone orders them."""
    members = (
        Hypothesis("tea", (1,) * 5, "beam"),
        Hypothesis("a mocha", (2,) * 10, "cloud"),
        Hypothesis("a liar", (3,) * 10, "liar"),
    )
    group = HypothesisGroup("u", members, Context(), (-10.0, -70.0, -40.0))
    (ranked,) = rescorer._ordered([rescorer._trusted(group)])
    return [(member.text, member.score, member.parts.get("trust")) for member in ranked]


def test_rescoring_judges_other_recognisers_as_training_does() -> None:
    settings = RescoringConfig(reward=None)
    assert [text for text, _, _ in _texts(Rescorer(None, settings=settings))] == ["tea", "a liar", "a mocha"]
    trusted = _texts(Rescorer(None, settings=settings, trust=Trust({"cloud": 6.0}, weight=0.5)))
    assert trusted == [("tea", -10.0, 0.0), ("a mocha", -40.0, 60.0)]


def test_rescoring_takes_the_trust_of_its_settings() -> None:
    settings = RescoringConfig(reward=RewardConfig(trust={"cloud": 6.0}))
    assert Rescorer(None, settings=settings).trust == Trust({"cloud": 6.0})
    assert Rescorer(None, settings=RescoringConfig(reward=RewardConfig())).trust is None
