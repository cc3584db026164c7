"""Lets the LLM write one corrected transcript from the hypotheses of a group, by greedy generation."""

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
_LISTED = 8  # hypotheses that a prompt lists, the first ones
_BATCH = {"cpu": 4, "cuda": 32}  # groups that are answered at a time
_MIN_LIKENESS = 50.0  # an answer less like every listed text is a comment or a refusal, not a correction
_QUOTES = "\"'“”‘’«»「」`*"


class Corrector:
    """Writes the probable transcript, given context and hypotheses; equal questions get equal answers.

    Args:
        scorer: the LLM, an instruct model: a base model hardly ever answers.
        template: a template of kind ``correction``.
        view: how groups are shown to the LLM.

    Attributes:
        identity: changes whenever anything changes that the answers depend on.
        uses_context: whether the template shows the context at all.
        num_asked, num_unusable: groups that the LLM was asked about so far, and those without a usable answer.
    """

    def __init__(self, scorer: LLMScorer, *, template: Template, view: LLMView) -> None:
        self._scorer, self._template, self._view = scorer, template, view
        self._known: dict[tuple[Context, tuple[str, ...]], str | None] = {}
        parts = [scorer.identity, template.text, view.max_terms, view.truecasing, _LISTED]
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
            B transcripts; None where there is nothing to correct, the question is too long for the LLM, or the answer
            is useless: empty, of several lines, not ended within the token limit (twice the longest listed transcript
            and 16 tokens), or sharing less than half of its letters with every listed text.

        Raises:
            LLMError: the LLM cannot be loaded.
        """
        keys = []
        for context, texts in zip(contexts, nbest, strict=True):
            listed = tuple(dict.fromkeys(text for text in texts if text.strip()))[:_LISTED]
            keys.append((self._view.context(context, listed), listed))
        asked = list(dict.fromkeys(key for key in keys if key[1] and key not in self._known))
        answers = self._answers(asked)
        unusable = answers.count(None)
        if unusable and not self.num_unusable:
            logger.warning("An LLM correction is unusable (empty, too long, or a comment). Later ones are counted.")
        self.num_asked += len(asked)
        self.num_unusable += unusable
        self._known.update(zip(asked, answers, strict=True))
        found = [self._known.get(key) for key in keys]
        for key in list(self._known)[:-_KEPT]:  # the oldest ones
            del self._known[key]
        return found

    def _answers(self, asked: Sequence[tuple[Context, tuple[str, ...]]]) -> list[str | None]:
        """Answers per group, generated in batches of similar length; None where there is no usable one."""
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
        found = [(answers.get(n), texts) for n, (_, texts) in enumerate(asked)]
        return [text if text and _resembles(text, texts) else None for text, texts in found]

    def _question(self, context: Context, texts: Sequence[str]) -> tuple[Ids, int]:
        """The prompt of a group, and the most tokens that its answer may have."""
        encoder = self._scorer.encoder
        shown = [truecased(text, context.terms, style=self._view.truecasing) for text in texts]
        return self._prompt(context, shown), 2 * max(len(encoder.encode_text(text)) for text in shown) + 16

    def _prompt(self, context: Context, texts: Sequence[str]) -> Ids:
        """The ids of the question; the context is cut where it is too long, the texts are not."""
        encoder = self._scorer.encoder
        safe = [encoder.safe_text(text) for text in texts]

        def _ids(short: Context) -> Ids:
            begin, prompt = encoder.frame(self._template.render_list(short, safe))
            return (*begin, *encoder.ids(prompt))

        return _ids(encoder.shorten(context, lambda short: len(_ids(short))))

    def _generate(self, questions: Sequence[tuple[Ids, int]]) -> list[str | None]:
        """Greedy answers to one batch of questions, each its prompt and the most tokens of its answer."""
        from transformers import GenerationConfig

        model, encoder = self._scorer.model, self._scorer.encoder
        device = model.get_input_embeddings().weight.device
        prompts = [torch.tensor(ids, device=device) for ids, _ in questions]
        inputs = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        width = inputs.shape[1]
        stored = model.generation_config
        more = stored.eos_token_id if isinstance(stored.eos_token_id, list) else [stored.eos_token_id]
        ends = list(dict.fromkeys([encoder.end_id, *(token for token in more if isinstance(token, int))]))
        longest = max(limit for _, limit in questions)
        stop = [] if encoder.chat else [_line_end(encoder, width, ends)]
        # A checkpoint's generation settings (sampling, repetition penalties) would be mixed into ours.
        model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=longest, eos_token_id=ends, pad_token_id=ends[0]
        )
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                output = model.generate(input_ids=inputs, attention_mask=mask, stopping_criteria=stop)
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
    """A stopping criterion: an answer, which begins at token ``start``, ends with its first line or an end token."""

    def _done(input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Returns [B] (bool) which rows of the token ids [B, L] are done."""
        rows = input_ids[:, start:].tolist()
        found = [not {*ends}.isdisjoint(row) or "\n" in encoder.decode(row).lstrip() for row in rows]
        return torch.tensor(found, device=input_ids.device)

    return _done


def _resembles(answer: str, texts: Sequence[str]) -> bool:
    """Whether an answer shares at least half of its letters with one of the texts, case and spaces aside."""
    written, *others = (text.casefold().replace(" ", "") for text in (answer, *texts))
    return any(fuzz.ratio(written, other) >= _MIN_LIKENESS for other in others)
