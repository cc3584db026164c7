"""The LLM as a judge of transcripts: log p(text | context)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nemo_llm_feedback.config import LLMConfig
from nemo_llm_feedback.errors import LLMError
from nemo_llm_feedback.llm.encoding import PromptEncoder
from nemo_llm_feedback.llm.engine import Engine, Ids, Sharing
from nemo_llm_feedback.llm.loading import load_model
from nemo_llm_feedback.prompts import read_template
from nemo_llm_feedback.types import Context

logger = logging.getLogger(__name__)

_PROBE_CONTEXT = Context(description="a short test", terms=("one", "two"))
_PROBE_TEXTS = ("one two three", "one two four", "a", "one", "two words and then some more of them")
# Largest difference, in nats a token, between shared and plain scoring. A wrong mask or position costs tenths of a nat
# and more on a trained LM; rounding costs hundredths in half precision, and int8 picks its outlier columns by batch.
_TOLERANCE = {"float32": 1e-3, "half": 0.15, "int8": 0.25}


@dataclass(frozen=True)
class TextScore:
    """Score of one text: ``logp`` = Σ log p(token | prompt, earlier tokens), natural log, through the end token;
    ``num_tokens`` counts the end token too. ``logp`` is NaN for a text that does not fit the LLM."""

    logp: float
    num_tokens: int


class LLMScorer:
    """A frozen LLM that scores texts given a context. Make one with ``load_llm``.

    It is no ``nn.Module`` on purpose: assigned to a model it enters neither the state dict nor the optimizer.
    """

    def __init__(self, config: LLMConfig, model: nn.Module, tokenizer: Any, name: str) -> None:
        self._model: Any = model
        chat = config.chat == "on" or (config.chat == "auto" and bool(tokenizer.chat_template))
        template = read_template(config.template, chat=chat)
        self._room = _positions(self._model.config)
        reserve = min(256, self._room // 4)
        self.encoder = PromptEncoder(
            tokenizer,
            template=template,
            chat=chat,
            chat_template_kwargs=config.chat_template_kwargs,
            max_tokens=min(config.max_context_tokens, self._room - reserve),
        )
        with _quiet():
            self.engine = Engine(model, token_budget=config.token_budget)
        dtype = str(self._model.dtype).removeprefix("torch.")
        parts = {
            "model": name,
            "quantization": config.quantization,
            "dtype": dtype,
            "template": template.text,
            "chat": [tokenizer.chat_template, dict(config.chat_template_kwargs)] if chat else None,
            "max_context_tokens": config.max_context_tokens,
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._identity = f"{name}:{config.quantization}:{dtype}:{digest}"
        self._warned_long = False
        self._check_self("int8" if config.quantization == "int8" else dtype)

    @property
    def identity(self) -> str:
        """A string that changes whenever anything does that scores depend on: LLM, storage, dtype, template."""
        return self._identity

    @property
    def memory_bytes(self) -> int:
        """Bytes of the LLM's weights and of the prompts' kept keys and values."""
        return self._model.get_memory_footprint() + self.engine.prefix_bytes

    @property
    def uses_context(self) -> bool:
        """Whether the prompt template shows the context to the LLM at all."""
        return self.encoder.uses_context

    def score(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> list[list[TextScore]]:
        """Scores texts behind their contexts; equal (context, text) pairs run once.

        Leaves torch's random state, grad mode and autocast as they were.

        Args:
            requests: (context, texts) pairs; the empty context and the empty text are allowed.

        Returns:
            One list a request, one ``TextScore`` a text, in the given order.

        Raises:
            LLMError: out of memory with a single text, or the template alone exceeds the prompt's limit.
        """
        encoded = [
            (self.encoder.encode_prompt(context), [self.encoder.encode_text(text) for text in texts])
            for context, texts in requests
        ]
        wanted: dict[Ids, dict[Ids, float]] = {}
        for prompt, texts in encoded:
            wanted.setdefault(prompt, {}).update((ids, float("nan")) for ids in texts)
        with _quiet():
            fitting = [
                (prompt, [ids for ids in scores if len(prompt) + len(ids) <= self._room])
                for prompt, scores in wanted.items()
            ]
            for (prompt, texts), sums in zip(fitting, self.engine.score(fitting), strict=True):
                if len(texts) < len(wanted[prompt]):
                    self._warn_long()
                wanted[prompt].update(zip(texts, sums, strict=True))
        return [[TextScore(wanted[prompt][ids], len(ids)) for ids in texts] for prompt, texts in encoded]

    def _warn_long(self) -> None:
        if not self._warned_long:
            logger.warning(
                "A hypothesis is longer than the LLM can read (%d tokens with its prompt): NaN.", self._room
            )
        self._warned_long = True

    def _check_self(self, kind: str) -> None:
        """Compares shared with plain scoring on a short example; an LLM that does not bear tries goes on without.

        Raises:
            LLMError: they differ, or a score is not finite.
        """
        prompt = self.encoder.encode_prompt(_PROBE_CONTEXT)
        texts = [self.encoder.encode_text(text) for text in _PROBE_TEXTS]
        tolerance = _TOLERANCE.get(kind, _TOLERANCE["half"])
        with _quiet():
            plain = [self.engine.plain_score(prompt, ids) for ids in texts]
            if self.engine.sharing is Sharing.TRIE and self._deviation(prompt, texts, plain) > tolerance:
                logger.warning("This LLM does not take trie-shaped rows: hypotheses share their prompt only.")
                self.engine.sharing = Sharing.PROMPT
            deviation = self._deviation(prompt, texts, plain)
        if deviation > tolerance:
            raise LLMError(
                f"The LLM's start-up check failed: behind a shared prompt a short text scores {deviation:.4f} nat a "
                "token away from a plain forward. Its weights are damaged or its architecture is not supported; try "
                "llm.compute_dtype=float32, or another LLM."
            )

    def _deviation(self, prompt: Ids, texts: Sequence[Ids], plain: Sequence[float]) -> float:
        """Returns the largest difference from plain scoring in nats a token; ∞ for NaN or where the LLM breaks."""
        try:
            ours = self.engine.score([(prompt, texts)])[0]
        except LLMError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            logger.info("Shared scoring failed in the start-up check: %s", error)
            return math.inf
        differences = [abs(a - b) / len(ids) for a, b, ids in zip(ours, plain, texts, strict=True)]
        return max(differences) if all(map(math.isfinite, differences)) else math.inf


def load_llm(config: LLMConfig) -> LLMScorer:
    """Loads the LLM that ``config`` names, and checks its scoring on a short example.

    Raises:
        LLMError: settings, files, template or tokenizer cannot be used, or the check failed.
    """
    return LLMScorer(config, *load_model(config))


def _positions(config: Any) -> int:
    """Longest sequence that the LLM can read, in tokens."""
    text_config = config.get_text_config(decoder=True)
    return getattr(text_config, "max_position_embeddings", None) or 2**20


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes bitsandbytes' remark on casting to float16, which its int8 layers log at every call on float32."""
    noisy = logging.getLogger("bitsandbytes.autograd._functions")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)
