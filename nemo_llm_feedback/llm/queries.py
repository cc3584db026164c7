"""What can be asked of the scoring LLM beside a whole hypothesis's log-probability: fixed answers, and spans.

Both are differences of sums over beginnings of one token sequence. Behind a shared prompt and packed into tries such
sums cost the hypothesis and the question once, and each answer one token that is only predicted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm.prompts import Template
from nemo_llm_feedback.llm.term_ranking import find_terms

if TYPE_CHECKING:
    from nemo_llm_feedback.llm.scorer import LLMScorer

Ids = tuple[int, ...]
_PROBE = Context("a recording")


class AnswerJudge:
    """Asks the LLM a question about a transcript and returns the log-probabilities of fixed answers.

    Args:
        scorer: the LLM.
        template: of kind ``judge``.
        answers: as they stand in the running text: a base LLM's begin with a space if the template ends in a word.

    Attributes:
        answers: as given.
        identity: changes whenever anything does that the answers depend on.

    Raises:
        LLMError: an answer is not exactly one token where the template ends, or two are the same token.
    """

    def __init__(self, scorer: LLMScorer, *, template: Template, answers: Sequence[str]) -> None:
        self._scorer, self._template = scorer, template
        self.answers = tuple(answers)
        self._answer_ids = self._single_tokens()
        parts = [scorer.identity, template.text, self.answers]
        self.identity = "judge:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def uses_context(self) -> bool:
        """Whether the template shows the context at all."""
        return self._template.uses_context

    def __call__(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> list[list[tuple[float, ...]]]:
        """Asks about texts behind their contexts.

        Returns:
            One list a request, one tuple a text: natural-log probability of each answer given context, text and
            question; NaN for a text that does not fit the LLM.

        Raises:
            LLMError: out of memory with a single text, or the template alone exceeds the prompt's limit.
        """
        rows: list[tuple[Ids, list[Ids]]] = []
        for context, texts in requests:
            head, tail = self._prompt(context)
            asked = [(*self._scorer.encoder.encode_text(text)[:-1], *tail) for text in texts]
            rows.append((head, [(*ids, *end) for ids in asked for end in ((), *((i,) for i in self._answer_ids))]))
        answers = []
        width = len(self.answers) + 1
        for sums in self._scorer.score_ids(rows):
            groups = [sums[start : start + width] for start in range(0, len(sums), width)]
            answers.append([tuple(with_answer - base for with_answer in rest) for base, *rest in groups])
        return answers

    def _prompt(self, context: Context) -> tuple[Ids, Ids]:
        """The ids before and after the transcript, without any answer."""
        encoder = self._scorer.encoder
        safe = encoder.shorten(encoder.safe_context(context), lambda short: sum(map(len, self._halves(short))))
        head, tail = self._halves(safe)
        if len(head) + len(tail) > encoder.max_tokens:
            raise LLMError(
                f"The judge's template alone takes {len(head) + len(tail)} tokens, {encoder.max_tokens} are allowed: "
                "shorten it or raise llm.max_context_tokens."
            )
        return head, tail

    def _halves(self, context: Context) -> tuple[Ids, Ids]:
        begin, before, after = self._texts(context)
        head = (*begin, *self._scorer.encoder.ids(before))
        return head, self._scorer.encoder.ids(after)

    def _texts(self, context: Context) -> tuple[Ids, str, str]:
        begin, prompt = self._scorer.encoder.frame(self._template.render_question(context))
        before, after = prompt.split(self._template.mark)
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
        found, faults = [], []
        for answer in self.answers:
            ids = encoder.ids(after + answer)
            if ids[: len(tail)] != tail or len(ids) != len(tail) + 1:
                pieces = ids[len(tail) :] if ids[: len(tail)] == tail else encoder.ids(answer)
                faults.append(f"{answer!r} is {len(pieces)} tokens ({', '.join(map(str, pieces))})")
            else:
                found.append(ids[-1])
        if len(set(found)) < len(found):
            faults.append("two answers are the same token")
        if faults or len(found) < 2:
            reason = "; ".join(faults) or f"{len(found)} given"
            raise LLMError(
                "The judge needs at least two different answers, each exactly one token of this LLM after "
                f"{after[-20:]!r}: {reason}. Set reward.settings.answers, e.g. [Yes, No] or [A, B], and, if need be, "
                "reward.settings.template to a template that ends otherwise."
            )
        return tuple(found)


@dataclass(frozen=True)
class TermScore:
    """Log-probabilities of a text's tokens, natural log.

    Attributes:
        total: of all tokens through the end token.
        inside: of those that are part of a mention of a listed term.
        num_inside: how many those are.
        num_tokens: all of them.
    """

    total: float
    inside: float
    num_inside: int
    num_tokens: int


def score_terms(
    scorer: LLMScorer, requests: Sequence[tuple[Context, Sequence[str], Sequence[str]]]
) -> list[list[TermScore]]:
    """Splits the log-probability of texts by whether a token belongs to a listed term.

    Args:
        scorer: the LLM.
        requests: (context that the LLM reads, terms whose mentions count, texts).

    Returns:
        One list a request, one score a text; NaN for a text that does not fit the LLM.

    Raises:
        LLMError: as ``LLMScorer.score``, or the tokenizer does not tell which characters its tokens stand for.
    """
    rows, plans = [], []
    for context, terms, texts in requests:
        marked = [_marked(scorer, text, terms) for text in texts]
        beginnings = [ids[:n] for ids, runs in marked for n in (*(n for run in runs for n in run if n), len(ids))]
        rows.append((scorer.encoder.encode_prompt(context), beginnings))
        plans.append(marked)
    out = []
    for marked, (_, beginnings), sums in zip(plans, rows, scorer.score_ids(rows), strict=True):
        known = dict(zip(beginnings, sums, strict=True))
        known[()] = 0.0
        out.append(
            [
                TermScore(
                    known[ids],
                    sum(known[ids[:stop]] - known[ids[:start]] for start, stop in runs),
                    sum(stop - start for start, stop in runs),
                    len(ids),
                )
                for ids, runs in marked
            ]
        )
    return out


def _marked(scorer: LLMScorer, text: str, terms: Sequence[str]) -> tuple[Ids, list[tuple[int, int]]]:
    """The ids of a text, and the runs [start, stop) of its tokens that stand for a mention of a term."""
    ids, spans, shown = scorer.encoder.text_spans(text)
    mentions = find_terms(shown, terms)
    runs: list[tuple[int, int]] = []
    for n, (start, end) in enumerate(spans):
        if any(start < m.end and m.start < end for m in mentions):
            if runs and runs[-1][1] == n:
                runs[-1] = (runs[-1][0], n + 1)
            else:
                runs.append((n, n + 1))
    return ids, runs
