"""Asks the LLM for the log-probabilities of fixed answers to a question, and of the terms that a text mentions.

Both are differences of sums over beginnings of one token sequence. Behind a shared prompt and packed into tries such
sums cost the hypothesis and the question once, and each answer one token that is only predicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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
        template: a template of kind ``judge``.
        answers: the answers as running text: a base LLM's begin with a space if the template ends in a word.

    Attributes:
        answers: the answers.
        uses_context: whether the template shows the context at all.
        identity: changes whenever anything changes that the answers depend on.

    Raises:
        LLMError: an answer is not exactly one token where the template ends, or two are the same token.
    """

    def __init__(self, scorer: LLMScorer, *, template: Template, answers: Sequence[str]) -> None:
        self._scorer, self._template = scorer, template
        self.answers, self.uses_context = tuple(answers), template.uses_context
        self._answer_ids = self._single_tokens()
        self.identity = f"judge:{hash_of([scorer.identity, template.text, self.answers])}"

    @property
    def num_broken(self) -> int:
        """Texts so far that fit the LLM and yet got no finite score."""
        return self._scorer.num_broken

    def __call__(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> list[list[tuple[float, ...]]]:
        """Asks about texts behind their contexts.

        Args:
            requests: (context, texts) pairs.

        Returns:
            One list per request, one tuple per text: natural-log probability of each answer given context, text and
            question; NaN for a text that is too long for the LLM.

        Raises:
            LLMError: out of memory with a single text, or the template alone exceeds the prompt's limit.
        """
        encoder, width = self._scorer.encoder, len(self.answers) + 1
        rows: list[tuple[Ids, list[Ids]]] = []
        for context, texts in requests:
            head, tail = encoder.fit(context, self._halves)
            asked = [(*ids[:-1], *tail) for ids in encoder.encode_texts(texts, answer=False)]
            rows.append((head, [(*ids, *end) for ids in asked for end in ((), *((i,) for i in self._answer_ids))]))
        answers = []
        for sums in self._scorer.score_ids(rows):
            groups = [sums[start : start + width] for start in range(0, len(sums), width)]
            answers.append([tuple(with_answer - base for with_answer in rest) for base, *rest in groups])
        return answers

    def _halves(self, context: Context) -> tuple[Ids, Ids]:
        """The ids before and after the transcript, without any answer."""
        encoder = self._scorer.encoder
        begin, prompt = encoder.frame(self._template.render_question(context))
        before, after = prompt.split(MARK)
        if not begin and not before:
            raise LLMError(
                "The judge's template begins with {hypothesis} and this LLM has no token that begins a text: put some "
                "words before it."
            )
        return (*begin, *encoder.ids(before)), encoder.ids(after)

    def _single_tokens(self) -> tuple[int, ...]:
        """The id of each answer, encoded where it will stand."""
        encoder = self._scorer.encoder
        _, tail = self._halves(_PROBE)
        after = encoder.frame(self._template.render_question(_PROBE))[1].split(MARK)[1]
        gaps = ["" if answer.startswith(" ") else encoder.gap for answer in self.answers]
        found = [encoder.ids(after + gap + answer) for gap, answer in zip(gaps, self.answers, strict=True)]
        if any(ids[:-1] != tail for ids in found) or len(set(found)) < max(2, len(found)):
            tokens = ", ".join(f"{answer!r} {list(encoder.ids(answer))}" for answer in self.answers)
            raise LLMError(
                "The judge needs at least two different answers, each exactly one token of this LLM after "
                f"{after[-20:]!r}; the answers and their tokens are {tokens}. Set reward.settings.answers, e.g. [Yes, "
                "No] or [A, B], or a template with another end as reward.settings.template."
            )
        return tuple(ids[-1] for ids in found)


class TermScore(NamedTuple):
    """A text's score, and the score of its tokens inside mentions of listed terms.

    Attributes:
        whole: score of all tokens.
        inside: score of the tokens of mentions.
    """

    whole: TextScore
    inside: TextScore


def score_terms(
    scorer: LLMScorer, requests: Sequence[tuple[Context, Sequence[str], Sequence[str]]]
) -> list[list[TermScore]]:
    """Splits the log-probability of texts by whether a token belongs to a listed term.

    Args:
        scorer: the LLM.
        requests: (context that the LLM reads, terms whose mentions count, texts) per request.

    Returns:
        One list per request, one score per text; NaN for a text that is too long for the LLM.

    Raises:
        LLMError: as ``LLMScorer.score``, or the tokenizer does not know which characters its tokens stand for.
    """
    marked = [[_marked(scorer, text, terms) for text in texts] for _, terms, texts in requests]
    rows = []
    for (context, _, _), texts in zip(requests, marked, strict=True):
        # The beginnings of a text whose log-probabilities give those of its runs, and the whole text.
        beginnings = [ids[:n] for ids, runs in texts for n in (*itertools.chain(*runs), len(ids)) if n]
        rows.append((scorer.encoder.encode_prompt(context), beginnings))
    out = []
    for texts, (_, beginnings), sums in zip(marked, rows, scorer.score_ids(rows), strict=True):
        known = {(): 0.0, **dict(zip(beginnings, sums, strict=True))}
        out.append([_term_score(ids, runs, known) for ids, runs in texts])
    return out


def _term_score(ids: Ids, runs: Sequence[tuple[int, int]], known: Mapping[Ids, float]) -> TermScore:
    """The scores of a text and of its runs, from those of its beginnings."""
    logp = sum(known[ids[:stop]] - known[ids[:start]] for start, stop in runs)
    return TermScore(TextScore(known[ids], len(ids)), TextScore(logp, sum(stop - start for start, stop in runs)))


def _marked(scorer: LLMScorer, text: str, terms: Sequence[str]) -> tuple[Ids, list[tuple[int, int]]]:
    """The ids of a text, and the runs [start, stop) of its tokens that stand for a mention of a term."""
    ids, spans, shown = scorer.encoder.text_spans(text)
    mentions = find_terms(shown, terms)
    inside = [False, *(any(start < m.end and m.start < end for m in mentions) for start, end in spans), False]
    changes = [n for n, (before, now) in enumerate(itertools.pairwise(inside)) if before != now]
    return ids, list(zip(changes[::2], changes[1::2], strict=True))
