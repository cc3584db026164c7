"""Text normalisation for grouping and scoring, and the length of a text. Standard library only."""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from nemo_llm_feedback.core.errors import ConfigError

Normalizer = Callable[[str], str]

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""A character of a script without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo, Chinese
with its iteration marks and extensions. Korean has spaces."""

# Vowel signs and tones that combine with the character before them, in these scripts.
_MARKS = "".join(char for char in map(chr, range(0x0E00, 0x3100)) if unicodedata.category(char)[0] == "M")
_WORD = re.compile(rf"{UNSPACED.pattern}[{_MARKS}]*|[^\s{UNSPACED.pattern[1:-1]}]+")
_ASCII_WORD = re.compile(r"\S+")  # the same there, many times faster

# What separates words in an ASCII text: all but letters, digits and the apostrophes between two of them.
_ASCII_MARK = re.compile(r"[^0-9a-z']|(?<![0-9a-z])'|'(?![0-9a-z])")
_QUOTES = "'’ʼ＇`´‘"
_APOSTROPHES = dict.fromkeys(map(ord, _QUOTES), "'")
_DOTTED_I = re.compile("i\u0307+")


def none(text: str) -> str:
    """The text as it is."""
    return text


def lower(text: str) -> str:
    """Case-folded, white space collapsed to single spaces and trimmed."""
    return " ".join(_folded(text).split())


@functools.lru_cache(maxsize=1 << 16)  # proposals fold the same words and terms thousands of times
def basic(text: str) -> str:
    """`lower` in composed form (NFKC) without punctuation and symbols.

    An apostrophe between two letters or digits stays, in its ASCII form. Other punctuation and symbols separate words,
    full stops inside abbreviations and numbers included ("3.5" → "3 5"). Letters, digits and combining marks of all
    scripts stay, so that Indic vowel signs and Thai tone marks survive; zero-width format characters go.
    """
    folded = plain_marks(_folded(plain_marks(text)))
    if folded.isascii():
        return " ".join(_ASCII_MARK.sub(" ", folded).split())
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


def plain_marks(text: str) -> str:
    """The text in composed form (NFKC) with apostrophes in their ASCII form."""
    return unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of every word: what stands between white space, and in scripts without spaces each character.

    A combining mark (a Thai vowel sign or tone) belongs to the character before it.
    """
    return [match.span() for match in (_ASCII_WORD if text.isascii() else _WORD).finditer(text)]


def words(text: str) -> list[str]:
    """The words of a text, by which everything counts errors, entities and terms; see :func:`word_spans`."""
    return text.split() if text.isascii() else _WORD.findall(text)


def occurrences(words: list[str], phrase: list[str]) -> list[tuple[int, int]]:
    """All spans of ``words`` that equal ``phrase``, overlapping ones too; none for an empty phrase."""
    n = len(phrase)
    return [(i, i + n) for i in range(len(words) - n + 1) if n and words[i : i + n] == phrase]


def term_spans(
    units: Sequence[str], terms: Sequence[str], *, split: Callable[[str], Sequence[str]] = words
) -> Iterator[tuple[int, int, str]]:
    """Finds listed terms in a text, leftmost and longest first, without overlap.

    Args:
        units: the words of the text.
        terms: the list; of terms with equal words the first is found.
        split: gives the words of a term; looked up again by the next text with the same list.

    Yields:
        (start, end) of each mention, as indices into ``units``, and the term.
    """
    listed, i = _by_first_word(tuple(terms), split), 0
    while i < len(units):
        candidates = listed.get(units[i], ())
        end, term = next(((i + len(w), term) for w, term in candidates if tuple(units[i : i + len(w)]) == w), (0, ""))
        if end:
            yield i, end, term
        i = end or i + 1


@functools.lru_cache(maxsize=64)
def _by_first_word(
    terms: tuple[str, ...], split: Callable[[str], Sequence[str]]
) -> dict[str, list[tuple[tuple[str, ...], str]]]:
    """(words, term) of terms by their first word, longest first."""
    listed: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for term in terms:
        if found := tuple(split(term)):
            listed.setdefault(found[0], []).append((found, term))
    return {first: sorted(entries, key=lambda entry: -len(entry[0])) for first, entries in listed.items()}


def join_words(parts: Sequence[str]) -> str:
    """Words as a text: spaces between them, but not between two characters of scripts without spaces."""
    text = ""
    for part in parts:
        bare = text and UNSPACED.match(part[:1]) and UNSPACED.match(text[-1])
        text += part if bare or not text else f" {part}"
    return text


def folded_words(text: str) -> list[tuple[str, int, int]]:
    """The words of :func:`basic`, each with the start and end of what it was made of: ``Jean-Luc`` is two."""
    found = []
    for start, end in word_spans(text):
        begin = start
        for i in range(start, end + 1):
            inner = start < i < end - 1 and text[i] in _QUOTES and _is_word(text[i - 1]) and _is_word(text[i + 1])
            if i < end and (inner or _is_word(text[i]) or unicodedata.category(text[i]) == "Cf"):
                continue
            found += [(word, begin, i) for word in basic(text[begin:i]).split()]
            begin = i + 1
    return found


def text_length(text: str) -> int:
    """Length as rewards count it: the :func:`words` with a letter or digit in them.

    A reward for length is thus not to be had with dashes, and ``我要 latte`` has length 3.
    """
    return sum(word.isalnum() or any(map(str.isalnum, word)) for word in words(text))


def _folded(text: str) -> str:
    """Case-folded, and Turkish İ as i: Unicode's rule leaves its dot behind as a mark, which no transcript has."""
    folded = text.casefold()
    return folded if folded.isascii() else _DOTTED_I.sub("i", folded)


def _is_word(char: str) -> bool:
    return bool(char) and unicodedata.category(char)[0] in "LMN"
