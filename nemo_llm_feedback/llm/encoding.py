"""From contexts and hypotheses to token ids.

The prompt and each hypothesis are encoded separately and their ids concatenated: encoding ``prompt + hypothesis`` in
one go lets BPE merge across the boundary, so that hypotheses of one group would not be scored after the same prompt.
Descriptions, terms and hypotheses are untrusted: the LLM's control tokens in them are broken up before encoding.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm.prompts import Template

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

    Attributes:
        chat: whether prompts go through the chat template.
        max_tokens: longest prompt.
        num_truncated: contexts that were too long so far.
        end_id: the token that ends a transcript.

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
        self.chat = chat
        self._chat_kwargs = dict(chat_template_kwargs)
        self.max_tokens = max_tokens
        self._prompts: OrderedDict[Context, tuple[int, ...]] = OrderedDict()
        self._control = _control_tokens(tokenizer)
        contents = sorted((content.strip() for content in self._control.values()), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)", re.IGNORECASE)
        self.num_truncated = 0
        self.end_id = self._find_end_id()

    @property
    def uses_context(self) -> bool:
        """Whether the template has a slot for a description, terms or previous utterances."""
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
            context: too long ones are cut (see ``shorten``); the template and hypotheses never are.

        Raises:
            LLMError: the template alone is longer than ``max_tokens``.
        """
        if context in self._prompts:
            self._prompts.move_to_end(context)
            return self._prompts[context]
        safe = self.shorten(self.safe_context(context), lambda short: len(self._prompt_ids(short)))
        ids = self._prompt_ids(safe)
        if len(ids) > self.max_tokens:
            raise LLMError(
                f"The prompt template alone takes {len(ids)} tokens, {self.max_tokens} are allowed: shorten it or "
                "raise llm.max_context_tokens (within what the LLM can read)."
            )
        self._prompts[context] = ids
        if len(self._prompts) > _CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return ids

    def safe_text(self, text: str) -> str:
        """Returns the text with whatever the tokenizer would read as a control token broken up."""
        return self._safe(text) if self._control.keys() & set(self._ids(text)) else text

    def safe_context(self, context: Context) -> Context:
        """Returns the context with whatever the tokenizer would read as a control token broken up."""
        whole = "\n".join((context.description, *context.terms, *context.previous))
        if not self._control.keys() & set(self._ids(whole)):
            return context
        texts = (context.terms, context.previous)
        return Context(self._safe(context.description), *(tuple(map(self._safe, column)) for column in texts))

    def shorten(self, context: Context, num_tokens: Callable[[Context], int]) -> Context:
        """Returns the context, cut so that its prompt has at most ``max_tokens`` where that is possible.

        Cut are terms from the end of the list, then previous utterances, the oldest first, then words from the end of
        the description; counted in ``num_truncated`` and logged once.

        Args:
            context: without control tokens.
            num_tokens: context → tokens of its prompt.
        """

        def fits(short: Context) -> bool:
            return num_tokens(short) <= self.max_tokens

        if fits(context):
            return context
        self.num_truncated += 1
        terms, previous, words = context.terms, context.previous, context.description.split(" ")
        steps: list[tuple[int, Callable[[int], Context]]] = [
            (len(terms), lambda n: replace(context, terms=terms[:n])),
            (len(previous), lambda n: replace(context, terms=(), previous=previous[len(previous) - n :])),
            (len(words), lambda n: Context(" ".join(words[:n]))),
        ]
        cut = next((step for step in steps if fits(step[1](0))), steps[-1])
        shortened = cut[1](_largest(cut[0], lambda n: fits(cut[1](n))))
        if self.num_truncated == 1:
            logger.warning(
                "A context is longer than %d tokens: kept %d of its %d terms%s%s. Raise llm.max_context_tokens, set "
                "llm.max_terms so that the nearest terms are kept, or shorten the list. Later ones are counted only.",
                self.max_tokens,
                len(shortened.terms),
                len(terms),
                "" if shortened.previous == previous else f" and {len(shortened.previous)} previous utterances",
                "" if shortened.description == context.description else " and a part of its description",
            )
        return shortened

    def ids(self, text: str) -> tuple[int, ...]:
        """Returns the ids of a text that is the user's own (control tokens in it are kept), without an end token."""
        return tuple(self._ids(text))

    def text_spans(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]], str]:
        """Returns what ``encode_text`` does, and which characters each token stands for.

        Returns:
            The ids with the end token; (start, end) in the shown text of every token but the end token; and that text,
            which differs from ``text`` where control tokens were broken up.

        Raises:
            LLMError: the tokenizer is a slow one, which does not tell.
        """
        shown = self.safe_text(text)
        try:
            found = self._tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except NotImplementedError as error:
            raise LLMError(
                "The LLM's tokenizer does not tell which characters its tokens stand for: use a checkpoint with "
                "tokenizer.json, or another reward than entity."
            ) from error
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        kept = [(i, (int(start), int(end))) for i, (start, end) in pairs if i not in self._control]
        return (*(i for i, _ in kept), self.end_id), [span for _, span in kept], shown

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids that the LLM wrote, without control tokens."""
        return str(self._tokenizer.decode([i for i in ids if i not in self._control], skip_special_tokens=True))

    def frame(self, prompt: str) -> tuple[tuple[int, ...], str]:
        """Returns the ids that begin a prompt (a begin token or none), and the prompt in its chat template if any."""
        if self.chat:
            return (), self._chat_text(prompt)
        first = self._tokenizer.bos_token_id
        if first is None and not prompt:
            first = self._tokenizer.eos_token_id  # documents are separated by it in training
        return (() if first is None else (first,)), prompt

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _prompt_ids(self, context: Context) -> tuple[int, ...]:
        begin, prompt = self.frame(self._template.render(context))
        return (*begin, *self._ids(prompt))

    def _chat_text(self, prompt: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": prompt.strip()}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None, **self._chat_kwargs
        )

    def _find_end_id(self) -> int:
        if not self.chat:
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
