"""Asks the scoring LLM for more than a text's log-probability: those of fixed answers, and of the mentions of terms.

Both are differences of sums over beginnings of one token sequence. Behind a shared prompt and packed into tries such
sums cost the hypothesis and the question once, and each answer one token that is only predicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm.encoding import hash_of
from nemo_llm_feedback.llm.packing import Ids
from nemo_llm_feedback.llm.prompts import MARK, Template
from nemo_llm_feedback.llm.scorer import LLMScorer, TextScore
from nemo_llm_feedback.llm.term_ranking import find_terms

_PROBE = Context("a recording")


class AnswerScorer:
    """Asks the LLM a question about a transcript and returns the log-probabilities of fixed answers.

    Args:
        scorer: the LLM.
        template: of kind ``judge``.
        answers: as they stand in the running text: a base LLM's begin with a space if the template ends in a word.

    Attributes:
        answers: as given.
        uses_context: whether the template shows the context at all.
        identity: changes whenever anything does that the answers depend on.

    Raises:
        LLMError: an answer is not exactly one token where the template ends, or two are the same token.
    """

    def __init__(self, scorer: LLMScorer, *, template: Template, answers: Sequence[str]) -> None:
        self._scorer, self._template = scorer, template
        self.answers, self.uses_context = tuple(answers), template.uses_context
        self._answer_ids = self._single_tokens()
        parts = [scorer.identity, template.text, self.answers]
        self.identity = f"judge:{hash_of(parts)}"

    def __call__(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> list[list[tuple[float, ...]]]:
        """Asks about texts behind their contexts.

        Returns:
            Per request one list, per text one tuple: natural-log probability of each answer given context, text and
            question; NaN for a text that does not fit the LLM.

        Raises:
            LLMError: out of memory with a single text, or the template alone exceeds the prompt's limit.
        """
        encoder, width = self._scorer.encoder, len(self.answers) + 1
        rows: list[tuple[Ids, list[Ids]]] = []
        for context, texts in requests:
            head, tail = encoder.fit(context, self._halves)
            asked = [(*encoder.encode_text(text)[:-1], *tail) for text in texts]
            rows.append((head, [(*ids, *end) for ids in asked for end in ((), *((i,) for i in self._answer_ids))]))
        answers = []
        for sums in self._scorer.score_ids(rows):
            groups = [sums[start : start + width] for start in range(0, len(sums), width)]
            answers.append([tuple(with_answer - base for with_answer in rest) for base, *rest in groups])
        return answers

    def _halves(self, context: Context) -> tuple[Ids, Ids]:
        """The ids before and after the transcript, without any answer."""
        begin, before, after = self._texts(context)
        encoder = self._scorer.encoder
        return (*begin, *encoder.ids(before)), encoder.ids(after)

    def _texts(self, context: Context) -> tuple[Ids, str, str]:
        """The ids that begin the prompt, and its text before and after the transcript."""
        begin, prompt = self._scorer.encoder.frame(self._template.render_question(context))
        before, after = prompt.split(MARK)
        if not begin and not before:
            raise LLMError(
                "The judge's template begins with {hypothesis} and this LLM has no token that begins a text: put some "
                "words before it."
            )
        return begin, before, after

    def _single_tokens(self) -> tuple[int, ...]:
        """The id of each answer, encoded where it will stand."""
        encoder = self._scorer.encoder
        _, _, after = self._texts(_PROBE)
        tail = encoder.ids(after)
        found = [encoder.ids(after + answer) for answer in self.answers]
        if any(ids[:-1] != tail for ids in found) or len(set(found)) < max(2, len(found)):
            tokens = ", ".join(f"{answer!r} {list(encoder.ids(answer))}" for answer in self.answers)
            raise LLMError(
                "The judge needs at least two different answers, each exactly one token of this LLM after "
                f"{after[-20:]!r}; the answers and their tokens are {tokens}. Set reward.settings.answers, e.g. [Yes, "
                "No] or [A, B], and, if need be, reward.settings.template to a template that ends otherwise."
            )
        return tuple(ids[-1] for ids in found)


class TermScore(NamedTuple):
    """A text's score, and that of those of its tokens that are part of a mention of a listed term."""

    whole: TextScore
    inside: TextScore


def score_terms(
    scorer: LLMScorer, requests: Sequence[tuple[Context, Sequence[str], Sequence[str]]]
) -> list[list[TermScore]]:
    """Splits the log-probability of texts by whether a token belongs to a listed term.

    Args:
        scorer: the LLM.
        requests: (context that the LLM reads, terms whose mentions count, texts).

    Returns:
        Per request one list, per text one score; NaN for a text that does not fit the LLM.

    Raises:
        LLMError: as ``LLMScorer.score``, or the tokenizer does not tell which characters its tokens stand for.
    """
    marked = [[_marked(scorer, text, terms) for text in texts] for _, terms, texts in requests]
    rows = [
        (scorer.encoder.encode_prompt(context), [ids[:n] for ids, runs in texts for n in _ends(ids, runs)])
        for (context, _, _), texts in zip(requests, marked, strict=True)
    ]
    out = []
    for texts, (_, beginnings), sums in zip(marked, rows, scorer.score_ids(rows), strict=True):
        known = {(): 0.0, **dict(zip(beginnings, sums, strict=True))}
        out.append(
            [
                TermScore(
                    TextScore(known[ids], len(ids)),
                    TextScore(
                        sum(known[ids[:stop]] - known[ids[:start]] for start, stop in runs),
                        sum(stop - start for start, stop in runs),
                    ),
                )
                for ids, runs in texts
            ]
        )
    return out


def _ends(ids: Ids, runs: Sequence[tuple[int, int]]) -> list[int]:
    """The lengths of those beginnings of a text whose log-probability tells those of its runs and of the whole."""
    return [*(n for run in runs for n in run if n), len(ids)]


def _marked(scorer: LLMScorer, text: str, terms: Sequence[str]) -> tuple[Ids, list[tuple[int, int]]]:
    """The ids of a text, and the runs [start, stop) of its tokens that stand for a mention of a term."""
    ids, spans, shown = scorer.encoder.text_spans(text)
    mentions = find_terms(shown, terms)
    inside = [False, *(any(start < m.end and m.start < end for m in mentions) for start, end in spans), False]
    changes = [n for n, (before, now) in enumerate(itertools.pairwise(inside)) if before != now]
    return ids, list(zip(changes[::2], changes[1::2], strict=True))
