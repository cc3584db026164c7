"""From contexts and hypotheses to token ids.

The prompt and each hypothesis are encoded separately and their ids concatenated: encoding ``prompt + hypothesis`` in
one go lets BPE merge across the boundary, so that hypotheses of one group would not be scored after the same prompt.
Descriptions, terms and hypotheses are untrusted: the LLM's control tokens in them are broken up before encoding.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_llm_feedback.errors import LLMError
from nemo_llm_feedback.prompts import Template
from nemo_llm_feedback.types import Context

logger = logging.getLogger(__name__)

_PROBE = "transcript"  # stands in for the answer when the chat template's end-of-turn token is looked up
_CACHED_PROMPTS = 4096


class PromptEncoder:
    """Encodes contexts into prompts of at most ``max_tokens`` tokens, and hypotheses through their end token.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        template: the prompt template.
        chat: put the prompt into the tokenizer's chat template as the user's message, the hypothesis being the answer.
        chat_template_kwargs: extra variables of the chat template.
        max_tokens: longest prompt; a longer context is truncated, terms first.

    Raises:
        LLMError: there is no chat template, no token that ends a transcript, or none that could begin an empty prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: Template,
        chat: bool,
        chat_template_kwargs: Mapping[str, Any],
        max_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._chat = chat
        self._chat_kwargs = dict(chat_template_kwargs)
        self._max_tokens = max_tokens
        self._prompts: OrderedDict[Context, tuple[int, ...]] = OrderedDict()
        self._control = _control_tokens(tokenizer)
        contents = sorted((content.strip() for content in self._control.values()), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)", re.IGNORECASE)
        self.num_truncated = 0
        self.end_id = self._find_end_id()

    @property
    def uses_context(self) -> bool:
        """Whether the template has a slot for a description or terms."""
        return self._template.uses_context

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Returns the ids of a hypothesis followed by the end token; the empty text is the end token alone."""
        ids = self._ids(text)
        if self._control.keys() & set(ids):
            ids = [i for i in self._ids(self._safe(text)) if i not in self._control]
        return (*ids, self.end_id)

    def encode_prompt(self, context: Context) -> tuple[int, ...]:
        """Returns the prompt's ids, at least one and at most ``max_tokens``.

        Args:
            context: description and terms. Too long ones are cut, terms from the end of the list first, then words
                from the end of the description; counted in ``num_truncated`` and logged once.

        Raises:
            LLMError: the template alone is longer than ``max_tokens``.
        """
        if context in self._prompts:
            self._prompts.move_to_end(context)
            return self._prompts[context]
        safe = context
        if self._control.keys() & set(self._ids("\n".join((context.description, *context.terms)))):
            safe = Context(self._safe(context.description), tuple(map(self._safe, context.terms)))
        ids = self._prompt_ids(safe)
        if len(ids) > self._max_tokens:
            ids = self._truncated(safe)
        self._prompts[context] = ids
        if len(self._prompts) > _CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _prompt_ids(self, context: Context) -> tuple[int, ...]:
        prompt = self._template.render(context)
        if self._chat:
            return tuple(self._ids(self._chat_text(prompt)))
        first = self._tokenizer.bos_token_id
        if first is None and not prompt:
            first = self._tokenizer.eos_token_id  # documents are separated by it in training
        return tuple(self._ids(prompt)) if first is None else (first, *self._ids(prompt))

    def _chat_text(self, prompt: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": prompt.strip()}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None, **self._chat_kwargs
        )

    def _find_end_id(self) -> int:
        if not self._chat:
            if self._tokenizer.eos_token_id is None:
                raise LLMError("The tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json.")
            return self._tokenizer.eos_token_id
        if not self._tokenizer.chat_template:
            raise LLMError("llm.chat=on, but the tokenizer has no chat template: set llm.chat=off.")
        prompt = self._template.render(Context(description="a recording"))
        question, whole = self._chat_text(prompt), self._chat_text(prompt, _PROBE)
        if not whole.startswith(question + _PROBE):
            raise LLMError(
                "The chat template writes something else before an answer than before the answer to come, so a "
                "transcript cannot be scored as the answer. For a thinking model set "
                "llm.chat_template_kwargs={enable_thinking: false}; otherwise set llm.chat=off."
            )
        tail = self._ids(whole[len(question + _PROBE) :].lstrip())
        if not tail or tail[0] not in self._control:
            raise LLMError("The chat template does not end an answer with a control token: set llm.chat=off.")
        return tail[0]

    def _safe(self, text: str) -> str:
        """Puts a space after the first character of whatever the tokenizer would read as a control token."""
        while match := self._control_pattern.search(text):
            cut = match.start() + 1
            kept = cut if match.end() > cut else cut - 1  # a single character cannot be broken, only left out
            text = text[:kept] + " " + text[cut:]
        if self._control.keys() & set(self._ids(text)):  # found only after the tokenizer's own normalisation
            text = " ".join(text)
        return text

    def _truncated(self, context: Context) -> tuple[int, ...]:
        self.num_truncated += 1
        words = context.description.split(" ")
        bare = replace(context, terms=())
        if len(self._prompt_ids(bare)) <= self._max_tokens:
            kept = _largest(len(context.terms), lambda n: self._fits(replace(context, terms=context.terms[:n])))
            shortened = replace(context, terms=context.terms[:kept])
        else:
            kept = 0
            num_words = _largest(len(words), lambda n: self._fits(Context(description=" ".join(words[:n]))))
            shortened = Context(description=" ".join(words[:num_words]))
        ids = self._prompt_ids(shortened)
        if len(ids) > self._max_tokens:
            raise LLMError(
                f"The prompt template alone takes {len(ids)} tokens, {self._max_tokens} are allowed: shorten it or "
                "raise llm.max_context_tokens (within what the LLM can read)."
            )
        if self.num_truncated == 1:
            logger.warning(
                "A context is longer than %d tokens: kept %d of its %d terms%s. Raise llm.max_context_tokens or "
                "shorten the list. Later truncations are counted, not logged.",
                self._max_tokens,
                kept,
                len(context.terms),
                "" if len(shortened.description) == len(context.description) else " and a part of its description",
            )
        return ids

    def _fits(self, context: Context) -> bool:
        return len(self._prompt_ids(context)) <= self._max_tokens


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Added tokens (id → text) that are no ordinary words or white space, special or not (``<tool_call>``)."""
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and (token.special or not all(c.isalnum() or c in " \t\n▁" for c in token.content))
    }


def _largest(upper: int, fits: Any) -> int:
    """Returns the largest n in [0, upper] with ``fits(n)``, for a ``fits`` that turns false once; 0 if none."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
