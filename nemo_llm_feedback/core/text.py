"""Text normalisation for grouping and scoring, and the length of a text. Standard library only."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable

from nemo_llm_feedback.core.errors import ConfigError

Normalizer = Callable[[str], str]

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""A character of a script without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo, Chinese
with its iteration marks and extensions. Korean has spaces."""

_APOSTROPHES = dict.fromkeys(map(ord, "’ʼ＇`´‘"), "'")


def none(text: str) -> str:
    """The text as it is."""
    return text


def lower(text: str) -> str:
    """Case-folded, white space collapsed to single spaces and trimmed."""
    return " ".join(text.casefold().split())


def basic(text: str) -> str:
    """`lower` in composed form (NFKC) without punctuation and symbols.

    An apostrophe between two letters or digits stays, in its ASCII form. Other punctuation and symbols separate words,
    full stops inside abbreviations and numbers included ("3.5" → "3 5"). Letters, digits and combining marks of all
    scripts stay, so that Indic vowel signs and Thai tone marks survive; zero-width format characters go.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_APOSTROPHES)
    out = []
    for i, char in enumerate(folded):
        inner = char == "'" and _is_word(folded[i - 1 : i]) and _is_word(folded[i + 1 : i + 2])
        if inner or _is_word(char):
            out.append(char)
        elif unicodedata.category(char) != "Cf":
            out.append(" ")
    return " ".join("".join(out).split())


NORMALIZERS: dict[str, Normalizer] = {"none": none, "lower": lower, "basic": basic}

NORMALIZER_WORDS = {
    "none": "the texts as they are",
    "lower": "case-folded, white space collapsed",
    "basic": "NFKC, case-folded, punctuation and symbols removed",
}
"""What each normaliser does, for tables and reports."""


def get_normalizer(name: str) -> Normalizer:
    """The normaliser of that name.

    Raises:
        ConfigError: unknown name; the message has the nearest known one and the list.
    """
    if name in NORMALIZERS:
        return NORMALIZERS[name]
    near = difflib.get_close_matches(name, NORMALIZERS, n=1, cutoff=0.0)[0]
    raise ConfigError(f"unknown text normalisation '{name}': did you mean '{near}'? Known: {', '.join(NORMALIZERS)}")


def text_length(text: str) -> int:
    """Length as rewards count it: words, and characters where the script is written without spaces.

    A word is a white-space separated piece with a letter or digit in it, so that a reward for length is not to be had
    with dashes. Letters and digits of unspaced scripts count 1 each, the text between them counts as words:
    ``我要 latte`` has length 3. Marks that combine with a character (Thai vowel signs and tones) do not count.
    """
    characters = sum(unicodedata.category(char)[0] in "LN" for char in UNSPACED.findall(text))
    return characters + sum(any(map(str.isalnum, word)) for word in UNSPACED.sub(" ", text).split())


def _is_word(char: str) -> bool:
    return bool(char) and unicodedata.category(char)[0] in "LMN"
