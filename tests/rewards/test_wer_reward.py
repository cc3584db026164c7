"""``reward=wer``: word errors by hand and against jiwer, entities, scripts without spaces, what it is not for."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import jiwer
import pytest
import torch

from nemo_llm_feedback.core.config import ProposalConfig, RunConfig, parse_run_config
from nemo_llm_feedback.core.config.rescoring import parse_rescoring_config
from nemo_llm_feedback.core.errors import ConfigError, RewardError
from nemo_llm_feedback.core.text import basic
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.rewards import as_reward, build_reward


def group(reference: str, *texts: str, terms: tuple[str, ...] = ()) -> HypothesisGroup:
    return HypothesisGroup("u", tuple(Hypothesis(t, ()) for t in texts), Context(terms=terms), (), reference)


def test_the_reward_is_minus_the_word_errors() -> None:
    found = build_reward("wer")([group("a soy latte", "a soy latte", "soy latte please", "")])
    assert found.values.tolist() == [[0.0, -2.0, -3.0]]
    assert found.parts["wer"].equal(found.values)
    assert found.with_reference(found.values - 7).equal(found.values), "it has no ASR term"


def test_word_errors_are_jiwers() -> None:
    rng = random.Random(0)
    draw = lambda: " ".join(rng.choices(["tea", "soy", "latte"], k=rng.randint(1, 7)))  # noqa: E731
    pairs = [(draw(), draw()) for _ in range(60)]
    found = build_reward("wer")([group(*pair) for pair in pairs]).values[:, 0]
    for (reference, text), value in zip(pairs, found.tolist(), strict=True):
        words = jiwer.process_words(reference, text)
        assert -value == words.substitutions + words.deletions + words.insertions


def test_scripts_without_spaces_count_characters() -> None:
    assert build_reward("wer")([group("我要拿铁", "我要那铁", "要")]).values.tolist() == [[-1.0, -3.0]]


def test_errors_on_listed_terms_count_as_often_as_the_weight_says() -> None:
    texts = ("a say latte now", "the soy latte now", "a soy big latte now", "a soy latte right now")
    found = build_reward("wer", entity_weight=3.0)([group("a soy latte now", *texts, terms=("Soy-Latte",))])
    # a word of the term, a word beside it, an insertion inside it, one outside
    assert found.parts["entity_errors"].tolist() == [[-1.0, 0.0, -1.0, 0.0]]
    assert found.values.tolist() == [[-3.0, -1.0, -3.0, -1.0]]
    with pytest.raises(RewardError, match="entity_weight=-1"):
        build_reward("wer", entity_weight=-1)


def test_a_row_without_text_cannot_be_judged() -> None:
    found = build_reward("wer")([group("", "tea", ""), group("tea", "tea")])
    assert found.values.isnan().tolist() == [[True, True], [False, True]]


def test_a_function_of_the_user_may_read_the_text() -> None:
    def right(texts: list[str], references: list[str], **columns: Any) -> list[float]:
        return [float(text == reference) for text, reference in zip(texts, references, strict=True)]

    assert as_reward(right)([group("tea", "tea", "soy")]).values.tolist() == [[1.0, 0.0]]


def test_one_switch_has_rows_with_text_learned_by_the_reward_and_asks_no_llm() -> None:
    config = parse_run_config({"reward": {"name": "wer"}, "objective": {"name": "mwer"}})
    assert config.labelled == "reward"
    assert not config.needs_llm
    assert not config.needs_context
    assert RunConfig().labelled == "supervised"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"reward": {"name": "wer"}, "feedback": {"labelled": "supervised"}},
            "leave feedback.labelled=supervised out",
        ),
        ({"reward": {"name": "wer"}, "feedback": {"use_text": False}}, "no text would be read"),
        ({"reward": {"name": "rules"}, "feedback": {"labelled": "reward"}}, "set reward=wer"),
        ({"reward": {"name": "wer", "trust": {"cloud": 1.0}}}, "reward.trust makes texts level by log p_ref"),
    ],
)
def test_contradictions_are_named(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_run_config({"context": {"description": "x"}, **sections})


def test_rescoring_has_no_text_to_compare_with() -> None:
    with pytest.raises(ConfigError, match="which rescoring does not have"):
        parse_rescoring_config({"reward": {"name": "wer"}})


def test_groups_that_are_judged_anew_are_judged_by_their_rows_texts() -> None:
    """The pool's groups are judged again with other weights; without their texts none could be judged."""
    proposer: Any = SimpleNamespace(config=ProposalConfig())
    reference: Any = SimpleNamespace(heads=[SimpleNamespace(vocabulary=None)])
    maker = NBestMaker(proposer, reference, normalize=basic, reward=build_reward("wer"))
    members = ((Hypothesis("a soy latte", (1,)), Hypothesis("a latte", (2,))),)
    made = NBestBatch(("u",), (Context(),), members, {"ctc": torch.tensor([[-3.0, -2.0]])}, {})
    assert maker.judged_anew(made, ["A soy latte."]).rewards["ctc"].tolist() == [[0.0, -1.0]]
    assert maker.judged_anew(made, []).rewards["ctc"].isnan().all()
