"""Measures of a text: length and repetition."""

from __future__ import annotations

import itertools
import re
import unicodedata

# Scripts written without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, bopomofo, Chinese characters
# with their iteration marks and extensions. Korean has spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def text_length(text: str) -> int:
    """Returns the length that the reward's β multiplies: words, and in scripts written without spaces characters.

    Marks that combine with a character (Thai vowels and tones) and punctuation of such a script count nothing; what
    stands between unspaced characters counts as words: ``我要 latte`` has length 3.
    """
    characters = sum(unicodedata.category(c)[0] in "LN" for c in _UNSPACED.findall(text))
    words = _UNSPACED.sub(" ", text) if characters else text
    return characters + sum(any(c.isalnum() for c in word) for word in words.split())


def repetition(text: str) -> float:
    """Returns the share of a text's units that repeat the unit before or close an earlier pair, in [0, 1].

    Units are words, or characters where ``text_length`` counts those. 0 for texts of fewer than two units.
    """
    units = _UNSPACED.sub(lambda match: f" {match.group()} ", text).split()
    if len(units) < 2:
        return 0.0
    seen: set[tuple[str, str]] = set()
    repeats = 0
    for pair in itertools.pairwise(units):
        repeats += pair[0] == pair[1] or pair in seen
        seen.add(pair)
    return repeats / (len(units) - 1)
