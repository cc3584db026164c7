"""The frozen LLM as a scorer: log p(text | context) of lists of texts, checked against plain forwards."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import loading
from nemo_llm_feedback.llm.encoding import PromptEncoder, hash_of
from nemo_llm_feedback.llm.folder import resolve_folder
from nemo_llm_feedback.llm.packing import ROW_NODES, Ids, Sharing

if TYPE_CHECKING:
    from nemo_llm_feedback.llm.engine import Engine

logger = logging.getLogger(__name__)

_PROBE_CONTEXT = Context(description="a short test", terms=("one", "two"))
_PROBE_TEXTS = ("one two three", "one two four", "a", "one", "two words and then some more of them")
# Largest difference, in nats per token, of shared from plain scoring. A wrong mask or position costs tenths of a nat
# and more on a trained LM; rounding costs hundredths in half precision, and int8 picks its outlier columns by batch.
_TOLERANCE = {"float32": 1e-3, "half": 0.15, "int8": 0.25}
_RECHECK = 1.1  # how much farther rows may reach than those that were compared with a plain forward
_HOW = {Sharing.PROMPT: "hypotheses share their prompt only", Sharing.NONE: "each hypothesis runs by itself (slow)"}


class TextScore(NamedTuple):
    """Score of one text; caches keep the LLM's answers to other questions about a text in the same form.

    Attributes:
        logp: Σ log p(token | prompt, earlier tokens), natural log, through the end token; NaN for a text that is too
            long for the LLM.
        num_tokens: tokens of the text, the end token included.
    """

    logp: float
    num_tokens: int


class LLMScorer:
    """A frozen LLM that scores texts given a context. Make one with ``load_llm`` or ``open_llm``.

    The weights are loaded at the first text that must be scored: a run whose scores are all in its cache needs
    ``identity`` and ``uses_context`` only, which settings and files determine.

    A score equals that of one plain forward over prompt and text within 1e-4 nat where the LLM computes in float32
    (unquantised or NF4), 0.1 nat per token in bfloat16, and the same in int8, whose layers round activations to 8 bits
    (measured: docs/rewards.md).

    It is not an ``nn.Module`` on purpose: assigned to a model it enters neither the state dict nor the optimizer.

    Args:
        config: names the LLM, its quantisation and its prompt.

    Attributes:
        encoder: turns contexts and texts into token ids.
        identity: changes whenever anything changes that scores depend on: LLM, quantisation, dtype, template.
        uses_context: whether the prompt template shows the context to the LLM at all.
        max_positions: the longest sequence that the LLM can read, in tokens.
        num_broken: texts so far that fit the LLM and yet got no finite score.

    Raises:
        LLMError: settings, files, template or tokenizer cannot be used.
    """

    def __init__(self, config: LLMConfig) -> None:
        self._config, self._folder = config, resolve_folder(config)
        _, self._tokenizer = loading.load_tokenizer(str(self._folder), key="llm.model")
        self.max_positions = loading.read_max_positions(self._folder)
        self.encoder = PromptEncoder(self._tokenizer, config, max_positions=self.max_positions)
        self.uses_context = self.encoder.uses_context
        name = loading.checkpoint_name(config, self._folder)
        dtype = str(loading.pick_placement(config)[1]).removeprefix("torch.")
        parts = {"model": name, "quantization": config.quantization, "dtype": dtype, **self.encoder.identity}
        self.identity = f"{name}:{config.quantization}:{dtype}:{hash_of(parts)[:16]}"
        self._tolerance = _TOLERANCE.get("int8" if config.quantization == "int8" else dtype, _TOLERANCE["half"])
        self._warned_long = False
        self._checked_reach = 0
        self.num_broken = 0
        self._engine: Engine | None = None

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The engine that runs the model; the first use loads the weights (see ``load``)."""
        return self._engine or self.load()

    @property
    def model(self) -> Any:
        """The ``transformers`` model, frozen; the first use loads it."""
        return self.engine.model

    @property
    def memory_bytes(self) -> int:
        """Bytes of the LLM's weights and of the prompts' kept keys and values; 0 before it is loaded."""
        return self._engine.memory_bytes if self._engine is not None else 0

    def load(self) -> Engine:
        """Loads the weights and checks the scoring on a short example.

        Raises:
            LLMError: the weights cannot be used, or the check failed.
        """
        from nemo_llm_feedback.llm.engine import Engine  # imports transformers

        # The first text may come in the middle of a training step, whose modes are not the LLM's.
        with torch.inference_mode(False):
            model = loading.load_model(self._config, self._folder, self._tokenizer)
            engine = Engine(model, token_budget=self._config.token_budget)
            self._check(engine)
        self._engine = engine
        return engine

    def unload(self) -> None:
        """Frees the weights; the next text to be scored loads them again."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def score(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> list[list[TextScore]]:
        """Scores texts behind their contexts; equal (context, text) pairs run once.

        Leaves torch's random state, grad mode and autocast as they were.

        Args:
            requests: (context, texts) pairs; the empty context and the empty text are allowed.

        Returns:
            One list per request, one ``TextScore`` per text, in the given order.

        Raises:
            LLMError: out of memory with a single text, or the template alone exceeds the prompt's limit.
        """
        prompts = [self.encoder.encode_prompt(context) for context, _ in requests]
        encoded = [self.encoder.encode_texts(texts) for _, texts in requests]
        sums = self.score_ids(list(zip(prompts, encoded, strict=True)))
        return [list(map(TextScore, row, map(len, texts))) for row, texts in zip(sums, encoded, strict=True)]

    def score_ids(self, requests: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[float]]:
        """Returns Σ log p(token | prompt, earlier tokens) of token ids; equal pairs run once.

        A continuation may be the beginning of another: differences of such sums are scores of spans, and cost no
        further tokens where hypotheses are packed into tries.

        Args:
            requests: (prompt, continuations) pairs, each of at least one token id.

        Returns:
            One list per request, one sum (natural log) per continuation; NaN for one that is too long for the LLM.

        Raises:
            LLMError: out of memory with a single continuation.
        """
        wanted: dict[Ids, dict[Ids, float]] = {}
        for prompt, texts in requests:
            wanted.setdefault(prompt, {}).update((ids, math.nan) for ids in texts)
        limit = self.max_positions
        fitting = {p: [ids for ids in texts if len(p) + len(ids) <= limit] for p, texts in wanted.items()}
        if not self._warned_long and any(len(fitting[prompt]) < len(texts) for prompt, texts in wanted.items()):
            self._warned_long = True
            long = sum(len(texts) - len(fitting[prompt]) for prompt, texts in wanted.items())
            logger.warning(
                "%d hypotheses are longer than the LLM can read (%d tokens with their prompt): they are NaN, their "
                "groups cannot be judged. Shorten the context, or take an LLM with a longer window. Later ones are "
                "not logged.",
                *(long, limit),
            )
        if any(fitting.values()):
            for prompt, sums in self._checked_score(fitting).items():
                wanted[prompt].update(sums)
                self.num_broken += sum(not math.isfinite(logp) for logp in sums.values())
        return [[wanted[prompt][ids] for ids in texts] for prompt, texts in requests]

    def _checked_score(self, requests: Mapping[Ids, Sequence[Ids]]) -> dict[Ids, dict[Ids, float]]:
        """The engine's scores, compared with plain forwards where rows reach farther than any compared before.

        The engine allows for the sliding windows that a config declares. An undeclared one (GPT-Neo's layers have it)
        passes the short start-up check, and then falsifies long prompts and rows of many hypotheses.
        """
        engine = self.engine
        sums = engine.score(requests)
        prompt, texts = max(((p, texts) for p, texts in requests.items() if texts), key=lambda pair: _reach(*pair))
        if _reach(prompt, texts) <= _RECHECK * self._checked_reach:
            return sums
        probes = list({max(texts, key=len), max(texts)})  # the longest one, and the one at the end of a packed row
        plain = [engine.plain_score(prompt, ids) for ids in probes]
        while engine.sharing > Sharing.NONE and all(map(math.isfinite, plain)):
            if _difference([sums[prompt][ids] for ids in probes], plain, probes) <= self._tolerance:
                break
            engine.sharing = Sharing(engine.sharing - 1)
            logger.warning("Long rows score differently in a plain forward: from now on %s.", _HOW[engine.sharing])
            sums = engine.score(requests)
        self._checked_reach = _reach(prompt, texts)
        return sums

    def _check(self, engine: Engine) -> None:
        """Compares shared with plain scoring on a short example; an LLM that cannot take tries goes on without them.

        Raises:
            LLMError: the two differ, or a score is not finite.
        """
        prompt = self.encoder.encode_prompt(_PROBE_CONTEXT)
        texts = self.encoder.encode_texts(_PROBE_TEXTS)
        plain = [engine.plain_score(prompt, ids) for ids in texts]
        while (deviation := _deviation(engine, prompt, texts, plain)) > self._tolerance:
            if engine.sharing is not Sharing.TRIE:
                break
            logger.warning("This LLM does not take trie-shaped rows: %s.", _HOW[Sharing.PROMPT])
            engine.sharing = Sharing.PROMPT
        self._checked_reach = _reach(prompt, texts)
        if deviation > self._tolerance:
            raise LLMError(
                f"The LLM's start-up check failed: behind a shared prompt a short text's score is {deviation:.4f} nat "
                "per token off a plain forward's. Its weights are damaged or its architecture is not supported; try "
                "llm.compute_dtype=float32, or another LLM."
            )


def _deviation(engine: Engine, prompt: Ids, texts: Sequence[Ids], plain: Sequence[float]) -> float:
    """Returns the largest difference from plain scoring in nats per token; ∞ for NaN or where the LLM breaks."""
    try:
        sums = engine.score({prompt: texts})[prompt]
    except LLMError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        logger.info("Shared scoring failed in the start-up check: %s", error)
        return math.inf
    return _difference([sums[ids] for ids in texts], plain, texts)


def _difference(ours: Sequence[float], plain: Sequence[float], texts: Sequence[Ids]) -> float:
    """Returns the largest difference in nats per token; ∞ where one is not finite."""
    differences = [abs(a - b) / len(ids) for a, b, ids in zip(ours, plain, texts, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def _reach(prompt: Ids, texts: Sequence[Ids]) -> int:
    """The most tokens that may lie between the sequence's begin and a node of a row behind this prompt."""
    return len(prompt) + max(max(map(len, texts)), min(ROW_NODES, sum(map(len, texts))))


def open_llm(config: LLMConfig) -> LLMScorer:
    """Checks the LLM's files and reads its tokenizer; the weights wait for the first text to be scored.

    Raises:
        LLMError: settings, files, template or tokenizer cannot be used.
    """
    return LLMScorer(config)


def load_llm(config: LLMConfig) -> LLMScorer:
    """Loads the LLM that ``config`` names and checks its scoring on a short example.

    Raises:
        LLMError: settings, files, template or tokenizer cannot be used, or the check failed.
    """
    scorer = LLMScorer(config)
    scorer.load()
    return scorer
