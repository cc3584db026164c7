"""Text normalisation for grouping and scoring, and the length of a text. Standard library only."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable

from nemo_llm_feedback.errors import ConfigError

Normalizer = Callable[[str], str]

# First words of the Unicode names of letters whose scripts put no spaces between words (UAX 29, line breaking class SA
# and ideographs). Korean is written with spaces and is not among them.
_SPACELESS = frozenset(
    "CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA HALFWIDTH BOPOMOFO IDEOGRAPHIC THAI LAO KHMER MYANMAR TIBETAN TAI "
    "JAVANESE BALINESE NUSHU YI TANGUT".split()
)
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
        kind = unicodedata.category(char)[0]
        if kind in "LMN":
            out.append(char)
        elif char == "'" and _is_word(folded[i - 1 : i]) and _is_word(folded[i + 1 : i + 2]):
            out.append(char)
        elif unicodedata.category(char) != "Cf":
            out.append(" ")
    return " ".join("".join(out).split())


NORMALIZERS: dict[str, Normalizer] = {"none": none, "lower": lower, "basic": basic}


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
    """Length as rewards count it: words, or characters where the script is written without spaces.

    White-space separated words with a letter or digit count 1; within one, every letter of a spaceless script
    (Chinese, Japanese, Thai, Lao, Khmer, Burmese …) counts 1 and each run of other letters between them counts 1.
    Combining marks do not count, so that a Thai vowel sign does not lengthen a text, and neither does punctuation: a
    reward for length is not to be had with dashes.
    """
    return sum(_word_length(word) for word in text.split())


def _word_length(word: str) -> int:
    if not any(map(_is_spaceless, word)):
        return int(any(unicodedata.category(char)[0] in "LN" for char in word))
    count, in_run = 0, False
    for char in word:
        if _is_spaceless(char):
            count, in_run = count + 1, False
        elif unicodedata.category(char)[0] in "LN":
            count, in_run = count + (not in_run), True
    return count


def _is_word(char: str) -> bool:
    return bool(char) and unicodedata.category(char)[0] in "LMN"


def _is_spaceless(char: str) -> bool:
    """Whether the character is a letter of a script that is written without spaces; False for its marks and signs."""
    if char < "\u0e00" or unicodedata.category(char) not in ("Lo", "Lm", "Nl"):
        return False
    name = unicodedata.name(char, "")
    return name.split(" ", 1)[0] in _SPACELESS and not name.startswith("HALFWIDTH HANGUL")
