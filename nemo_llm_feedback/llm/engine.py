"""Sums of log-probabilities of continuations of a prompt, sharing the prompt's work.

The prompt runs through the model once; its keys and values are kept for the whole run (least recently used ones go
first). Continuations are batched behind them: each layer sees the prompt's keys expanded over the batch, joined to the
batch's own for that layer only, so that no copy of the prompt outlives a layer. Hidden states of real tokens are picked
before the output matrix, and the log-softmax is taken in float32 over a few hundred positions at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nemo_llm_feedback.errors import LLMError

logger = logging.getLogger(__name__)

Ids = tuple[int, ...]
_HEAD_CHUNK = 256  # positions × vocabulary in float32 at a time
_PREFIX_BYTES = 512 * 2**20  # keys and values of prompts that are kept
_KEY_FACTOR = 16  # rows × (prompt + continuation) ≤ this × token budget: bounds one layer's joined keys


class SharedPrefixLayer(CacheLayerMixin):
    """One layer's keys and values of a prompt, [1, heads, P, head_dim], joined to a batch's own and never changed."""

    is_sliding = False  # sliding-window layers keep all of the prompt; the model's mask hides what is out of reach

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._prefix_keys, self._prefix_values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is made with its tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns prompt and new states joined: [B, heads, P + L, head_dim] each, for new states [B, heads, L, …]."""
        rows = key_states.shape[0]
        keys = torch.cat([self._prefix_keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        values = torch.cat([self._prefix_values.expand(rows, -1, -1, -1), value_states], dim=-2)
        return keys, values

    def get_seq_length(self) -> int:
        """Returns P, the prompt's length in tokens."""
        return self._prefix_keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that ``query_length`` new tokens see, and the first one's index."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Returns −1: no limit."""
        return -1


@dataclass(frozen=True)
class Prefix:
    """A prompt's state: per layer (keys, values), and the log-probabilities [V] (float32) of what follows it."""

    length: int
    layers: tuple[tuple[Tensor, Tensor], ...]
    next_logp: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of the state in bytes."""
        tensors = [self.next_logp, *(tensor for layer in self.layers for tensor in layer)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def cache(self) -> Cache:
        """Returns a cache for one forward over any number of rows that continue the prompt."""
        return Cache(layers=[SharedPrefixLayer(keys, values) for keys, values in self.layers])


class Engine:
    """Scores continuations with a frozen causal LM.

    Args:
        model: a ``transformers`` causal LM in eval mode.
        token_budget: continuation tokens, padding included, in one forward.

    Attributes:
        shares_prompts: False for models whose state is more than attention keys (Mamba and the like) or whose output
            head could not be taken apart; these run each row whole, prompt included.
        tokens_run: tokens that went through the model so far, padding included.
    """

    def __init__(self, model: nn.Module, *, token_budget: int) -> None:
        self.model: Any = model
        self.token_budget = token_budget
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
        self.tokens_run = 0
        self._prefixes: OrderedDict[Ids, Prefix] = OrderedDict()
        self._prefix_bytes = 0
        self._finish: Callable[[Tensor], Tensor] | None = None
        self.shares_prompts = has_plain_attention(model)
        if self.shares_prompts:
            with self._frozen():
                self._finish = self._find_finish()
            self.shares_prompts = self._finish is not None

    @property
    def prefix_bytes(self) -> int:
        """Memory of the kept prompts in bytes."""
        return self._prefix_bytes

    def score(self, prompt: Ids, continuations: Sequence[Ids]) -> list[float]:
        """Returns log p(continuation | prompt), natural log, summed over the continuation's tokens, one a continuation.

        Args:
            prompt: at least one id.
            continuations: at least one id each; equal ones are the caller's to merge.

        Raises:
            LLMError: out of memory with a single row.
        """
        order = sorted(range(len(continuations)), key=lambda i: len(continuations[i]))
        sums: dict[int, float] = {}
        with self._frozen():
            start = 0
            while start < len(order):
                rows = order[start : start + self._num_rows(prompt, [len(continuations[i]) for i in order[start:]])]
                scores = self._try([continuations[i] for i in rows], prompt)
                if scores is None:
                    self._shrink(len(rows), max(len(continuations[i]) for i in rows))
                    continue
                sums.update(zip(rows, scores, strict=True))
                start += len(rows)
        return [sums[i] for i in range(len(continuations))]

    def plain_score(self, prompt: Ids, continuation: Ids) -> float:
        """Returns the same as ``score`` for one continuation by one plain forward over prompt and continuation."""
        with self._frozen():
            return self._score_whole(prompt, [continuation])[0]

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        # Training wraps its step in autocast; the LLM's own dtype must not depend on that.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    def _num_rows(self, prompt: Ids, lengths: Sequence[int]) -> int:
        """Returns how many of the continuations, shortest first, fit into one forward; at least one."""
        rows = 0
        for length in lengths:
            width = length if self.shares_prompts else length + len(prompt)
            over_tokens = (rows + 1) * width > self.token_budget
            over_keys = (rows + 1) * (len(prompt) + length) > _KEY_FACTOR * self.token_budget
            if rows and (over_tokens or over_keys):
                break
            rows += 1
        return rows

    def _try(self, continuations: Sequence[Ids], prompt: Ids) -> list[float] | None:
        """Scores one batch; None when memory ran out."""
        run = self._score_shared if self.shares_prompts else self._score_whole
        try:
            return run(prompt, continuations)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            return None

    def _shrink(self, rows: int, width: int) -> None:
        """Makes room after an out-of-memory error: kept prompts go, then batches are halved for good."""
        had_prefixes = len(self._prefixes) > 1
        self._prefixes.clear()
        self._prefix_bytes = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1 and not had_prefixes:
            raise LLMError(
                "Out of memory while scoring a single hypothesis with the LLM: lower llm.max_context_tokens, use "
                "llm.quantization=nf4, or a smaller LLM."
            )
        if rows > 1:
            self.token_budget = max(1, rows * width // 2)
            logger.warning("Out of memory while scoring: llm.token_budget is now %d.", self.token_budget)

    def _score_shared(self, prompt: Ids, continuations: Sequence[Ids]) -> list[float]:
        prefix = self._prefix(prompt)
        first = prefix.next_logp[torch.tensor([c[0] for c in continuations], device=self.device)].double()
        width = max(map(len, continuations)) - 1
        if width == 0:
            return first.tolist()
        inputs, targets, real = self._pad([c[:-1] for c in continuations], [c[1:] for c in continuations], width)
        ones = torch.ones(len(continuations), prefix.length, dtype=torch.long, device=self.device)
        hidden = self._hidden(
            input_ids=inputs,
            attention_mask=torch.cat([ones, real.long()], dim=1),
            position_ids=torch.arange(prefix.length, prefix.length + width, device=self.device)[None],
            past_key_values=prefix.cache(),
        )
        logp = torch.zeros(real.shape, dtype=torch.float64, device=self.device)
        logp[real] = self._target_logp(hidden[real], targets[real])
        return (first + logp.sum(1)).tolist()

    def _score_whole(self, prompt: Ids, continuations: Sequence[Ids]) -> list[float]:
        """Scores rows of prompt + continuation with the model's own forward."""
        width = len(prompt) + max(map(len, continuations)) - 1
        rows = [(*prompt, *c) for c in continuations]
        inputs, targets, real = self._pad([r[:-1] for r in rows], [r[1:] for r in rows], width)
        real[:, : len(prompt) - 1] = False
        mask = torch.arange(width, device=self.device)[None] < torch.tensor(
            [len(r) - 1 for r in rows], device=self.device
        ).unsqueeze(1)
        self.tokens_run += inputs.numel()
        logits = self.model(input_ids=inputs, attention_mask=mask.long(), use_cache=False).logits
        logp = torch.zeros(real.shape, dtype=torch.float64, device=self.device)
        logp[real] = _pick(logits[real], targets[real])
        return logp.sum(1).tolist()

    def _pad(self, inputs: list[Ids], targets: list[Ids], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Right-pads rows into [B, width] ids, targets and a boolean mask of real positions."""
        ids = torch.zeros(2, len(inputs), width, dtype=torch.long)
        real = torch.zeros(len(inputs), width, dtype=torch.bool)
        for row, (source, target) in enumerate(zip(inputs, targets, strict=True)):
            ids[0, row, : len(source)] = torch.tensor(source, dtype=torch.long)
            ids[1, row, : len(target)] = torch.tensor(target, dtype=torch.long)
            real[row, : len(source)] = True
        ids, real = ids.to(self.device), real.to(self.device)
        return ids[0], ids[1], real

    def _prefix(self, prompt: Ids) -> Prefix:
        if prompt in self._prefixes:
            self._prefixes.move_to_end(prompt)
            return self._prefixes[prompt]
        cache: Any = DynamicCache()  # without a config every layer keeps all of the prompt
        ids = torch.tensor([prompt], device=self.device)
        hidden = self._hidden(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
        logits = self._logits(hidden[0, -1:])
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        prefix = Prefix(len(prompt), layers, logits[0].float().log_softmax(-1))
        self._prefixes[prompt] = prefix
        self._prefix_bytes += prefix.num_bytes
        while self._prefix_bytes > _PREFIX_BYTES and len(self._prefixes) > 1:
            self._prefix_bytes -= self._prefixes.popitem(last=False)[1].num_bytes
        return prefix

    def _hidden(self, **inputs: Any) -> Tensor:
        """Runs the model without its output matrix; returns the last hidden states, [B, L, D]."""
        self.tokens_run += inputs["input_ids"].numel()
        return self.model.base_model(**inputs, use_cache=True).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._finish is None:
            raise LLMError("The LLM's output head was not taken apart; this path is for heads that were.")
        return self._finish(self.model.get_output_embeddings()(hidden))

    def _target_logp(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Returns log p(target) as float64 [M] of hidden states [M, D] and target ids [M], a chunk at a time."""
        parts = zip(hidden.split(_HEAD_CHUNK), targets.split(_HEAD_CHUNK), strict=True)
        return torch.cat([_pick(self._logits(h), t) for h, t in parts])

    def _find_finish(self) -> Callable[[Tensor], Tensor] | None:
        """Finds what the model does to its logits after the output matrix, by comparing with its own forward.

        Gemma caps them, Cohere multiplies and Granite divides them. None if nothing known reproduces the model.
        """
        config = self.model.config.get_text_config()
        ids = torch.arange(1, 7, device=self.device)[None] % config.vocab_size
        mask = torch.ones_like(ids)
        expected = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        try:
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            raw = self.model.get_output_embeddings()(hidden)
        except (AttributeError, TypeError):
            return None
        cap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", None)
        finishes: list[Callable[[Tensor], Tensor]] = [lambda logits: logits]
        if cap:
            finishes.append(lambda logits: torch.tanh(logits / cap) * cap)
        if scale:
            finishes += [lambda logits: logits * scale, lambda logits: logits / scale]
        for finish in finishes:
            if torch.allclose(finish(raw).float(), expected, rtol=1e-3, atol=1e-3):
                return finish
        return None


def has_plain_attention(model: Any) -> bool:
    """Whether every layer's state is keys and values of full or sliding-window attention, one set a layer."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None) is not None:
        return False
    try:
        layers = DynamicCache(config=config).layers
    except KeyError:  # a layer type with a state of its own
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns log-softmax of logits [M, V] at target ids [M], computed in float32, as float64 [M]."""
    logits = logits.float()
    return (logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(-1)).double()
