"""The forms of the reward: judge, correction, entity, rules, composites; and how settings become rewards."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig, RunConfig, parse_run_config
from nemo_llm_feedback.core.errors import LLMError, RewardError
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.llm import load_llm
from nemo_llm_feedback.llm.prompts import MARK, Template
from nemo_llm_feedback.llm.queries import AnswerScorer, score_terms
from nemo_llm_feedback.rewards import (
    CallableReward,
    Component,
    CompositeReward,
    CorrectionReward,
    EntityReward,
    JudgeReward,
    ScoreCache,
    build_reward,
    reward_faults,
    reward_from_config,
)
from nemo_llm_feedback.rewards.composite import normalized

NAN = math.nan
CONTEXT = Context("an order at a coffee shop", ("oat milk", "latte"))
JUDGE_TEMPLATE = Template("An order with {terms}.\n{hypothesis}\nRight? Say y or n:", "judge")


def group(*texts: str, ref: Sequence[float] | None = None, context: Context = CONTEXT, sources: str = "") -> Any:
    """A group of these texts; ``sources`` has a letter a member: g for greedy, else a sample."""
    scores = tuple(-1.0 - n for n in range(len(texts))) if ref is None else tuple(ref)
    names = ["greedy" if letter == "g" else "samples" for letter in sources] or ["beam"] * len(texts)
    members = tuple(Hypothesis(text, (n,), name) for n, (text, name) in enumerate(zip(texts, names, strict=True)))
    return HypothesisGroup("u", members, context, scores)


def run_config(reward: dict[str, Any], **sections: Any) -> RunConfig:
    llm = {"llm": {"model": "some/llm"}, "context": {"description": "a test"}}
    return parse_run_config({"reward": reward, **llm, **sections})


def assert_rows(tensor: torch.Tensor, rows: list[list[float]], **tolerance: float) -> None:
    torch.testing.assert_close(tensor, torch.tensor(rows, dtype=torch.float32), equal_nan=True, **tolerance)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = make_tiny_llm(tmp_path_factory.mktemp("forms"))
    return load_llm(LLMConfig(str(folder), quantization="none", device="cpu"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = make_tiny_llm(tmp_path_factory.mktemp("forms_chat"), chat=True, architecture="qwen2")
    return load_llm(LLMConfig(str(folder), quantization="none", device="cpu"))


# ---------------------------------------------------------------- judge


class FakeJudge:
    """P(yes) grows with the length of the text; the answers' probabilities add up to ``mass``."""

    identity, uses_context = "fake", True

    def __init__(self, answers=("yes", "no"), mass=0.8):
        self.answers, self.mass, self.asked = answers, mass, 0

    def __call__(self, requests):
        self.asked += sum(len(texts) for _, texts in requests)
        return [[self.one(text) for text in texts] for _, texts in requests]

    def one(self, text):
        if "nan" in text:
            return (NAN,) * len(self.answers)
        weights = [1.0 + len(text) * (n == 0) for n in range(len(self.answers))]
        return tuple(math.log(self.mass * w / sum(weights)) for w in weights)


class Judge(JudgeReward):
    """Takes what asks in place of the LLM."""

    def _answer_scorer(self, scorer, use, template, answers):
        return scorer


def test_judgements_follow_their_formulas_and_the_mass_is_a_part():
    out = Judge(FakeJudge())([group("aaa", "nan", "")])
    assert_rows(out.values, [[4 / 5, NAN, 1 / 2]])
    assert_rows(out.parts["judge_mass"], [[0.8, NAN, 0.8]])
    assert_rows(Judge(FakeJudge(), mode="log_odds")([group("aaa", "")]).values, [[math.log(4), 0.0]])
    rating = Judge(FakeJudge(("5", "2", "1")), mode="rating")([group("aaa", "")])
    assert_rows(rating.values, [[(5 * 4 + 2 + 1) / 6, 8 / 3]])
    assert torch.equal(rating.parts["judge"], rating.values)


def test_judgements_are_cached_for_every_mode_and_little_mass_is_a_warning(caplog):
    cache, judge = ScoreCache(), FakeJudge(mass=0.1)
    with caplog.at_level(logging.WARNING):
        for mode in ("yes_no", "log_odds", "yes_no"):
            Judge(judge, mode=mode, cache=cache)([group("a", "b"), group("a", "c")])
    assert judge.asked == 3
    assert "only 10.0 %" in caplog.text
    assert "'yes', 'no'" in caplog.text


@pytest.mark.parametrize(
    ("answers", "mode", "match"),
    [(("a", "b", "c"), "yes_no", "two answers"), (("a", "b"), "rating", "numbers"), (("a", "b"), "score", "mode=")],
)
def test_judges_whose_answers_do_not_fit_the_mode_are_refused(answers, mode, match):
    with pytest.raises(RewardError, match=match):
        Judge(FakeJudge(answers), mode=mode)


@pytest.mark.parametrize("kind", ["scorer", "chat"])
def test_answers_have_the_probabilities_of_a_plain_forward(kind, request):
    llm = request.getfixturevalue(kind)
    judge = AnswerScorer(llm, template=JUDGE_TEMPLATE, answers=["y", "n", "?"])
    texts = ["a latte with oat milk", "a latte", ""]
    found = judge([(CONTEXT, texts), (Context("another"), texts[:1])])
    asked = [(CONTEXT, text) for text in texts] + [(Context("another"), texts[0])]
    for (context, text), logps in zip(asked, found[0] + found[1], strict=True):
        begin, whole = llm.encoder.frame(JUDGE_TEMPLATE.render_question(context))
        before, after = whole.split(MARK)
        ids = [*begin, *llm.encoder.ids(before), *llm.encoder.encode_text(text)[:-1], *llm.encoder.ids(after)]
        with torch.no_grad():
            expected = llm.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        picked = [expected[llm.encoder.ids(answer)[0]].item() for answer in "yn?"]
        assert logps == pytest.approx(picked, abs=1e-4)
    if kind == "chat":
        assert "<|im_start|>assistant\n" in after


def test_answers_that_are_not_one_token_are_refused_with_their_pieces(scorer, tmp_path):
    with pytest.raises(LLMError, match=r"' yes' \[\d+, .*\], 'n' \[\d+\].*reward\.settings\.answers"):
        build_reward("judge", scorer=scorer, answers=[" yes", "n"])
    with pytest.raises(LLMError, match="at least two different"):
        AnswerScorer(scorer, template=JUDGE_TEMPLATE, answers=["y", "y"])
    with pytest.raises(LLMError, match="at least two"):
        AnswerScorer(scorer, template=JUDGE_TEMPLATE, answers=["y"])
    # The tiny tokenizer has no token " 1", but it has "1": the default takes what is one token.
    assert build_reward("judge", scorer=scorer, mode="rating")([group("a latte")]).values.isfinite().all()
    file = tmp_path / "judge.txt"
    file.write_text("{hypothesis}", encoding="utf-8")
    with pytest.raises(LLMError, match=r"reward\.settings\.template=.*question"):
        build_reward("judge", scorer=scorer, template=str(file))


def test_control_tokens_in_a_judged_text_stay_text(chat):
    judge = AnswerScorer(chat, template=JUDGE_TEMPLATE, answers=["y", "n"])
    head, tail = chat.encoder.fit(Context("a <|im_end|> test", ("\ue000",)), judge._halves)
    controls = {i for i, t in chat.encoder._tokenizer.added_tokens_decoder.items() if t.content == "<|im_end|>"}
    assert not controls & set(head)
    assert len(controls & set(tail)) == 1  # the chat template's own


# ---------------------------------------------------------------- correction


class FakeCorrector:
    identity, uses_context = "fake", True

    def __init__(self):
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, contexts, nbest):
        self.asked += [tuple(texts) for texts in nbest]
        return [{"none": None, "dots": " ...", "zh": "我要拿铁"}.get(texts[-1], "A large Latte.") for texts in nbest]


def test_correction_counts_words_under_the_runs_normalisation_and_unusable_answers(caplog):
    corrector = FakeCorrector()
    reward = CorrectionReward(corrector)
    groups = [group("a large latte", "large tea"), group("x", "none"), group("y", "dots"), group("我要那铁", "zh")]
    with caplog.at_level(logging.WARNING):
        assert_rows(reward(groups).values, [[0, -2], [NAN, NAN], [NAN, NAN], [-1, -4 - 0.0]])
    assert reward.num_unusable == 2
    assert caplog.text.count("unusable") == 1


def test_correction_lists_the_nbest_by_score_and_asks_once_a_group():
    corrector = FakeCorrector()
    reward = CorrectionReward(corrector)
    first = reward([group("b", "a", "b", ref=[-3.0, -1.0, -3.0])])
    assert corrector.asked == [("a", "b")]
    assert torch.equal(reward([group("b", "a", "b", ref=[-3.0, -1.0, -3.0])]).values, first.values)
    assert len(corrector.asked) == 1
    reward([group("b", "a", ref=[])])
    assert corrector.asked[1:] == [("b", "a")]


# ---------------------------------------------------------------- entity


def test_term_scores_split_the_plain_log_probability(scorer):
    texts = ["a latte with oat milk", "a latter", "oat milk", "", "<s> latte </s>"]
    scores = score_terms(scorer, [(CONTEXT, CONTEXT.terms, texts)])[0]
    plain = scorer.score([(CONTEXT, texts)])[0]
    prompt = scorer.encoder.encode_prompt(CONTEXT)
    for text, score, whole in zip(texts, scores, plain, strict=True):
        assert score.whole.logp == pytest.approx(whole.logp, abs=1e-4)
        ids, spans, shown = scorer.encoder.text_spans(text)
        assert ids == scorer.encoder.encode_text(text)
        with torch.no_grad():
            logp = scorer.model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        inside = [
            logp[len(prompt) + n - 1, ids[n]].item()
            for n, (start, end) in enumerate(spans)
            if any(start < at + len(t) and at < end for t in CONTEXT.terms if (at := f"{shown} ".find(f"{t} ")) >= 0)
        ]
        assert score.inside.num_tokens == len(inside)
        assert score.inside.logp == pytest.approx(sum(inside), abs=1e-4)
    assert [score.inside.num_tokens > 0 for score in scores] == [True, False, True, False, True]


def test_entity_weighs_the_terms_tokens(scorer):
    members = group("a latte", "a letter")
    plain = [score.logp for score in scorer.score([(CONTEXT, members.texts)])[0]]
    inside = [score.inside.logp for score in score_terms(scorer, [(CONTEXT, CONTEXT.terms, members.texts)])[0]]
    bare = score_terms(scorer, [(Context(CONTEXT.description), CONTEXT.terms, members.texts)])[0]
    out = EntityReward(scorer, weight=3.0, relative=False)([members])
    assert_rows(out.values, [[plain[0] + 2 * inside[0], plain[1]]], atol=1e-3, rtol=0)
    out = EntityReward(scorer, weight=3.0)([members])
    assert_rows(out.parts["entity_terms"], [[inside[0] - bare[0].inside.logp, 0.0]], atol=1e-3, rtol=0)
    assert_rows(out.values, [[plain[0] + 2 * (inside[0] - bare[0].inside.logp), plain[1]]], atol=1e-3, rtol=0)
    assert_rows(EntityReward(scorer, weight=1.0)([members]).values, [plain], atol=1e-3, rtol=0)
    with pytest.raises(RewardError, match="weight"):
        EntityReward(scorer, weight=-1.0)
    with pytest.raises(RewardError, match="no context"):
        EntityReward(scorer)([group("a", context=Context())])


@pytest.mark.parametrize("relative", [True, False])
def test_entity_shared_price_leaves_the_choice_among_terms_to_the_recogniser(scorer, relative):
    members = group("a latte", "a oat milk", "a latte with latte", "a letter")
    each = EntityReward(scorer, weight=3.0, relative=relative)([members])
    out = EntityReward(scorer, weight=3.0, relative=relative, shared_price=True)([members])
    texts = [*members.texts, *CONTEXT.terms]
    scores = score_terms(scorer, [(CONTEXT, CONTEXT.terms, texts)])[0]
    bare = score_terms(scorer, [(Context(CONTEXT.description), CONTEXT.terms, texts)])[0]
    alone = zip(scores[len(members.texts) :], bare[len(members.texts) :], strict=True)
    worth = [
        one.inside.logp + 2 * (one.inside.logp - (without.inside.logp if relative else 0.0)) for one, without in alone
    ]
    price = sum(worth) / len(worth)
    counted = [n * price for n in (1, 1, 2, 0)]
    outside = [one.whole.logp - one.inside.logp for one in scores[: len(members.texts)]]
    assert_rows(out.values, [[o + c for o, c in zip(outside, counted, strict=True)]], atol=1e-3, rtol=0)
    assert_rows(out.parts["entity_terms"], [counted], atol=1e-3, rtol=0)
    apart = each.values[0, 0] - each.values[0, 1]  # by their own tokens the two names differ, by the shared price not
    assert abs(apart - (outside[0] - outside[1])) > 0.1
    assert out.values[0, 0] - out.values[0, 1] == pytest.approx(outside[0] - outside[1], abs=1e-3)


def test_entity_shared_price_without_terms_is_the_plain_score(scorer):
    members = group("a latte", "a letter", context=Context("orders at a coffee bar"))
    plain = [score.logp for score in scorer.score([(members.context, members.texts)])[0]]
    assert_rows(EntityReward(scorer, shared_price=True)([members]).values, [plain], atol=1e-3, rtol=0)


def test_entity_rules():
    context = Context(terms=("cappuccino", "oat milk", "Latte", "tea", "拿铁"))
    members = group(
        "a capachino with oak milk", "a cappuccino with oat milk", "a latte latte tea", "我要拿铁",
        context=context, sources="gsss",
    )  # fmt: skip
    assert_rows(build_reward("entity_hits")([members]).values, [[0, 2, 2, 1]])
    assert_rows(build_reward("entity_false_alarms")([members]).values, [[0, 0, -2, -1]])
    assert_rows(build_reward("entity_false_alarms", min_likeness=99.0)([members]).values, [[0, -2, -2, -1]])


# ---------------------------------------------------------------- rules and functions


def test_rules_of_groups():
    members = group("a b c", "", "a x", "a b c d", sources="sgss")
    assert_rows(build_reward("empty")([members]).values, [[0, -1, 0, 0]])
    assert_rows(build_reward("edit_distance")([members]).values, [[-3, 0, -2, -4]])
    sampled = group("a b c", "a b", "z", ref=[-3.0, -1.0, -2.0], sources="sss")
    assert_rows(build_reward("edit_distance")([sampled]).values, [[-1, 0, -2]])
    assert_rows(build_reward("edit_distance")([group("我要拿铁", "我拿铁", sources="gs")]).values, [[0, -1]])
    assert_rows(build_reward("asr")([group("a", "b", ref=[-1.5, -math.inf])]).values, [[-1.5, NAN]])
    with pytest.raises(RewardError, match="asr_weight=0"):
        build_reward("asr")([group("a", ref=[])])
    out = build_reward("rules", repetition=2.0, edit_distance=0.0)([group("no no", "")])
    assert_rows(out.values, [[-2, -8]])
    assert list(out.parts) == ["repetition", "empty"]
    with pytest.raises(RewardError, match="not all 0"):
        build_reward("rules", repetition=0.0, empty=0.0, edit_distance=0.0)


def test_functions_of_trls_form():
    seen = {}

    def reward_func(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts)
        return [None if text == "b" else float(len(text)) for text in completions]

    assert_rows(CallableReward(reward_func)([group("aa", "b")]).values, [[2, NAN]])
    assert seen["prompts"] == ["The following is a transcript of an order at a coffee shop.\n"
                               "Terms that may occur: oat milk, latte.\n"] * 2  # fmt: skip
    assert seen["completion_ids"] == [[0], [1]]
    assert_rows(CallableReward(lambda completions, **more: [1.0] * len(completions))([group("a")]).values, [[1]])
    assert_rows(CallableReward(lambda completions, terms: map(len, terms))([group("a")]).values, [[2]])
    with pytest.raises(RewardError, match="needs gold, which is not offered"):
        CallableReward(lambda completions, gold: [1.0])


# ---------------------------------------------------------------- composites


def test_group_normalisations():
    values = torch.tensor([[1.0, 3.0, NAN, 5.0, 5.0], [2.0, NAN, NAN, NAN, NAN], [7.0, 7.0, NAN, NAN, NAN]])
    mask = values.isfinite()
    assert_rows(normalized(values, mask, kind="none"), [[1, 3, 0, 5, 5], [2, 0, 0, 0, 0], [7, 7, 0, 0, 0]])
    assert_rows(normalized(values, mask, kind="center")[:1], [[-2.5, -0.5, 0, 1.5, 1.5]])
    std = math.sqrt((6.25 + 0.25 + 2.25 + 2.25) / 4)
    assert_rows(normalized(values, mask, kind="z")[:1], [[-2.5 / std, -0.5 / std, 0, 1.5 / std, 1.5 / std]])
    third = 1 / 3
    assert_rows(normalized(values, mask, kind="rank")[:1], [[-0.5, third - 0.5, 0, 2.5 / 3 - 0.5, 2.5 / 3 - 0.5]])
    for kind in ("center", "z", "rank"):
        assert normalized(values, mask, kind=kind)[1:].abs().max() == 0


def test_a_composite_is_the_weighted_sum_and_nan_of_one_is_nan_of_the_member():
    def table(name, rows):
        flat = [value for row in rows for value in row]
        return CallableReward(lambda texts: flat[: len(texts)], name=name)

    one, two = table("one", [[1, None, 3, 9]]), table("two", [[10, 20, 20, None]])
    out = CompositeReward([Component(one, 2.0), Component(two, -1.0, "z"), Component(two, 0.0)])([group(*"abcd")])
    # The z of `two` is over the two members that both can judge.
    assert_rows(out.values, [[2 + 1, NAN, 6 - 1, NAN]])
    assert list(out.parts) == ["one", "two", "two#2"]
    assert_rows(out.parts["two"], [[10, NAN, 20, NAN]])
    with pytest.raises(RewardError, match="not all 0"):
        CompositeReward([Component(one, 0.0)])
    with pytest.raises(RewardError, match="normalize='std'"):
        CompositeReward([Component(one, 1.0, "std")])


def test_the_one_parameterisation_is_a_composite(scorer):
    items = [{"name": "llm", "weight": 0.5}, {"name": "asr", "weight": 2.0}, {"name": "length", "weight": 3.0}]
    groups = [group("a latte", "oat milk please"), group("", "x")]
    composite = reward_from_config(run_config({"name": "composite", "settings": {"components": items}}), scorer)
    plain = reward_from_config(run_config({"name": "llm", "alpha": 0.5, "asr_weight": 2.0, "beta": 3.0}), scorer)
    torch.testing.assert_close(composite(groups).values, plain(groups).values)
    assert composite(groups).parts.keys() == plain(groups).parts.keys() == {"llm", "asr", "length"}
    assert 0.5 <= composite.hit_rate < 1


# ---------------------------------------------------------------- from settings


@pytest.mark.parametrize("name", ["judge", "correction", "entity", "rules"])
def test_every_form_gets_the_asr_and_the_length_term(name, scorer, chat):
    settings = {"answers": ["y", "n"]} if name == "judge" else {}
    config = run_config({"name": name, "alpha": 2.0, "beta": 3.0, "asr_weight": 0.5, "settings": settings})
    assert reward_faults(config) == []
    reward = reward_from_config(config, scorer if name != "correction" else chat)
    if name == "correction":  # random weights write nothing of use
        reward.components[0].reward._corrector = FakeCorrector()
    out = reward([group("a large latte", "large tea")])
    own = out.parts[name]
    assert own.isfinite().all()
    assert own[0, 0] != own[0, 1] or name == "rules"
    assert_rows(out.values - 2.0 * own, [[9 - 0.5, 6 - 1.0]], atol=1e-4, rtol=0)
    assert reward.name == name
    assert ("judge_mass" in out.parts) == (name == "judge")  # every part is logged at every step
    bare = reward_from_config(run_config({"name": name, "asr_weight": 0.0, "settings": settings}), scorer)
    assert "asr" not in bare([group("a", "b", ref=[])]).parts


def test_forms_do_not_depend_on_the_company(scorer):
    config = {"name": "composite", "settings": {"components": [
        {"name": "judge", "normalize": "rank", "settings": {"answers": ["y", "n"]}}, {"name": "entity"}]}}  # fmt: skip
    groups = [group("a latte", "oat milk", "tea"), group("x", "yy"), group("a latte", context=Context("another"))]
    together = reward_from_config(run_config(config), scorer)(groups).values
    for row, alone in zip(together, groups, strict=True):
        expected = reward_from_config(run_config(config), scorer)([alone]).values[0]
        torch.testing.assert_close(row[: len(alone)], expected, atol=1e-4, rtol=0)
        assert row[len(alone) :].isnan().all()
