"""Encodes prompts and hypotheses as the LLM's token ids.

The prompt and each hypothesis are encoded separately and their ids concatenated: encoding ``prompt + hypothesis`` in
one go lets BPE merge across the boundary, so that hypotheses of one group would not be scored after the same prompt.
Descriptions, terms and hypotheses are untrusted: the LLM's control tokens in them are broken up before encoding.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm.chat import ChatFrame, chat_frame
from nemo_llm_feedback.llm.packing import Ids
from nemo_llm_feedback.llm.prompts import read_template

logger = logging.getLogger(__name__)

_PLAIN = {"add_special_tokens": False, "verbose": False}
_CACHED_PROMPTS = 4096
_CACHED_TEXTS = 8192  # ids of as many hypotheses take about 20 MB


class PromptEncoder:
    """Encodes contexts into prompts of at most ``max_tokens`` tokens, and hypotheses through their end token.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        config: names the template, how a chat template wraps it, and the longest prompt.
        max_positions: longest sequence that the LLM can read, in tokens; up to 256 are kept for the hypothesis.

    Attributes:
        chat: whether prompts go through the tokenizer's chat template as the user's message, the hypothesis being the
            answer.
        max_tokens: longest prompt in tokens; a longer context is truncated, terms first.
        uses_context: whether the template shows the context at all.
        identity: everything that decides the ids of a context and a text, apart from the tokenizer's files.
        num_truncated: contexts that were too long so far.
        end_id: the token that ends a transcript.

    Raises:
        LLMError: the template is faulty, or the tokenizer lacks the chat template or the token that ends a transcript.
    """

    def __init__(self, tokenizer: Any, config: LLMConfig, *, max_positions: int) -> None:
        self._tokenizer = tokenizer
        self.chat = config.chat == "on" or (config.chat == "auto" and bool(tokenizer.chat_template))
        self._frame = chat_frame(tokenizer, config.chat_template_kwargs) if self.chat else None
        self._template = read_template(config.template, chat=self.chat)
        self.max_tokens = min(config.max_context_tokens, max_positions - min(256, max_positions // 4))
        self.uses_context = self._template.uses_context
        # Its text as rendered, too: a template may write what nobody gave it, such as today's date.
        rendered = self._frame("transcript") if self._frame else None
        chat = [tokenizer.chat_template, config.chat_template_kwargs, rendered] if self.chat else None
        self._lead, self._cut = "", 0  # what answers are encoded behind, and how many of the ids are then not theirs
        if self._frame and self._frame.gap:
            self._frame, self._lead = self._led(self._frame)
            chat = [*(chat or []), self._lead, self._frame.after]
        elif found := self._running():
            self._lead, self._cut = found
            chat = [*(chat or []), *found]
        self.identity = {"template": self._template.text, "chat": chat, "max_context_tokens": self.max_tokens}
        self._control = _control_tokens(tokenizer)
        unknown = [tokenizer.unk_token] if tokenizer.unk_token else []  # as a text it is broken up, as a sign left out
        contents = sorted({content.strip() for content in (*self._control.values(), *unknown)}, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)", re.IGNORECASE)
        self._cached_prompt = functools.lru_cache(_CACHED_PROMPTS)(lambda context: self.fit(context, self._parts)[0])
        self._texts: dict[str, Ids] = {}
        self.num_truncated = 0
        self.end_id = self._find_end_id()

    def encode_text(self, text: str) -> Ids:
        """Returns the ids of a hypothesis followed by the end token; the empty text is the end token alone."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str], *, answer: bool = True) -> list[Ids]:
        """Returns what ``encode_text`` returns per text; the new ones go through the tokenizer in one call.

        Args:
            texts: hypotheses.
            answer: whether they stand as answers, as the prompt goes on into them.
        """
        if len(self._texts) + len(texts) > _CACHED_TEXTS:
            self._texts.clear()
        texts = [self._lead + text if answer and text else text for text in texts]
        if missing := [text for text in dict.fromkeys(texts) if text not in self._texts]:
            found = self._tokenizer(missing, **_PLAIN)["input_ids"]
            cut = self._cut if answer else 0
            ended = (self._ended(text, tuple(ids), cut=cut) for text, ids in zip(missing, found, strict=True))
            self._texts.update(zip(missing, ended, strict=True))
        return [self._texts[text] for text in texts]

    def encode_prompt(self, context: Context) -> Ids:
        """Returns the prompt's ids, at least one and at most ``max_tokens``.

        Args:
            context: what the LLM is given to know; cut if it is too long (see ``shorten``).

        Raises:
            LLMError: the template alone is longer than ``max_tokens``.
        """
        return self._cached_prompt(context)

    def fit(self, context: Context, parts: Callable[[Context], tuple[Ids, ...]]) -> tuple[Ids, ...]:
        """Returns the ids of a prompt's parts, together at most ``max_tokens`` of them.

        Args:
            context: what the LLM is given to know; cut if it is too long (see ``shorten``).
            parts: function from a context to the ids of its prompt's parts.

        Raises:
            LLMError: the template alone is longer than ``max_tokens``.
        """
        found = parts(self.shorten(context, lambda short: sum(map(len, parts(short)))))
        if (length := sum(map(len, found))) > self.max_tokens:
            raise LLMError(
                f"The prompt template alone takes {length} tokens, {self.max_tokens} are allowed: shorten it or raise "
                "llm.max_context_tokens (within what the LLM can read)."
            )
        return found

    def safe_text(self, text: str) -> str:
        """Returns the text, in which whatever the tokenizer would read as a control token is broken up."""
        return self._safe(text) if self._controlled(text) else text

    def shorten(self, context: Context, num_tokens: Callable[[Context], int]) -> Context:
        """Returns the context, cut so that its prompt has at most ``max_tokens`` where that is possible.

        Cut are terms from the end of the list, then previous utterances, the oldest first, then words from the end of
        the description; counted in ``num_truncated`` and logged once.

        Args:
            context: what the LLM is given to know; control tokens in it are broken up.
            num_tokens: function from a context to the number of its prompt's tokens.
        """
        context = self._safe_context(context)
        if num_tokens(context) <= self.max_tokens:
            return context
        self.num_truncated += 1
        words = context.description.split(" ")

        def _without(n: int) -> Context:
            """The context without its last n terms, then its oldest utterances, then its last words."""
            num_terms, num_previous = len(context.terms), len(context.previous)
            kept = len(words) - max(0, n - num_terms - num_previous)
            terms, previous = context.terms[: max(0, num_terms - n)], context.previous[max(0, n - num_terms) :]
            return Context(" ".join(words[:kept]), terms, previous)

        total = len(context.terms) + len(context.previous) + len(words)
        # The fewest that must go; without more of them it fits, too.
        fewest = bisect.bisect_left(range(total), True, key=lambda n: num_tokens(_without(n)) <= self.max_tokens)
        shortened = _without(fewest)
        if self.num_truncated == 1:
            logger.warning(
                "A context is longer than %d tokens: kept %d of its %d terms, %d of its %d previous utterances and %d "
                "of %d words. Raise llm.max_context_tokens, set llm.max_terms so that the nearest terms are kept, or "
                "shorten the list. Later ones are counted only.",
                self.max_tokens,
                *(len(shortened.terms), len(context.terms), len(shortened.previous), len(context.previous)),
                *(len(shortened.description.split()), len(context.description.split())),
            )
        return shortened

    def ids(self, text: str) -> Ids:
        """Returns the ids of a text as it is (control tokens in it are kept), without an end token."""
        return tuple(self._tokenizer(text, **_PLAIN)["input_ids"])

    def text_spans(self, text: str) -> tuple[Ids, list[tuple[int, int]], str]:
        """Returns the ids that ``encode_text`` returns, and which characters each token stands for.

        Returns:
            The ids with the end token; (start, end) in the shown text of every token but the end token; and that text,
            which differs from ``text`` where control tokens were broken up.

        Raises:
            LLMError: the tokenizer is a slow one, which does not know its tokens' characters.
        """
        shown = self.safe_text(text)
        try:
            found = self._tokenizer(self._lead * bool(shown) + shown, return_offsets_mapping=True, **_PLAIN)
        except NotImplementedError as error:
            raise LLMError(
                "The LLM's tokenizer does not know which characters its tokens stand for: use a checkpoint with "
                "tokenizer.json, or another reward than entity."
            ) from error
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        led = len(self._lead)
        kept = [(i, (max(0, start - led), max(0, end - led))) for i, (start, end) in pairs if i not in self._control]
        kept = kept[self._cut :]
        return (*(i for i, _ in kept), self.end_id), [span for _, span in kept], shown

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids that the LLM wrote, without control tokens."""
        return str(self._tokenizer.decode([i for i in ids if i not in self._control], skip_special_tokens=True))

    @property
    def gap(self) -> str:
        """What the chat template writes between a prompt and its answer, and the prompt does not end with."""
        return self._frame.gap if self._frame else ""

    def frame(self, prompt: str) -> tuple[Ids, str]:
        """Returns the ids that begin a prompt (a begin token or none), and its text, wrapped in the chat template."""
        if self._frame:
            return (), self._frame(prompt.strip())
        first = self._tokenizer.bos_token_id
        if first is None and not prompt:
            first = self._tokenizer.eos_token_id  # documents are separated by it in training
        return (() if first is None else (first,)), prompt

    def _ended(self, text: str, ids: Ids, *, cut: int) -> Ids:
        """The ids of a text without control tokens and without the first ones, and the end token."""
        if self._control_pattern.search(text) or not self._control.keys().isdisjoint(ids):
            ids = tuple(i for i in self.ids(self._safe(text)) if i not in self._control)
        return (*ids[cut:], self.end_id)

    def _running(self) -> tuple[str, int] | None:
        """What transcripts are encoded behind, so that their ids are those that running text would have.

        Some SentencePiece tokenizers mark the first word of whatever they are given as one behind a space, where the
        prompt ends with a line break. None: the ids of prompt and transcript simply follow each other.
        """
        prompt = self.frame(self._template.render(Context("a")))[1]
        whole, lead = self.ids(f"{prompt}transcript"), prompt[-1:]
        if not lead or whole == (*self.ids(prompt), *self.ids("transcript")):
            return None
        before, led = self.ids(lead), self.ids(f"{lead}transcript")
        running = (*self.ids(prompt), *led[len(before) :])
        known = self._tokenizer.unk_token_id not in led  # else a line break is nothing to this tokenizer
        return (lead, len(before)) if known and led[: len(before)] == before and whole == running else None

    def _led(self, frame: ChatFrame) -> tuple[ChatFrame, str]:
        """A frame whose template writes a space before an answer, and what stands before a transcript for it.

        Nothing where the tokenizer writes that space itself, as those with word marks do; the space where it becomes
        a part of the first word's token; else it is the end of the prompt.
        """
        prompt, whole = self.ids(frame("a")), self.ids(f"{frame('a')}{frame.gap}transcript")
        for lead in ("", frame.gap):
            if whole == (*prompt, *self.ids(f"{lead}transcript")):
                return frame, lead
        return dataclasses.replace(frame, after=frame.after + frame.gap, gap=""), ""

    def _parts(self, context: Context) -> tuple[Ids]:
        """The one part of a scoring prompt: all of it."""
        begin, prompt = self.frame(self._template.render(context))
        return ((*begin, *self.ids(prompt)),)

    def _find_end_id(self) -> int:
        if self._frame is None:
            if self._tokenizer.eos_token_id is None:
                raise LLMError("The tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json.")
            return self._tokenizer.eos_token_id
        tail = self.ids(self._frame.end.lstrip())
        if not tail or tail[0] not in self._control:
            raise LLMError("The chat template does not end an answer with a control token: set llm.chat=off.")
        return tail[0]

    def _safe_context(self, context: Context) -> Context:
        """Returns the context, in which whatever the tokenizer would read as a control token is broken up."""
        whole = "\n".join((context.description, *context.terms, *context.previous))
        if not self._controlled(whole):
            return context
        texts = (context.terms, context.previous)
        return Context(self._safe(context.description), *(tuple(map(self._safe, column)) for column in texts))

    def _safe(self, text: str) -> str:
        """Puts a space after the first character of whatever the tokenizer would read as a control token."""
        while match := self._control_pattern.search(text):
            cut = match.start() + 1
            kept = cut if match.end() > cut else cut - 1  # a single character cannot be broken, only left out
            text = text[:kept] + " " + text[cut:]
        if self._controlled(text):  # found only after the tokenizer's normalisation
            text = " ".join(text)
        return text

    def _controlled(self, text: str) -> bool:
        """Whether the tokenizer reads a control token in the text."""
        return bool(self._control_pattern.search(text)) or not self._control.keys().isdisjoint(self.ids(text))


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Added tokens (id → text) other than ordinary words and white space, special or not (``<tool_call>``).

    The one for characters that the tokenizer lacks is none of them: a text with such a character is whole but for it.
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if (token_id != tokenizer.unk_token_id or token_id in ends)
        and token.content.strip()
        and (token.special or not all(c.isalnum() or c in " \t\n▁" for c in token.content))
    }


def hash_of(parts: object) -> str:
    """Returns the SHA-256, in hexadecimal digits, of a structure of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
