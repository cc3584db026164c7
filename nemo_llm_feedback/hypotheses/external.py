"""Writes other recognisers' transcripts in the checkpoint's labels: its letters, and numbers as words."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from nemo_llm_feedback.asr.heads import Labels, Vocabulary
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.errors import list_faults
from nemo_llm_feedback.core.text import UNSPACED, Normalizer, plain_marks
from nemo_llm_feedback.core.types import ExternalText
from nemo_llm_feedback.hypotheses.spelling import unwritable, written_labels

_READINGS = 4
_BY_HUNDREDS = ("en", "de")  # languages that read 1200 as twelve hundred
_CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
_NUMBER = re.compile(
    r"(?:(?P<currency>[$€£¥])\s?)?"
    r"(?:(?P<hour>[0-9]{1,2}):(?P<minute>[0-5][0-9])\b"
    r"|(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.(?P<decimals>[0-9]+))?)"
    r"(?:(?P<ordinal>st|nd|rd|th)\b|(?P<percent>\s?%)|-(?=\w))?"  # the hyphen of ``16-ounce`` joins words
)


@dataclass(frozen=True)
class ExternalTexts:
    """Makes members of other recognisers' texts.

    Attributes:
        vocabulary: the checkpoint's labels.
        normalize: the run's text normalisation.
        config: how many texts of each source, and the language of their numbers.
    """

    vocabulary: Vocabulary
    normalize: Normalizer
    config: ProposalConfig

    def labels(self, texts: Sequence[ExternalText], *, frames: int) -> list[tuple[Labels, str]]:
        """Label sequences with their source: the best of every source first, each in its readings and spellings.

        Args:
            texts: one utterance's, of each source in its order; what cannot be written is left out.
            frames: length of its audio, in which the decoder could write no more than ``max_symbols`` labels each.
        """
        longest = frames * self.config.max_symbols
        by_source: dict[str, list[ExternalText]] = {}
        for text in texts:
            by_source.setdefault(text.source, []).append(text)
        ranks = itertools.zip_longest(*(found[: self.config.external] for found in by_source.values()))
        listed = [(form, text.source) for rank in ranks for text in rank if text for form in self._forms(text.text)]
        return [(form, source) for form, source in listed if len(form) <= longest][: self.config.max_members // 2]

    def fault(self, texts: Sequence[ExternalText]) -> str:
        """Counts and names the texts that the checkpoint cannot write in any reading; "" where there are none."""
        lost = [text.text for text in texts if not self._forms(text.text)]
        head = f"{len(lost)} of {len(texts)} texts under `hypotheses` are left out; the checkpoint cannot write them:"
        return list_faults(head, unwritable(lost, self.vocabulary)) if lost else ""

    def _forms(self, text: str) -> tuple[Labels, ...]:
        return _forms(text, self.vocabulary, self.normalize, self.config.language)


@lru_cache(maxsize=16384)
def _forms(text: str, vocabulary: Vocabulary, normalize: Normalizer, language: str) -> tuple[Labels, ...]:
    """The readings of a text in labels, each as it is (a checkpoint may write case and punctuation) and normalised."""
    texts = [text] if written_labels("0123456789", vocabulary) else readings(text, language)
    spelled = [
        written_labels(form, vocabulary) or written_labels(_without_accents(form), vocabulary)
        for reading in texts
        for form in (reading, normalize(reading))
    ]
    return tuple(dict.fromkeys(labels for labels in spelled if labels))


def readings(text: str, language: str = "en") -> list[str]:
    """The text with its numbers as words, in the ways in which people read them: at most four, the plainest first.

    Of several numbers all are read in the same manner, so ``1200 or 1500`` has no mixed readings.

    Args:
        text: as a recogniser wrote it.
        language: a code of num2words; the notation of numbers is the English one (``1,200.5``).
    """
    text = plain_marks(text)
    numbers = [_said(match, language) for match in _NUMBER.finditer(text)]
    found = []
    for manner in range(min(_READINGS, max(map(len, numbers), default=1))):
        said, parts, end = (number[min(manner, len(number) - 1)] for number in numbers), [], 0
        for match, words in zip(_NUMBER.finditer(text), said, strict=True):
            parts += [text[end : match.start()], words]
            end = match.end()
        found.append(_joined([*parts, text[end:]]))
    return list(dict.fromkeys(found))


def _joined(parts: Sequence[str]) -> str:
    """The parts as one text, with a space between two letters that meet (``20L`` → ``twenty L``)."""
    text = ""
    for part in filter(None, parts):
        meet = text[-1:].isalnum() and part[0].isalnum() and not (UNSPACED.match(text[-1]) and UNSPACED.match(part))
        text += f" {part}" if meet else part
    return " ".join(text.split())


def _said(match: re.Match[str], language: str) -> list[str]:
    """The readings of one number; itself where num2words cannot read it in the language."""
    ways = _clock if match["hour"] else _money if match["currency"] else _quantity
    try:
        said = ways(match, language)
    except (NotImplementedError, ArithmeticError, LookupError, ValueError, TypeError):  # as its languages have it
        return [match[0]]
    percent = " percent" if match["percent"] and _english(language) else ""
    return list(dict.fromkeys(f"{way}{percent}" for way in said))


def _clock(match: re.Match[str], language: str) -> list[str]:
    hour, minute = _words(int(match["hour"]), language), _words(int(match["minute"]), language)
    if match["minute"] == "00":
        return [hour, f"{hour} o'clock"] if _english(language) else [hour]
    oh = [f"{hour} oh {minute}"] if match["minute"][0] == "0" and _english(language) else []
    return [*oh, f"{hour} {minute}"]


def _money(match: re.Match[str], language: str) -> list[str]:
    number, cents = match["number"].replace(",", ""), (match["decimals"] or "0").ljust(2, "0")[:2]
    names = {"currency": _CURRENCIES[match["currency"]], "separator": "|"}
    whole, part = _words(Decimal(f"{number}.{cents}"), language, "currency", **names).split("|")
    if cents == "00":
        return [whole]
    short = f"{_words(int(number), language)} {_words(int(cents), language)}"
    return [f"{whole} {part}", *([f"{whole} and {part}"] if _english(language) else []), short]


def _quantity(match: re.Match[str], language: str) -> list[str]:
    number, english = match["number"].replace(",", ""), _english(language)
    grouped = "," in match["number"]
    if match["ordinal"]:
        return [_words(int(number), language, "ordinal")]
    if match["decimals"]:
        return [_words(Decimal(f"{number}.{match['decimals']}"), language)]
    digits = " ".join(_words(int(digit), language) for digit in number)
    if number[0] == "0" or (len(number) > 6 and not grouped):
        return [digits, *([digits.replace("zero", "oh")] if english else [])]
    found = [_words(int(number), language)]
    found += [found[0].replace(" and ", " ")] if english else []
    found += [_words(int(number), language, "year")] if len(number) == 4 and language[:2] in _BY_HUNDREDS else []
    return found + ([digits] if len(number) > 2 and not grouped else [])


def _words(value: int | Decimal, language: str, to: str = "cardinal", **settings: str) -> str:
    """What num2words makes of a value, without the marks that nobody says."""
    from num2words import num2words

    said = str(num2words(value, to=to, lang=language, **settings))
    return " ".join(said.replace("-", " ").replace(",", " ").replace(" |", "|").replace("| ", "|").split())


def _english(language: str) -> bool:
    return language.split("_")[0] == "en"


def _without_accents(text: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFD", text) if not unicodedata.combining(char))
