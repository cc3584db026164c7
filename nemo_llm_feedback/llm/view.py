"""Shows a group to the LLM: which terms it reads, and how the hypotheses are written for it.

A view changes what the LLM is shown and nothing else. It is the same for all members of a group, and since scores are
kept under the context and the text that were shown, a cache needs to know nothing of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.text import UNSPACED
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.llm.term_ranking import find_terms, rank_terms

_PRONOUN = re.compile(r"\bi\b(?=$|\s|'(?:m|d|ll|ve|s)\b)")


@dataclass(frozen=True)
class LLMView:
    """How groups are shown to the LLM.

    Attributes:
        max_terms: of a longer term list the group is shown its nearest terms, and some others (see ``term_ranking``).
        truecasing: ``none``, ``sentence`` or ``english`` (see ``truecased``).
    """

    max_terms: int
    truecasing: str = "none"

    @classmethod
    def of(cls, config: LLMConfig) -> LLMView:
        """The view that the LLM's settings ask for."""
        return cls(config.max_terms, config.truecasing)

    def __call__(self, group: HypothesisGroup) -> HypothesisGroup:
        """Returns the group as the LLM is to see it: same members in the same order."""
        context = self.context(group.context, group.texts)
        members = tuple(
            dataclasses.replace(h, text=truecased(h.text, context.terms, style=self.truecasing))
            for h in group.hypotheses
        )
        return dataclasses.replace(group, hypotheses=members, context=context)

    def context(self, context: Context, texts: Sequence[str]) -> Context:
        """Returns the context with the terms that a group of these texts is shown."""
        if len(context.terms) <= self.max_terms:
            return context
        return dataclasses.replace(context, terms=rank_terms(context.terms, texts, max_terms=self.max_terms))


def truecased(text: str, terms: Sequence[str], *, style: str) -> str:
    """Writes a lower-case transcript as a sentence; a rule, so equal words are written equally in every member.

    Listed terms get their listed spelling, the first letter is upper case, and a full stop ends the text where it ends
    in a letter or digit (``。`` after a character of Chinese or Japanese script; none after other unspaced scripts).
    With ``english`` the pronoun ``i`` and its contractions are upper case, too. No comma or question mark is guessed.

    Args:
        text: a transcript.
        terms: listed terms, whose spelling is taken over.
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
