"""Sums the log-probabilities of continuations of prompts, with as few tokens through the model as possible.

A prompt runs once; its keys and values are kept (see ``prefix.py``). Its continuations follow packed into tries (see
``packing.py``) where every layer attends to everything, or as ordinary sequences behind the shared prompt where a
sliding window is too short for that. Models whose state is more than keys and values run each row whole.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.llm.output_layer import OutputLayer, pair_logp
from nemo_llm_feedback.llm.packing import ROW_NODES, Ids, PackedBatch, PackedRow, Sharing, batch_rows, plan_rows
from nemo_llm_feedback.llm.prefix import Prefix, PrefixStore, joined_cache

logger = logging.getLogger(__name__)

_PREFIX_BYTES = 512 * 2**20  # keys and values of prompts that are kept
_SLACK = {"cpu": 64, "cuda": 1024}  # tokens for which a forward costs about as much as for fewer


class Engine:
    """Scores continuations with a frozen causal LM.

    Args:
        model: a ``transformers`` causal LM in eval mode.
        token_budget: most continuation tokens, padding included, per forward.

    Attributes:
        model: the model.
        sharing: the work that this model's rows can share; may be lowered.
        token_budget: the budget, halved for good whenever memory runs out.
        tokens_run: tokens that went through the model so far, padding included.
    """

    def __init__(self, model: Any, *, token_budget: int) -> None:
        self.model = model
        self.token_budget = token_budget
        self.tokens_run = 0
        self._device: torch.device = model.get_input_embeddings().weight.device
        self._prefixes = PrefixStore(_PREFIX_BYTES)
        with self._frozen():
            self._output = OutputLayer(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        allowed = _allowed_sharing(model) if self._output.exact else (Sharing.NONE, 0.0)
        self.sharing, self._window = allowed

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights and of the kept prompts' keys and values."""
        return self.model.get_memory_footprint() + self._prefixes.num_bytes

    def score(self, requests: Mapping[Ids, Sequence[Ids]]) -> dict[Ids, dict[Ids, float]]:
        """Returns log p(continuation | prompt), natural log, summed over the continuation's tokens.

        Args:
            requests: maps each prompt to its continuations, of at least one id each.

        Returns:
            Per prompt and continuation the sum.

        Raises:
            LLMError: out of memory with a single continuation.
        """
        pending = {prompt: dict.fromkeys(continuations) for prompt, continuations in requests.items()}
        sums: dict[Ids, dict[Ids, float]] = {prompt: {} for prompt in requests}
        with self._frozen():
            while any(pending.values()):
                for rows in self._batches(pending):
                    scores = self._try(rows)
                    if scores is None:
                        self._make_room(rows)
                        break  # plan what is left anew, in smaller batches
                    pairs = [(row.prompt, ids) for row in rows for ids in row.continuations]
                    for (prompt, ids), score in zip(pairs, scores, strict=True):
                        sums[prompt][ids] = score
                        del pending[prompt][ids]
        return sums

    def plain_score(self, prompt: Ids, continuation: Ids) -> float:
        """Returns what ``score`` returns for one continuation, by one plain forward over prompt and continuation.

        Raises:
            LLMError: out of memory.
        """
        rows = [PackedRow(prompt, (continuation,), len(prompt) + len(continuation))]
        with self._frozen():
            while (scores := self._try(rows, plain=True)) is None:
                self._make_room(rows)
        return scores[0]

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """No gradients, and no autocast, in which training wraps its step: the LLM's dtype must not depend on it."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            yield

    def _batches(self, pending: Mapping[Ids, Collection[Ids]]) -> Iterator[list[PackedRow]]:
        """Plans batches of pending continuations: sequences prompt by prompt, then tries of all prompts together."""
        mixed: list[PackedRow] = []
        for prompt, continuations in pending.items():
            if not continuations:
                continue
            longest = len(prompt) + max(map(len, continuations))
            if self.sharing is Sharing.TRIE and longest <= self._window:
                mixed += plan_rows(prompt, continuations, max_nodes=min(ROW_NODES, self.token_budget))
                continue
            rows = plan_rows(prompt, continuations, max_nodes=0)
            if self.sharing is Sharing.NONE:  # such rows put the prompt in too
                mixed += [replace(row, num_nodes=len(prompt) + row.num_nodes) for row in rows]
            else:
                yield from self._batch_rows(rows)
        yield from self._batch_rows(mixed)

    def _batch_rows(self, rows: Sequence[PackedRow]) -> Iterator[list[PackedRow]]:
        return batch_rows(rows, token_budget=self.token_budget, slack=_SLACK[self._device.type])

    def _try(self, rows: Sequence[PackedRow], *, plain: bool = False) -> list[float] | None:
        """Returns the sum per continuation of one batch; None when memory ran out."""
        try:
            if plain or self.sharing is Sharing.NONE:
                return self._run_whole(rows, by_model=plain or not self._output.exact)
            return self._run_packed(rows)
        except RuntimeError as error:
            words = ("allocate memory", "out of memory")
            if isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in words):
                return None
            raise

    def _make_room(self, rows: Sequence[PackedRow]) -> None:
        """After an out-of-memory error: forgets the kept prompts, and halves batches for good.

        Raises:
            LLMError: neither can be done.
        """
        num_nodes, num_continuations = sum(r.num_nodes for r in rows), sum(len(r.continuations) for r in rows)
        needed = {row.prompt for row in rows}  # would only be run and kept again
        others = len(self._prefixes) - sum(self._prefixes.get(prompt) is not None for prompt in needed)
        self._prefixes.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = max(1, min(self.token_budget, num_nodes) // 2)
        if not others and (num_continuations == 1 or smaller == self.token_budget):
            raise LLMError(
                "Out of memory while scoring a single hypothesis with the LLM: lower llm.max_context_tokens, use "
                "llm.quantization=nf4, or a smaller LLM."
            )
        if num_continuations > 1:
            self.token_budget = smaller
            logger.warning("Out of memory while scoring: llm.token_budget is now %d.", self.token_budget)

    def _run_packed(self, rows: Sequence[PackedRow]) -> list[float]:
        """Returns the sum per continuation of rows of nodes, run behind their prompts' kept keys and values."""
        prefixes, batch = self._prefixes_of(rows), PackedBatch(rows)
        one_prompt = len({row.prompt for row in rows}) == 1
        targets = batch.targets.to(self._device)
        at_prompt = int((batch.sources < 0).sum())
        owners = (-1 - batch.sources[:at_prompt]).to(self._device)
        logp = [torch.stack([prefix.next_logp for prefix in prefixes])[owners, targets[:at_prompt]].double()]
        if batch.real.numel():
            plain_rows = one_prompt and all(len(row.continuations) == 1 for row in rows)
            mask = batch.sequence_mask() if plain_rows else batch.trie_mask(self.model.dtype, self._device)
            cache = joined_cache(prefixes[:1] if one_prompt else prefixes)
            hidden = self._hidden(cache, input_ids=batch.ids, attention_mask=mask, position_ids=batch.positions)
            nodes = hidden[batch.real.to(self._device)]
            sources, logits_of = batch.sources[at_prompt:], self._output.logits
            logp.append(pair_logp(nodes, sources, targets[at_prompt:], logits_of=logits_of))
        return batch.sums(torch.cat(logp).cpu())

    def _prefixes_of(self, rows: Sequence[PackedRow]) -> list[Prefix]:
        """Returns the state per row of its prompt; those that are not kept run in batches of similar length."""
        known = {row.prompt: self._prefixes.get(row.prompt) for row in rows}
        missing = [PackedRow(prompt, (), len(prompt)) for prompt, prefix in known.items() if prefix is None]
        for batch in self._batch_rows(missing):
            for row, prefix in zip(batch, self._run_prompts([row.prompt for row in batch]), strict=True):
                known[row.prompt] = prefix
                self._prefixes.put(row.prompt, prefix)
        return [state for row in rows if (state := known[row.prompt]) is not None]

    def _run_prompts(self, prompts: Sequence[Ids]) -> list[Prefix]:
        """Runs prompts, right-padded, and returns their states."""
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        lens = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(ids.shape[1]) < lens[:, None]).long()
        cache: Any = DynamicCache()  # without a config every layer keeps all of the prompt
        hidden = self._hidden(cache, input_ids=ids, attention_mask=mask)
        ends = self._output.logits(hidden[torch.arange(len(prompts)), lens - 1]).log_softmax(-1)
        states = []
        for row, (length, logp) in enumerate(zip(lens.tolist(), ends, strict=True)):
            # Copies: views would keep the whole batch's tensors alive as long as any of its prompts.
            part = (slice(row, row + 1), slice(None), slice(length))
            layers = tuple((layer.keys[part].clone(), layer.values[part].clone()) for layer in cache.layers)
            states.append(Prefix(layers, logp.clone()))
        return states

    def _run_whole(self, rows: Sequence[PackedRow], *, by_model: bool) -> list[float]:
        """Returns the sum per row of prompts + continuations that share nothing.

        Args:
            rows: rows of one continuation each.
            by_model: let the model compute its logits from the first scored position on, instead of those of the
                scored positions only, a few hundred at a time.
        """
        texts = [torch.tensor((*row.prompt, *row.continuations[0])) for row in rows]
        ids = pad_sequence(texts, batch_first=True).to(self._device)
        lens = torch.tensor([[len(text)] for text in texts], device=self._device)
        firsts = torch.tensor([[len(row.prompt)] for row in rows], device=self._device)
        places = torch.arange(1, ids.shape[1], device=self._device)  # of the tokens that are predicted
        real = places < lens
        scored = real & (places >= firsts)
        targets = ids[:, 1:][scored]
        inputs = {"input_ids": ids[:, :-1], "attention_mask": real.long(), "use_cache": False}
        self.tokens_run += real.numel()
        logits_of: Callable[[Tensor], Tensor] = self._output.logits
        if by_model:
            kept = {"logits_to_keep": ids.shape[1] - int(firsts.min())} if self._keeps_logits else {}
            logits = self.model(**inputs, **kept).logits
            states, logits_of = logits[scored[:, -logits.shape[1] :]], Tensor.float
        else:
            states = self.model.base_model(**inputs).last_hidden_state[scored]
        found = pair_logp(states, torch.arange(len(states)), targets, logits_of=logits_of)
        logp = torch.zeros(scored.shape, dtype=torch.float64)
        logp[scored.cpu()] = found.cpu()
        return logp.sum(1).tolist()

    def _hidden(self, cache: Cache, **inputs: Tensor) -> Tensor:
        """Runs the model behind cached states, without its output matrix; returns the last hidden states [B, L, D]."""
        self.tokens_run += inputs["input_ids"].numel()
        inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        return self.model.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state


def _allowed_sharing(model: Any) -> tuple[Sharing, float]:
    """Returns how much of the work continuations can share in this architecture, and within how many tokens as tries.

    That is the shortest sliding window, within which a sliding layer attends to everything; ∞ if there is none.
    """
    config = model.config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=config).layers
    except KeyError:  # a layer type whose state is more than keys and values
        return Sharing.NONE, 0
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if not plain or getattr(config, "attention_chunk_size", None) is not None:
        return Sharing.NONE, 0
    window = min((x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)), default=math.inf)
    # A float mask for each pair of tokens is understood by these two; flash and flex attention are not.
    masks = config._attn_implementation in ("sdpa", "eager")
    return (Sharing.TRIE if masks else Sharing.PROMPT), window
