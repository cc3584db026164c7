"""Reads what other recognisers wrote for an utterance: the manifest key ``hypotheses``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_llm_feedback.core.config.sections import RESERVED_SOURCES
from nemo_llm_feedback.core.errors import short
from nemo_llm_feedback.core.text_files import to_number
from nemo_llm_feedback.core.types import ExternalText

KEY = "hypotheses"
MAX_TEXTS = 100
"""Texts of one row; a run takes the first ``proposals.external`` of each source."""


def source_name(given: Any) -> str:
    """The name of another recogniser.

    Raises:
        ValueError: not a word of at most 64 characters, or the name of one of our own sources.
    """
    if not isinstance(given, str) or not re.fullmatch(r"[^\s,=]{1,64}", given) or not given.isprintable():
        raise ValueError(
            f"a source must be a name of 1 to 64 characters without spaces, commas and `=` (got {short(given)})."
        )
    if given.lower() in RESERVED_SOURCES:
        raise ValueError(f"the source {given!r} is one of ours ({', '.join(RESERVED_SOURCES)}): give it another name.")
    return given


def parse_hypotheses(value: Any) -> tuple[ExternalText, ...]:
    """Parses the manifest key ``hypotheses``.

    Args:
        value: a list of texts, or of objects with ``text`` and, where they are known, ``source`` and ``score``; null
            and [] mean none.

    Raises:
        ValueError: any other form, an empty text, too many, or a source that cannot be called so.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(
            f"`{KEY}` must be a list of texts, or of objects with `text`, `source` and `score` (got {short(value)})."
        )
    if len(value) > MAX_TEXTS:
        raise ValueError(
            f"`{KEY}` has {len(value)} texts, at most {MAX_TEXTS} are read: keep the best of each source."
        )
    return tuple(_parse_text(item, f"`{KEY}` {number}:") for number, item in enumerate(value, 1))


def _parse_text(item: Any, where: str) -> ExternalText:
    given = {"text": item} if isinstance(item, str) else item
    if not isinstance(given, Mapping) or not isinstance(given.get("text"), str):
        raise ValueError(
            f"{where} must be a text, or an object with `text`, `source` and `score` (got {short(item)})."
        )
    if strange := [key for key in given if key not in ("text", "source", "score")]:
        raise ValueError(f"{where} an object has `text`, `source` and `score`, not {short(strange[0])}.")
    text, score = given["text"].strip(), given.get("score")
    if not text:
        raise ValueError(f"{where} the text is empty: leave it out.")
    if score is not None and to_number(score) is None:
        raise ValueError(f"{where} `score` must be a number or null (got {short(score)}).")
    try:
        source = source_name(given.get("source") or ExternalText.source)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    return ExternalText(text, source, to_number(score))
