"""Decides how a group is shown to the LLM: which terms the prompt lists, and how the hypotheses are spelt.

A view changes nothing but that. It is the same for all members of a group. Caches need not know of it, since they keep
scores under the context and the text that the LLM was shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.text import UNSPACED
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.llm.term_ranking import find_terms, rank_terms

_PRONOUN = re.compile(r"\bi\b(?=$|\s|'(?:m|d|ll|ve|s)\b)")


@dataclass(frozen=True)
class LLMView:
    """How groups are shown to the LLM.

    Attributes:
        max_terms: most terms per prompt; a longer list is cut to those nearest to the group, and some others (see
            ``term_ranking``).
        truecasing: ``none``, ``sentence`` or ``english`` (see ``truecased``).
    """

    max_terms: int
    truecasing: str = "none"

    @classmethod
    def of(cls, config: LLMConfig) -> LLMView:
        """Returns the view that the LLM's settings ask for."""
        return cls(config.max_terms, config.truecasing)

    def __call__(self, group: HypothesisGroup) -> HypothesisGroup:
        """Returns the group as the LLM sees it: the same members in the same order."""
        context = self.context(group.context, group.texts)
        texts = (truecased(text, context.terms, style=self.truecasing) for text in group.texts)
        members = tuple(replace(h, text=text) for h, text in zip(group.hypotheses, texts, strict=True))
        return replace(group, hypotheses=members, context=context)

    def context(self, context: Context, texts: Sequence[str]) -> Context:
        """Returns the context with the terms that a group of these texts is shown."""
        if len(context.terms) <= self.max_terms:
            return context
        return replace(context, terms=rank_terms(context.terms, texts, max_terms=self.max_terms))


def truecased(text: str, terms: Sequence[str], *, style: str) -> str:
    """Returns a lower-case transcript written as a sentence, by rules: equal words are spelt alike in every member.

    Listed terms get their listed spelling, the first letter is upper case, and a full stop ends the text where it ends
    in a letter or digit (``。`` after a character of Chinese or Japanese script; none after other unspaced scripts).
    With ``english`` the pronoun ``i`` and its contractions are upper case, too. No comma or question mark is guessed.

    Args:
        text: a transcript.
        terms: listed terms, whose spelling is adopted.
        style: ``none``, ``sentence`` or ``english``.
    """
    if style == "none" or not text.strip():
        return text
    parts, end = [], 0
    for mention in find_terms(text, terms):
        parts += [_spoken(text[end : mention.start], style), mention.term]
        end = mention.end
    whole = ("".join(parts) + _spoken(text[end:], style)).strip()
    first = next((n for n, char in enumerate(whole) if char.isalnum()), 0)
    whole = whole[:first] + whole[first : first + 1].upper() + whole[first + 1 :]
    if not whole[-1].isalnum():
        return whole
    if UNSPACED.fullmatch(whole[-1]):
        return whole + "。" if whole[-1] >= "\u3005" else whole
    return whole + "."


def _spoken(text: str, style: str) -> str:
    return _PRONOUN.sub("I", text) if style == "english" else text
