"""How the LLM sees a group: which terms of a long list the prompt has, and how hypotheses are spelt."""

from __future__ import annotations

import random

import numpy as np
import pytest
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.llm import open_llm
from nemo_llm_feedback.llm.term_ranking import find_terms, likeness, rank_terms
from nemo_llm_feedback.llm.view import LLMView, truecased
from nemo_llm_feedback.rewards import LLMReward

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def catalogue(size: int, seed: int = 0) -> list[str]:
    """Invented names of one to three words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(3 * size)]
    return list(dict.fromkeys(" ".join(words[3 * n : 3 * n + draw.randint(1, 3)]) for n in range(size)))


def misheard(term: str, draw: random.Random) -> str:
    """A phonetic respelling: other vowels, c for k, a space in the middle."""
    sounds = {"a": "u", "e": "i", "o": "u", "k": "c", "z": "s", "g": "gh"}
    text = "".join(sounds.get(c, c) if draw.random() < 0.5 else c for c in term)
    cut = draw.randrange(1, len(text))
    return f"{text[:cut]} {text[cut:]}" if draw.random() < 0.3 else text


def test_terms_of_the_audio_are_kept_out_of_five_thousand():
    terms, draw = catalogue(5000), random.Random(1)
    kept = 0
    for _ in range(20):
        spoken = draw.sample(terms, 2)
        texts = [f"can i have {misheard(spoken[0], draw)} and {misheard(spoken[1], draw)} please" for _ in range(6)]
        kept += len(set(spoken) & set(rank_terms(terms, texts, max_terms=200)))
    assert kept >= 38


def test_the_choice_is_the_same_for_every_order_of_the_group_and_keeps_distractors():
    terms, texts = catalogue(1000), ["bada kune", "a mita poru so", "bada kune", ""]
    first = rank_terms(terms, texts, max_terms=40)
    assert rank_terms(terms, texts[::-1], max_terms=40) == first
    assert rank_terms(terms, set(texts), max_terms=40) == first
    assert len(first) == len(set(first)) == 40
    order = np.argsort(-likeness(terms, texts), kind="stable")
    near = [terms[n] for n in order[:30]]
    assert [term for term in first if term in near] == near
    assert [term in near for term in first] == [True, True, True, False] * 10  # so wherever a prompt is cut
    places = [terms.index(term) for term in first if term not in near]
    assert places == sorted(places)  # distractors, at equal distances over the list
    assert max(np.diff(places)) < 2 * min(np.diff(places))


def test_a_catalogue_of_five_thousand_fits_a_small_prompt_with_what_was_said_and_distractors(tmp_path):
    scorer = open_llm(
        LLMConfig(str(make_tiny_llm(tmp_path)), quantization="none", device="cpu", max_context_tokens=200)
    )
    terms, draw = catalogue(5000), random.Random(2)
    spoken = draw.sample(terms, 2)
    texts = [f"can i have {misheard(spoken[0], draw)} and {misheard(spoken[1], draw)}" for _ in range(4)]
    context = LLMView.of(LLMConfig("m"))(group(Context("an order", tuple(terms)), *texts)).context
    assert len(context.terms) == 200
    prompt = scorer.encoder.decode(scorer.encoder.encode_prompt(context))
    assert len(scorer.encoder.encode_prompt(context)) <= 200
    near = {terms[n] for n in np.argsort(-likeness(terms, texts), kind="stable")[:150]}
    shown = [term for term in context.terms if f" {term}," in prompt]
    assert set(spoken) <= set(shown)
    assert 0.15 < sum(term not in near for term in shown) / len(shown) < 0.35


def test_short_lists_stay_as_they_are_and_small_limits_work():
    assert rank_terms(("b", "a", "b"), ["x"], max_terms=3) == ("b", "a", "b")
    assert rank_terms(("latte", "tea", "milk"), ["a lattey"], max_terms=1) == ("latte",)
    assert len(rank_terms(catalogue(50), [""], max_terms=8)) == 8
    assert len(rank_terms(["tea"] * 9 + ["milk"], ["tea"], max_terms=8)) <= 8


def test_likeness_goes_by_letters_sound_and_script():
    found = likeness(["phone", "oat milk", "拿铁", "капучино", "latte"], ["fone", "oatmilk 我要那铁 капучина"])
    assert found[0] > 75  # ph and f sound alike
    assert found[1] == 100  # joined words
    assert found[2] == pytest.approx(66.67)  # one of two characters
    assert found[3] > 80
    assert found[4] < 60
    assert likeness(["tea"], [""]).tolist() == [0]
    assert likeness(["...", "ラテ"], ["ラテください"]).tolist() == [0, 100]


def test_mentions_are_whole_words_longest_first_and_in_any_case():
    terms = ("Flat White", "white", "拿铁", "o'brien", "oat-milk")
    found = find_terms("a FLAT white, whites O'Brien 我要拿铁! oat-milk white", terms)
    assert [mention.term for mention in found] == ["Flat White", "o'brien", "拿铁", "oat-milk", "white"]
    text = "a FLAT white, whites O'Brien 我要拿铁! oat-milk white"
    assert [text[m.start : m.end] for m in found] == ["FLAT white", "O'Brien", "拿铁", "oat-milk", "white"]
    assert find_terms("", terms) == find_terms("a", ()) == []
    assert find_terms("Straße 1", ("straße",)) == [(0, 6, "straße")]  # longer in casefolded letters


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        ("can i have a flat white", "none", "can i have a flat white"),
        ("can i have a flat white", "sentence", "Can i have a Flat White."),
        ("i'd say i think i", "english", "I'd say I think I."),
        ("hi i-frame in iris", "english", "Hi i-frame in iris."),
        ("ok!", "sentence", "Ok!"),
        ("", "english", ""),
        ("我要拿铁", "sentence", "我要拿铁。"),
        ("ขอกาแฟ", "sentence", "ขอกาแฟ"),
        ("кофе с молоком", "sentence", "Кофе с молоком."),
    ],
)
def test_truecasing(text, style, expected):
    assert truecased(text, ("Flat White", "拿铁"), style=style) == expected


def group(context: Context, *texts: str) -> HypothesisGroup:
    return HypothesisGroup("u", tuple(Hypothesis(t, (1,), "beam") for t in texts), context, (-1.0,) * len(texts))


def test_a_view_is_off_unless_it_is_asked_for_and_the_same_for_the_group():
    context = Context("a test", tuple(catalogue(50)), ("hello",))
    plain = group(context, "bada", "kune")
    assert LLMView.of(LLMConfig("m"))(plain) == plain
    shown = LLMView(max_terms=10, truecasing="sentence")(plain)
    assert shown.texts == ("Bada.", "Kune.")
    assert len(shown.context.terms) == 10
    assert (shown.context.description, shown.context.previous) == ("a test", ("hello",))
    assert [h.tokens for h in shown.hypotheses] == [(1,), (1,)]
    assert LLMView(10)(group(context, "kune", "bada")).context == LLMView(10)(plain).context


def test_rewards_score_and_keep_what_the_llm_was_shown():
    class Scorer:
        identity, uses_context = "s", True

        def __init__(self):
            self.asked = []

        def score(self, requests):
            from nemo_llm_feedback.llm import TextScore

            self.asked += requests
            return [[TextScore(-float(len(text)), 1) for text in texts] for _, texts in requests]

    scorer = Scorer()
    reward = LLMReward(scorer, alpha=1.0, beta=1.0, view=LLMView(3, "sentence"))
    context = Context("a test", tuple(catalogue(20)))
    out = reward([group(context, "bada", "kune ro")])
    assert out.parts["llm"].tolist() == [[-5, -8]]
    assert out.parts["length"].tolist() == [[1, 2]]
    ((asked, texts),) = scorer.asked
    assert len(asked.terms) == 3
    assert list(texts) == ["Bada.", "Kune ro."]
    reward([group(context, "kune ro", "bada")])
    assert len(scorer.asked) == 1
