"""Writes one corrected transcript from a group's hypotheses with the LLM, by greedy generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rapidfuzz import fuzz
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm.encoding import PromptEncoder, hash_of
from nemo_llm_feedback.llm.packing import Ids
from nemo_llm_feedback.llm.prompts import Template
from nemo_llm_feedback.llm.scorer import LLMScorer
from nemo_llm_feedback.llm.view import LLMView, truecased

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
        uses_context: whether the template shows the context at all.
        num_asked, num_unusable: groups that the LLM was asked about so far, and those without a usable answer.
    """

    def __init__(self, scorer: LLMScorer, *, template: Template, view: LLMView, max_hypotheses: int = 8) -> None:
        self._scorer, self._template, self._view = scorer, template, view
        self._max_hypotheses = max_hypotheses
        self._known: dict[tuple[Context, tuple[str, ...]], str | None] = {}
        parts = [scorer.identity, template.text, view.max_terms, view.truecasing, max_hypotheses]
        self.identity = f"correction:{hash_of(parts)}"
        self.uses_context = template.uses_context
        self.num_asked = self.num_unusable = 0
        if not scorer.encoder.chat:
            logger.warning("The LLM has no chat template: a base model's corrections are mostly unusable.")

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
        answers = self._answers(asked)
        unusable = answers.count(None)
        if unusable and not self.num_unusable:
            logger.warning("An LLM correction is unusable (empty, too long, no transcript). Later ones are counted.")
        self.num_asked += len(asked)
        self.num_unusable += unusable
        self._known.update(zip(asked, answers, strict=True))
        found = [self._known.get(key) for key in keys]
        for key in list(self._known)[:-_KEPT]:  # the oldest ones
            del self._known[key]
        return found

    def _answers(self, asked: Sequence[tuple[Context, tuple[str, ...]]]) -> list[str | None]:
        """Answers of groups, generated in batches of similar length; None where there is none of use."""
        questions = [self._question(*group) for group in asked]
        fitting = [n for n, (ids, limit) in enumerate(questions) if len(ids) + limit <= self._scorer.max_positions]
        fitting.sort(key=lambda n: len(questions[n][0]))
        answers: dict[int, str | None] = {}
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
            answers.update(zip(batch, written, strict=True))
            fitting = fitting[size:]
        return [
            text if (text := answers.get(n)) and _resembles(text, texts) else None
            for n, (_, texts) in enumerate(asked)
        ]

    def _question(self, context: Context, texts: Sequence[str]) -> tuple[Ids, int]:
        """The prompt of a group, and the most tokens that its answer may have."""
        encoder = self._scorer.encoder
        shown = [truecased(text, context.terms, style=self._view.truecasing) for text in texts]
        return self._prompt(context, shown), 2 * max(len(encoder.encode_text(text)) for text in shown) + 16

    def _prompt(self, context: Context, texts: Sequence[str]) -> Ids:
        encoder = self._scorer.encoder
        safe = [encoder.safe_text(text) for text in texts]

        def ids(short: Context) -> Ids:
            """The prompt's ids with a context that may have been cut."""
            begin, prompt = encoder.frame(self._template.render_list(short, safe))
            return (*begin, *encoder.ids(prompt))

        return ids(encoder.shorten(context, lambda short: len(ids(short))))

    def _generate(self, questions: Sequence[tuple[Ids, int]]) -> list[str | None]:
        """Answers of one batch, left-padded, greedy."""
        from transformers import GenerationConfig

        model, encoder = self._scorer.model, self._scorer.encoder
        device = model.get_input_embeddings().weight.device
        prompts = [torch.tensor(ids, device=device) for ids, _ in questions]
        inputs = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        width = inputs.shape[1]
        # A checkpoint's generation settings (sampling, repetition penalties) would be mixed into ours.
        stored, model.generation_config = model.generation_config, GenerationConfig()
        ends = _end_ids(stored, encoder.end_id)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                output = model.generate(
                    input_ids=inputs,
                    attention_mask=mask,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=max(limit for _, limit in questions),
                    eos_token_id=ends,
                    pad_token_id=ends[0],
                    stopping_criteria=[] if encoder.chat else [_line_end(encoder, width, ends)],
                )
        finally:
            model.generation_config = stored
        rows = output[:, width:].tolist()
        return [self._usable(row, ends, limit) for row, (_, limit) in zip(rows, questions, strict=True)]

    def _usable(self, ids: Sequence[int], ends: Sequence[int], limit: int) -> str | None:
        """The text of an answer if it is a single line that ended within the limit."""
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


def _line_end(encoder: PromptEncoder, start: int, ends: Sequence[int]) -> Callable[..., Tensor]:
    """A stopping criterion: a row is done at the end of its first line, or at an end token."""

    def done(input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Returns [B] which rows of ids [B, L] are done."""
        rows = input_ids[:, start:].tolist()
        found = [not {*ends}.isdisjoint(row) or "\n" in encoder.decode(row).lstrip() for row in rows]
        return torch.tensor(found, device=input_ids.device)

    return done


def _resembles(answer: str, texts: Sequence[str]) -> bool:
    """Whether an answer is at least half like one of the texts, by letters without case and spaces."""
    written, *others = (text.casefold().replace(" ", "") for text in (answer, *texts))
    return any(fuzz.ratio(written, other) >= _MIN_LIKENESS for other in others)


def _end_ids(settings: Any, end_id: int) -> list[int]:
    """The tokens that end an answer: the chat template's, and those of the checkpoint's generation settings."""
    stored = settings.eos_token_id
    more = stored if isinstance(stored, list) else [stored]
    return list(dict.fromkeys([end_id, *(token for token in more if isinstance(token, int))]))
