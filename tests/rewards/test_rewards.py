"""Rewards: the formula, what cannot be judged, the cache, the registry, rules and Python functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.llm import TextScore, load_llm
from nemo_llm_feedback.rewards import (
    CallableReward,
    LLMReward,
    Reward,
    ScoreCache,
    as_reward,
    build_reward,
    open_cache,
    register,
    reward_names,
    score_key,
)
from nemo_llm_feedback.rewards.rules import repetition

NAN = math.nan
CONTEXT = Context("a test", ("one",))


def group(*texts: str, ref: Sequence[float] | None = None, context: Context = CONTEXT, name: str = "u"):
    """A group of these texts; the reference scores are −1, −2, … unless given."""
    scores = tuple(-1.0 - n for n in range(len(texts))) if ref is None else tuple(ref)
    return HypothesisGroup(name, tuple(Hypothesis(text, ()) for text in texts), context, scores)


@dataclass
class FakeScorer:
    """log p = −(characters + 1), or −(characters + 1)/2 with a context; NaN for texts that contain 'nan'."""

    identity: str = "fake"
    uses_context: bool = True
    asked: list[tuple[Context, tuple[str, ...]]] = field(default_factory=list)

    def score(self, requests):
        self.asked += [(context, tuple(texts)) for context, texts in requests]
        return [[self.one(context, text) for text in texts] for context, texts in requests]

    def one(self, context, text):
        logp = -(len(text) + 1.0) / (2 if context else 1)
        return TextScore(NAN if "nan" in text else logp, len(text) + 1)


def assert_rows(tensor: torch.Tensor, rows: list[list[float]]) -> None:
    torch.testing.assert_close(tensor, torch.tensor(rows, dtype=torch.float32), equal_nan=True)


# ---------------------------------------------------------------- the LLM reward


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [("sum", [-4.0, -1.5]), ("token", [-0.5, -0.5]), ("word", [-2.0, -1.5]), ("pmi", [4.0, 1.5])],
)
def test_values_follow_the_formula(normalize, expected):
    reward = LLMReward(FakeScorer(), alpha=0.5, beta=3.0, normalize=normalize, asr_weight=2.0)
    out = reward([group("aaa bbb", "cc")])
    assert_rows(out.parts["llm"], [expected])
    assert_rows(out.parts["asr"], [[-1.0, -2.0]])
    assert_rows(out.parts["length"], [[2.0, 1.0]])
    assert_rows(out.values, [[0.5 * expected[0] - 2.0 + 6.0, 0.5 * expected[1] - 4.0 + 3.0]])
    assert out.values.dtype == torch.float32
    assert out.values.device.type == "cpu"


def test_what_cannot_be_judged_is_nan_in_values_and_parts():
    reward = LLMReward(FakeScorer(), alpha=1.0, beta=1.0)
    out = reward([group("a", "nan", "b", ref=[-1.0, -1.0, -math.inf]), group("")])
    assert_rows(out.values, [[-1.0, NAN, NAN], [-1.5, NAN, NAN]])
    for part in out.parts.values():
        assert torch.equal(part.isnan(), out.values.isnan())
    # Weight 0 on the LLM does not make an unjudgeable member judgeable.
    assert_rows(LLMReward(FakeScorer(), alpha=0.0, beta=1.0)([group("nan", "a")]).values, [[NAN, -1.0]])


def test_word_normalisation_of_the_empty_text_is_finite():
    out = LLMReward(FakeScorer(), alpha=1.0, beta=1.0, normalize="word")([group("")])
    assert_rows(out.values, [[-1.5]])


def test_reference_scores_are_needed_unless_their_weight_is_zero():
    without = group("a", "b", ref=[])
    with pytest.raises(RewardError, match="asr_weight=0"):
        LLMReward(FakeScorer(), alpha=1.0, beta=0.0)([without])
    out = LLMReward(FakeScorer(), alpha=1.0, beta=0.0, asr_weight=0.0)([without])
    assert_rows(out.values, [[-1.0, -1.0]])
    assert "asr" not in out.parts


def test_no_context_is_refused_with_the_fix():
    bare = group("a", context=Context(), name="audio.wav")
    with pytest.raises(RewardError, match=r"audio\.wav has no context.*context\.description"):
        LLMReward(FakeScorer(), alpha=1.0, beta=0.0)([group("a"), bare])
    assert LLMReward(FakeScorer(), alpha=1.0, beta=0.0, allow_no_context=True)([bare]).values.isfinite().all()
    fixed_template = FakeScorer(uses_context=False)
    assert LLMReward(fixed_template, alpha=1.0, beta=0.0)([bare]).values.isfinite().all()


@pytest.mark.parametrize("settings", [{"normalize": "mean"}, {"alpha": NAN}, {"beta": math.inf}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(RewardError):
        LLMReward(FakeScorer(), **{"alpha": 1.0, "beta": 0.0, **settings})


def test_equal_texts_are_asked_once_and_cached_over_calls():
    scorer = FakeScorer()
    reward = LLMReward(scorer, alpha=1.0, beta=0.0)
    first = reward([group("a", "b", "a"), group("b", "c")])
    assert scorer.asked == [(CONTEXT, ("a", "b", "c"))]
    assert reward.hit_rate == 0.0
    again = reward([group("a", "b", "a"), group("b", "d")])
    assert scorer.asked[1:] == [(CONTEXT, ("d",))]
    assert reward.hit_rate == pytest.approx(2 / 6)
    torch.testing.assert_close(first.values[0], again.values[0])
    reward([group("a", context=Context("another"))])
    assert scorer.asked[2:] == [(Context("another"), ("a",))]


def test_cache_serves_every_normalisation_but_no_other_scorer():
    cache = ScoreCache()
    LLMReward(FakeScorer(), alpha=1.0, beta=0.0, normalize="pmi", cache=cache)([group("a")])
    silent, other = FakeScorer(), FakeScorer(identity="other")
    LLMReward(silent, alpha=1.0, beta=0.0, normalize="token", cache=cache)([group("a")])
    LLMReward(other, alpha=1.0, beta=0.0, cache=cache)([group("a")])
    assert silent.asked == []
    assert other.asked == [(CONTEXT, ("a",))]


def test_nan_is_never_cached():
    scorer = FakeScorer()
    reward = LLMReward(scorer, alpha=1.0, beta=0.0)
    for _ in range(2):
        assert reward([group("nan")]).values.isnan().all()
    assert len(scorer.asked) == 2


def test_the_cache_counts_hits_and_keeps_finite_scores_only():
    cache = ScoreCache()
    cache.put_many({"a": (-1.0, 1), "c": (-3.0, 1), "d": (-math.inf, 1)})
    assert cache.get_many(["a", "b", "c", "d"]) == {"a": (-1.0, 1), "c": (-3.0, 1)}
    assert (cache.hits, cache.misses, len(cache)) == (2, 2, 2)


def test_disk_cache_survives_the_process_and_keeps_no_nan(tmp_path):
    first = LLMReward(FakeScorer(), alpha=1.0, beta=0.0, cache=f"{tmp_path}/scores/")
    llm = first([group("a", "nan", "b" * 7)]).parts["llm"]
    assert Path(tmp_path / "scores" / "llm_scores.sqlite").is_file()
    assert len(first.cache) == 2
    silent = FakeScorer()
    again = LLMReward(silent, alpha=1.0, beta=0.0, cache=str(tmp_path / "scores"))
    assert torch.equal(again([group("a", "b" * 7)]).parts["llm"], llm[:, [0, 2]])
    assert silent.asked == []
    many = {score_key("x", CONTEXT, str(n)): (-n - 0.1, n) for n in range(1200)}
    again.cache.put_many(many)
    assert open_cache(str(tmp_path / "scores")).get_many([*many, "unknown"]) == many
    assert (again.cache.hits, again.cache.misses) == (2, 0)


def test_disk_cache_is_safe_after_a_fork(tmp_path):
    cache = ScoreCache(str(tmp_path / "scores.sqlite"))
    before = cache._connect()
    cache._process += 1  # what a forked child sees: an inherited connection of another process
    assert cache._connect() is not before
    cache.put_many({"a": (-1.0, 1)})
    assert cache.get_many(["a"]) == {"a": (-1.0, 1)}


def test_disk_cache_refuses_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database" * 100)
    with pytest.raises(RewardError, match=r"reward\.cache=.*notes\.txt"):
        open_cache(str(tmp_path / "notes.txt"))
    with pytest.raises(RewardError, match=r"reward\.cache"):
        open_cache(str(tmp_path / "notes.txt" / "below"))


def test_keys_tell_apart_what_looks_alike():
    contexts = [Context("a", ("b",)), Context("a b"), Context("", ("a", "b")), Context("", ("a, b",))]
    keys = {score_key(identity, context, text) for identity in "xy" for context in contexts for text in ("t", "u")}
    assert len(keys) == 16


def test_group_order_and_company_do_not_matter():
    groups = [group("a", "bb bb"), group("ccc", "d", "e"), group("a", context=Context("z"))]
    together = LLMReward(FakeScorer(), alpha=1.0, beta=1.0)(groups).values
    for position, alone in enumerate(groups):
        row = LLMReward(FakeScorer(), alpha=1.0, beta=1.0)([alone]).values[0]
        torch.testing.assert_close(together[position, : len(alone)], row)
        assert together[position, len(alone) :].isnan().all()


def test_with_a_real_llm(tmp_path):
    folder = make_tiny_llm(tmp_path)
    scorer = load_llm(LLMConfig(model=str(folder), quantization="nf4", device="cpu"))
    reward = build_reward("llm", scorer=scorer, alpha=0.7, beta=1.5)
    assert isinstance(reward, Reward)
    out = reward([group("can i have a latte", "a latte"), group("milk")])
    logp = scorer.score([(CONTEXT, ["can i have a latte", "a latte", "milk"])])[0]
    expected = [[0.7 * logp[0].logp - 1 + 7.5, 0.7 * logp[1].logp - 2 + 3], [0.7 * logp[2].logp - 1 + 1.5, NAN]]
    assert_rows(out.values, expected)
    assert not out.values.requires_grad


# ---------------------------------------------------------------- length and repetition


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("two words", 2),
        ("it's o'clock , ok", 3),
        ("我要一杯拿铁", 6),
        ("我要 latte 咖啡", 5),
        ("我要latte", 3),
        ("ラテをください。", 7),
        ("안녕 하세요", 2),
        ("ขอกาแฟที่", 7),
        ("мама мыла раму", 3),
    ],
)
def test_text_length(text, length):
    assert text_length(text) == length


def test_repetition():
    assert repetition("a") == repetition("one two three four") == 0.0
    assert repetition("no no no no") == 1.0
    assert repetition("oat milk oat milk") == pytest.approx(1 / 3)
    assert repetition("好好好") == 1.0


# ---------------------------------------------------------------- rules and functions


def test_rules():
    groups = [group("one two", "one"), group("no no")]
    assert_rows(build_reward("length")(groups).values, [[2, 1], [2, NAN]])
    assert_rows(build_reward("negative_length")(groups).values, [[-2, -1], [-2, NAN]])
    assert_rows(build_reward("repetition")(groups).values, [[0, 0], [-1, NAN]])
    assert build_reward("length").name == "length"


def test_functions_judge_all_texts_at_once_and_none_becomes_nan():
    def judge(texts, terms, ref_logp):
        assert terms == [["one"]] * 3
        assert ref_logp == [-1.0, -2.0, -1.0]
        return [None if text == "b" else len(text) for text in texts]

    reward = build_reward("callable", function=judge)
    out = reward([group("aa", "b"), group("")])
    assert_rows(out.values, [[2, NAN], [0, NAN]])
    assert reward.name == "judge"
    assert list(out.parts) == ["judge"]


def test_functions_may_take_everything_or_only_texts():
    seen = {}

    def all_of_it(texts, **more):
        seen.update(more)
        return [math.inf for _ in texts]

    assert_rows(CallableReward(all_of_it)([group("a", ref=[])]).values, [[NAN]])
    names = {"descriptions", "terms", "utterances", "sources", "ref_logp", "completion_ids", "references"}
    assert set(seen) == names
    assert seen["descriptions"] == ["a test"]
    assert_rows(CallableReward(lambda texts: [1] * len(texts), name="one")([group("a")]).values, [[1]])


def test_a_function_that_reads_the_reference_judges_each_head_of_a_hybrid_by_its_own():
    out = CallableReward(lambda texts, ref_logp: [2 * p for p in ref_logp])([group("a", "b"), group("c")])
    assert_rows(out.values, [[-2, -4], [-2, NAN]])
    assert_rows(out.with_reference(torch.tensor([[-5.0, -6.0], [-7.0, 0.0]])), [[-10, -12], [-14, NAN]])
    assert CallableReward(lambda texts: [0] * len(texts))([group("a")]).revalue is None


def test_functions_that_take_a_context_are_called_per_group():
    def judge(texts, context):
        return [None if text == "b" else len(text) + len(context.terms) for text in texts]

    out = CallableReward(judge)([group("aa", "b"), group("", context=Context("x", ("y", "z")))])
    assert_rows(out.values, [[3, NAN], [2, NAN]])


def test_the_python_api_takes_functions_and_reward_objects():
    length = build_reward("length")
    assert as_reward(length) is length
    assert_rows(as_reward(lambda texts, context: [len(context.terms)] * len(texts))([group("a")]).values, [[1]])
    for wrong in ("length", 3):
        with pytest.raises(RewardError, match="needs a function"):
            as_reward(wrong)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda texts: [1.0], "1 values for 2 texts"),
        (lambda texts: ["good", "bad"], "ValueError"),
        (lambda texts: 1 / 0, "ZeroDivisionError"),
        (lambda texts: None, "TypeError"),
    ],
)
def test_functions_that_fail_are_named(function, match):
    with pytest.raises(RewardError, match=f"judge.*{match}"):
        CallableReward(function, name="judge")([group("a", "b")])
    with pytest.raises(RewardError, match="needs a function"):
        CallableReward("judge")


# ---------------------------------------------------------------- the registry


def test_unknown_names_come_with_the_nearest_known_one():
    with pytest.raises(RewardError, match="Did you mean 'repetition'"):
        build_reward("repitition")
    assert {"llm", "length", "negative_length", "repetition", "callable"} <= set(reward_names())


def test_wrong_settings_of_a_named_reward_are_reported():
    with pytest.raises(RewardError, match="'length' does not take these settings"):
        build_reward("length", words=3)


def test_registered_rewards_can_be_built_and_not_replaced():
    @register("test_only_constant")
    class Constant:
        name = "constant"

        def __init__(self, *, value: float) -> None:
            self.value = value

        def __call__(self, groups):
            return build_reward("length")(groups)

    assert build_reward("test_only_constant", value=2.0).value == 2.0
    with pytest.raises(RewardError, match="taken"):
        register("length")(Constant)


def test_dotted_paths_need_permission(tmp_path, monkeypatch):
    Path(tmp_path / "my_rewards.py").write_text(
        "from nemo_llm_feedback.rewards import RuleReward\n"
        "def vowels():\n    return RuleReward('vowels', lambda text: sum(c in 'aeiou' for c in text))\n"
        "def nothing():\n    return 3\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="command line or YAML only"):
        build_reward("my_rewards:vowels")
    assert_rows(build_reward("my_rewards:vowels", allow_dotted=True)([group("latte")]).values, [[2]])
    for path, match in (
        ("my_rewards:consonants", "cannot be imported"),
        ("no_such_module_here:x", "cannot be imported"),
        ("my_rewards:number", "neither a class nor a function"),
        ("my_rewards:nothing", "is not a reward"),
        ("my_rewards.vowels", "package.module:attribute"),
    ):
        with pytest.raises(RewardError, match=match):
            build_reward(path, allow_dotted=True)


def test_the_length_is_that_of_the_text_and_not_of_what_the_llm_is_shown():
    """Truecasing writes a listed spelling: "coca cola" is shown as "Coca-Cola" and was one word."""
    shown = lambda g: dataclasses.replace(  # noqa: E731
        g,
        hypotheses=tuple(dataclasses.replace(h, text=h.text.replace("coca cola", "Coca-Cola")) for h in g.hypotheses),
    )
    found = LLMReward(FakeScorer(), alpha=1.0, beta=2.0, view=shown)([group("a coca cola", "a coca colla")])
    assert found.parts["length"].tolist() == [[3.0, 3.0]]
