"""The LLM as a writer: one corrected transcript from a group's hypotheses, by greedy generation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rapidfuzz import fuzz

from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm.prompts import Template
from nemo_llm_feedback.llm.view import LLMView, restored

if TYPE_CHECKING:
    from nemo_llm_feedback.llm.scorer import LLMScorer

logger = logging.getLogger(__name__)

_KEPT = 65536  # corrections that are kept in memory
_BATCH = {"cpu": 4, "cuda": 32}
_MIN_LIKENESS = 50.0  # an answer less like every listed text is a comment or a refusal, not a correction
_QUOTES = "\"'“”‘’«»「」`*"


class Corrector:
    """Writes what was probably said, given context and hypotheses; the same answer for the same question.

    Args:
        scorer: the LLM; an instruct model, a base model hardly ever answers.
        template: of kind ``correction``.
        view: how groups are shown to the LLM.
        max_hypotheses: how many of the texts the prompt lists, the first ones.

    Attributes:
        identity: changes whenever anything does that the answers depend on.
        num_asked, num_unusable: groups that the LLM was asked about so far, and those without a usable answer.
    """

    def __init__(self, scorer: LLMScorer, *, template: Template, view: LLMView, max_hypotheses: int = 8) -> None:
        self._scorer, self._template, self._view = scorer, template, view
        self._max_hypotheses = max_hypotheses
        self._known: OrderedDict[tuple[Context, tuple[str, ...]], str | None] = OrderedDict()
        parts = [scorer.identity, template.text, view.max_terms, view.restore, max_hypotheses]
        self.identity = "correction:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.num_asked = self.num_unusable = 0
        if not scorer.encoder.chat:
            logger.warning("The LLM has no chat template: a base model's corrections are mostly unusable.")

    @property
    def uses_context(self) -> bool:
        """Whether the template shows the context at all."""
        return self._template.uses_context

    def __call__(self, contexts: Sequence[Context], nbest: Sequence[Sequence[str]]) -> list[str | None]:
        """Corrects groups.

        Args:
            contexts: B contexts.
            nbest: B lists of transcripts, most probable first; repeated and empty ones are left out.

        Returns:
            B transcripts; None where there is nothing to correct or the answer is of no use: empty, of several lines,
            not ended within the token limit (twice the longest listed transcript and 16 tokens), less than half like
            every listed text (by letters), or the question does not fit the LLM.

        Raises:
            LLMError: the LLM cannot be loaded.
        """
        keys = []
        for context, texts in zip(contexts, nbest, strict=True):
            listed = tuple(dict.fromkeys(text for text in texts if text.strip()))[: self._max_hypotheses]
            keys.append((self._view.context(context, listed), listed))
        asked = list(dict.fromkeys(key for key in keys if key[1] and key not in self._known))
        answers = self._answers(asked) if asked else []
        self.num_asked += len(asked)
        unusable = sum(answer is None for answer in answers)
        if unusable and not self.num_unusable:
            logger.warning(
                "An LLM correction is unusable (empty, too long, no transcript); later ones are counted only."
            )
        self.num_unusable += unusable
        self._known.update(zip(asked, answers, strict=True))
        found = [self._known.get(key) for key in keys]
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return found

    def _answers(self, asked: Sequence[tuple[Context, tuple[str, ...]]]) -> list[str | None]:
        encoder = self._scorer.encoder
        questions: list[tuple[tuple[int, ...], int]] = []
        for context, texts in asked:
            shown = [restored(text, context.terms, style=self._view.restore) for text in texts]
            limit = 2 * max(len(encoder.encode_text(text)) for text in shown) + 16
            questions.append((self._prompt(context, shown), limit))
        out: list[str | None] = [None] * len(asked)
        fitting = [n for n, (ids, limit) in enumerate(questions) if self._fits(ids, limit)]
        fitting.sort(key=lambda n: len(questions[n][0]))
        size = _BATCH[self._scorer.model.device.type] if fitting else 1
        while fitting:
            batch = fitting[:size]
            try:
                written = self._generate([questions[n] for n in batch])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = max(1, len(batch) // 2)
                logger.warning("Out of memory while generating: %d groups at a time from now on.", size)
                continue
            out = self._with(out, batch, written)
            fitting = fitting[size:]
        return [
            text if text and _resembles(text, texts) else None for text, (_, texts) in zip(out, asked, strict=True)
        ]

    @staticmethod
    def _with(out: list[str | None], batch: Sequence[int], written: Sequence[str | None]) -> list[str | None]:
        found = dict(zip(batch, written, strict=True))
        return [found.get(n, text) for n, text in enumerate(out)]

    def _prompt(self, context: Context, texts: Sequence[str]) -> tuple[int, ...]:
        encoder = self._scorer.encoder
        safe = [encoder.safe_text(text) for text in texts]

        def ids(short: Context) -> tuple[int, ...]:
            begin, prompt = encoder.frame(self._template.render_list(short, safe))
            return (*begin, *encoder.ids(prompt))

        return ids(encoder.shorten(encoder.safe_context(context), lambda short: len(ids(short))))

    def _fits(self, ids: tuple[int, ...], limit: int) -> bool:
        return len(ids) + limit <= self._scorer.max_positions

    def _generate(self, questions: Sequence[tuple[tuple[int, ...], int]]) -> list[str | None]:
        """Answers of one batch, left-padded, greedy."""
        from transformers import GenerationConfig, StoppingCriteriaList

        model, encoder = self._scorer.model, self._scorer.encoder
        width = max(len(ids) for ids, _ in questions)
        device = model.get_input_embeddings().weight.device
        inputs = torch.tensor([[*[0] * (width - len(ids)), *ids] for ids, _ in questions], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in questions], device=device)
        ends = _end_ids(model, encoder.end_id)
        # A checkpoint's own generation settings (sampling, repetition penalties) would be mixed into ours.
        own, model.generation_config = model.generation_config, GenerationConfig()
        criteria: Any = StoppingCriteriaList([] if encoder.chat else [_LineEnd(encoder, width, ends)])
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                output = model.generate(
                    input_ids=inputs,
                    attention_mask=mask,
                    generation_config=GenerationConfig(
                        do_sample=False,
                        num_beams=1,
                        max_new_tokens=max(limit for _, limit in questions),
                        eos_token_id=ends,
                        pad_token_id=ends[0],
                    ),
                    stopping_criteria=criteria,
                )
        finally:
            model.generation_config = own
        rows = output[:, width:].tolist()
        return [self._usable(row, ends, limit) for row, (_, limit) in zip(rows, questions, strict=True)]

    def _usable(self, ids: Sequence[int], ends: Sequence[int], limit: int) -> str | None:
        end = next((n for n, token in enumerate(ids) if token in ends), None)
        encoder = self._scorer.encoder
        text = encoder.decode(ids[:end]).strip()
        complete = end is not None
        if not encoder.chat and "\n" in text:  # a base LLM goes on with the next line of the document
            text, complete = text.split("\n", 1)[0].rstrip(), True
        if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
            text = text[1:-1].strip()
        usable = complete and text and len(text.splitlines()) == 1 and len(encoder.encode_text(text)) <= limit
        return text if usable else None


class _LineEnd:
    """Stops a row at the end of its first line, or at an end token."""

    def __init__(self, encoder: Any, start: int, ends: Sequence[int]) -> None:
        self._encoder, self._start, self._ends = encoder, start, set(ends)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """[B] bool: which rows are done."""
        rows = input_ids[:, self._start :].tolist()
        done = [bool(self._ends & set(row)) or "\n" in self._encoder.decode(row).lstrip() for row in rows]
        return torch.tensor(done, device=input_ids.device)


def _resembles(answer: str, texts: Sequence[str]) -> bool:
    """Whether an answer is at least half like one of the texts, by letters without case and spaces."""
    written, *others = (text.casefold().replace(" ", "") for text in (answer, *texts))
    return any(fuzz.ratio(written, other) >= _MIN_LIKENESS for other in others)


def _end_ids(model: Any, end_id: int) -> list[int]:
    """The tokens that end an answer: the chat template's, and those of the checkpoint's generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    more = own if isinstance(own, list) else [own]
    return list(dict.fromkeys([end_id, *(token for token in more if isinstance(token, int))]))
