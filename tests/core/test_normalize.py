"""Text normalisation in several scripts, and the length of a text."""

from __future__ import annotations

import random
import unicodedata

import pytest

from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.text import (
    _WORD,
    NORMALIZERS,
    basic,
    get_normalizer,
    lower,
    none,
    text_length,
    word_spans,
    words,
)


@pytest.mark.parametrize("text", ["", " A  b\t", "Don’t!"])
def test_none_changes_nothing(text):
    assert none(text) == text


def test_lower_folds_case_and_white_space_and_keeps_punctuation():
    assert lower("  Straße\u00a0 ÉCOLE,\n Don’t İ ") == "strasse école, don’t i"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don’t stop -- 'til you’re done, O'Brien's!", "don't stop til you're done o'brien's"),
        ("rock 'n' roll", "rock n roll"),
        ("the dogs' bowl", "the dogs bowl"),
        ("'", ""),
        ("well-known T-shirt", "well known t shirt"),
        ("3.5% of $20", "3 5 of 20"),
        ("cafe\u0301", "café"),
        ("İSTANBUL I\u0307zmir i\u0307\u0307", "istanbul izmir i"),
        ("ﬁne ＡＢＣ", "fine abc"),
        ("zero\u200bwidth", "zerowidth"),
        ("«Привет», сказал ОН…", "привет сказал он"),
        ("हिन्दी में बोलो।", "हिन्दी में बोलो"),
        ("مرحبا، كيف؟", "مرحبا كيف"),
        ("你好，世界。", "你好 世界"),
        ("น้ำแข็ง ๆ!", unicodedata.normalize("NFKC", "น้ำแข็ง ๆ")),
        ("¿Qué tal?", "qué tal"),
        ("🙂 ok", "ok"),
    ],
)
def test_basic(text, expected):
    assert basic(text) == expected


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalising_twice_is_normalising_once(name):
    rng = random.Random(0)
    normalize = get_normalizer(name)
    alphabet = [chr(c) for c in range(0x20, 0x3100)] + list("ŉİǰΐﬃ①½Ω｡ﾞ'’") * 50
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(12))
        assert normalize(normalize(text)) == normalize(text), ascii(text)


def test_basic_leaves_letters_digits_marks_and_inner_apostrophes_only():
    rng = random.Random(1)
    for _ in range(500):
        for word in basic("".join(chr(rng.randrange(0x20, 0x2FFF)) for _ in range(12))).split(" "):
            assert not word.startswith("'")
            assert not word.endswith("'")
            assert all(c == "'" or unicodedata.category(c)[0] in "LMN" for c in word)


def test_basic_reads_an_ascii_text_as_it_reads_one_beside_other_letters():
    rng = random.Random(2)
    for _ in range(2000):
        text = "".join(rng.choice("aBz09'' -_.\t\x1c`") for _ in range(8))
        assert f"{basic(text)} é".strip() == basic(f"{text} é"), ascii(text)


def test_get_normalizer_names_the_nearest():
    assert get_normalizer("basic") is basic
    with pytest.raises(ConfigError, match=r"'bascic'.*did you mean 'basic'.*none, lower, basic"):
        get_normalizer("bascic")
    with pytest.raises(ConfigError, match="did you mean"):
        get_normalizer("")


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("get me a latte", 4),
        ("  two   words ", 2),
        ("a -- b …", 2),
        ("don't well-known", 2),
        ("你好世界", 4),
        ("你好，世界。", 4),
        ("東京タワー", 5),
        ("ｱｲｳ", 3),
        ("我用 iPhone 打电话", 6),
        ("米国USAと", 4),
        ("a我b", 3),
        ("สวัสดี", 4),  # four consonants, two vowel signs
        ("ສະບາຍດີ", 6),  # one vowel sign is a mark, the other two vowels are letters
        ("ខ្មែរ", 3),
        ("မြန်မာ", 3),
        ("한국어 문장 입니다", 3),
        ("हिन्दी में बोलो", 3),
        ("привет мир", 2),
        ("二〇二五", 4),
    ],
)
def test_text_length(text, length):
    assert text_length(text) == length


def test_length_adds_up_over_words():
    assert text_length("你好 hello สวัสดี") == text_length("你好") + text_length("hello") + text_length("สวัสดี")


def test_the_words_of_an_ascii_text_are_those_of_any_script():
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(map(chr, rng.choices([*range(128), *b" \t\n ab'-"], k=30)))
        spans = [match.span() for match in _WORD.finditer(text)]
        assert word_spans(text) == spans
        assert words(text) == [text[i:j] for i, j in spans]
