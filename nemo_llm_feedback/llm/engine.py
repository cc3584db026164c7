"""Sums of log-probabilities of continuations of prompts, with as few tokens through the model as possible.

A prompt runs once; its keys and values are kept (see ``prefix.py``). Its continuations follow packed into tries (see
``packing.py``) where every layer attends to everything, or as ordinary sequences behind the shared prompt where a
sliding window is too short for that. Models whose state is more than keys and values run each row whole.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.llm.head import Head, chosen_logp
from nemo_llm_feedback.llm.packing import Ids, PackedBatch, Row, batch_rows, plan_rows
from nemo_llm_feedback.llm.prefix import Prefix, PrefixStore, joined_cache

logger = logging.getLogger(__name__)

_PREFIX_BYTES = 512 * 2**20  # keys and values of prompts that are kept
_SLACK = {"cpu": 64, "cuda": 1024}  # tokens for which a forward costs about as much as for fewer
ROW_NODES = 256  # nodes of a trie in one row: attention within a row costs their square


class Sharing(enum.IntEnum):
    """How much of the work continuations of one prompt share."""

    NONE = 0  # each row whole, by the model's own forward
    PROMPT = 1  # the prompt's keys and values
    TRIE = 2  # those, and every common prefix


class Engine:
    """Scores continuations with a frozen causal LM.

    Args:
        model: a ``transformers`` causal LM in eval mode.
        token_budget: continuation tokens, padding included, in one forward.

    Attributes:
        sharing: what this model allows; may be lowered.
        token_budget: halved for good whenever memory runs out.
        tokens_run: tokens that went through the model so far, padding included.
    """

    def __init__(self, model: Any, *, token_budget: int) -> None:
        self._model = model
        self.token_budget = token_budget
        self._device: torch.device = self._model.get_input_embeddings().weight.device
        self.tokens_run = 0
        self._prefixes = PrefixStore(_PREFIX_BYTES)
        with self._frozen():
            self._head = Head(self._model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.sharing, self._window = _allowed_sharing(self._model)
        if not self._head.exact:
            self.sharing = Sharing.NONE

    @property
    def prefix_bytes(self) -> int:
        """Memory of the kept prompts in bytes."""
        return self._prefixes.num_bytes

    def score(self, requests: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[float]]:
        """Returns log p(continuation | prompt), natural log, summed over the continuation's tokens.

        Args:
            requests: (prompt, continuations) pairs of at least one id each; equal ones are the caller's to merge.

        Returns:
            One list a request, one sum a continuation.

        Raises:
            LLMError: out of memory with a single continuation.
        """
        pending = [dict(enumerate(continuations)) for _, continuations in requests]
        sums: list[dict[int, float]] = [{} for _ in requests]
        prompts = [prompt for prompt, _ in requests]
        with self._frozen():
            while any(pending):
                for rows in self._batches(prompts, pending):
                    scores = self._try(rows)
                    if scores is None:
                        self._make_room(rows)
                        break  # plan what is left anew, in smaller batches
                    members = [member for row in rows for member in row.members]
                    for (request, n), score in zip(members, scores, strict=True):
                        sums[request][n] = score
                        del pending[request][n]
        return [[sums[i][n] for n in range(len(request[1]))] for i, request in enumerate(requests)]

    def plain_score(self, prompt: Ids, continuation: Ids) -> float:
        """Returns the same as ``score`` for one continuation by one plain forward over prompt and continuation.

        Raises:
            LLMError: out of memory.
        """
        rows = [Row(prompt, ((0, 0),), (continuation,), len(prompt) + len(continuation))]
        with self._frozen():
            while (scores := self._try(rows, plain=True)) is None:
                self._make_room(rows)
        return scores[0]

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        # Training wraps its step in autocast; the LLM's own dtype must not depend on that.
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            yield

    def _batches(self, prompts: Sequence[Ids], pending: Sequence[dict[int, Ids]]) -> Iterator[list[Row]]:
        """Plans batches of what is pending: those that may be tries together, the others prompt by prompt."""
        tries, sequences = [], []
        for request, (prompt, continuations) in enumerate(zip(prompts, pending, strict=True)):
            if not continuations:
                continue
            longest = len(prompt) + max(map(len, continuations.values()))
            if self.sharing is Sharing.TRIE and longest <= self._window:
                max_nodes = min(ROW_NODES, self.token_budget)
                tries += plan_rows(request, prompt, dict(continuations), max_nodes=max_nodes)
            else:
                sequences += plan_rows(request, prompt, dict(continuations), max_nodes=0)
        if self.sharing is Sharing.NONE:  # such rows put the prompt in too
            sequences = [Row(r.prompt, r.members, r.continuations, len(r.prompt) + r.num_nodes) for r in sequences]
        yield from self._batch_rows(tries, mix_prompts=True)
        yield from self._batch_rows(sequences, mix_prompts=self.sharing is Sharing.NONE)

    def _batch_rows(self, rows: Sequence[Row], *, mix_prompts: bool) -> Iterator[list[Row]]:
        slack = min(_SLACK[self._device.type], self.token_budget)
        return batch_rows(rows, token_budget=self.token_budget, slack=slack, mix_prompts=mix_prompts)

    def _try(self, rows: Sequence[Row], *, plain: bool = False) -> list[float] | None:
        """Scores one batch; None when memory ran out."""
        try:
            if plain or self.sharing is Sharing.NONE:
                return self._run_whole(rows, own_head=plain or not self._head.exact)
            return self._run_packed(rows)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            return None

    def _make_room(self, rows: Sequence[Row]) -> None:
        """After an out-of-memory error: kept prompts go, and batches are halved for good.

        Raises:
            LLMError: neither can be done.
        """
        num_nodes, num_continuations = sum(r.num_nodes for r in rows), sum(len(r.continuations) for r in rows)
        # The batch's own prompts would only be run and kept again.
        own = sum(self._prefixes.get(prompt) is not None for prompt in {row.prompt for row in rows})
        others = len(self._prefixes) - own
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

    def _run_packed(self, rows: Sequence[Row]) -> list[float]:
        """Scores rows of nodes behind their prompts' kept keys and values."""
        prefixes = self._prefixes_of(rows)
        batch = PackedBatch(rows)
        targets = batch.targets.to(self._device)
        at_prompt = int((batch.sources < 0).sum())
        owners = (-1 - batch.sources[:at_prompt]).to(self._device)
        edges = [torch.stack([prefix.next_logp for prefix in prefixes])[owners, targets[:at_prompt]].double()]
        if batch.real.numel():
            is_trie = any(len(row.continuations) > 1 for row in rows) or len({row.prompt for row in rows}) > 1
            mask = batch.trie_mask(self._model.dtype, self._device) if is_trie else batch.sequence_mask()
            hidden = self._hidden(
                input_ids=batch.ids.to(self._device),
                attention_mask=mask.to(self._device),
                position_ids=batch.positions.to(self._device),
                past_key_values=joined_cache(prefixes if len({row.prompt for row in rows}) > 1 else prefixes[:1]),
            )
            nodes = hidden[batch.real.to(self._device)]
            edges.append(self._head.edge_logp(nodes, batch.sources[at_prompt:], targets[at_prompt:]))
        return batch.sums(torch.cat(edges).cpu())

    def _prefixes_of(self, rows: Sequence[Row]) -> list[Prefix]:
        """Returns the state of each row's prompt, running those that are not kept, a batch of similar length each."""
        known = {row.prompt: self._prefixes.get(row.prompt) for row in rows}
        missing = [Row(prompt, (), (), len(prompt)) for prompt, prefix in known.items() if prefix is None]
        for batch in self._batch_rows(missing, mix_prompts=True):
            for row, prefix in zip(batch, self._run_prompts([row.prompt for row in batch]), strict=True):
                known[row.prompt] = prefix
                self._prefixes.put(row.prompt, prefix)
        return [state for row in rows if (state := known[row.prompt]) is not None]

    def _run_prompts(self, prompts: Sequence[Ids]) -> list[Prefix]:
        """Runs prompts, right-padded, and returns their states."""
        width = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        lens = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(width)[None] < lens[:, None]).long()
        cache: Any = DynamicCache()  # without a config every layer keeps all of the prompt
        hidden = self._hidden(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device), past_key_values=cache
        )
        ends = hidden[torch.arange(len(prompts), device=self._device), (lens - 1).to(self._device)]
        states = []
        for row, (length, logp) in enumerate(zip(lens.tolist(), self._head.next_logp(ends), strict=True)):
            # Copies: views would keep the whole batch's tensors alive as long as any of its prompts.
            part = (slice(row, row + 1), slice(None), slice(length))
            layers = tuple((layer.keys[part].clone(), layer.values[part].clone()) for layer in cache.layers)
            states.append(Prefix(length, layers, logp.clone()))
        return states

    def _run_whole(self, rows: Sequence[Row], *, own_head: bool) -> list[float]:
        """Scores rows of prompt + continuation, each by itself.

        Args:
            rows: of one continuation each.
            own_head: let the model compute its logits from the first scored position on, instead of those of the
                scored positions only, a few hundred at a time.
        """
        texts = [(*row.prompt, *row.continuations[0]) for row in rows]
        width = max(map(len, texts)) - 1
        ids = torch.tensor([[*text, *[0] * (width + 1 - len(text))] for text in texts])
        places, firsts = torch.arange(width)[None], torch.tensor([len(row.prompt) - 1 for row in rows])
        real = places < torch.tensor([len(text) - 1 for text in texts])[:, None]
        scored = real & (places >= firsts[:, None])
        targets = ids[:, 1:][scored].to(self._device)
        inputs: dict[str, Any] = {
            "input_ids": ids[:, :-1].to(self._device),
            "attention_mask": real.long().to(self._device),
            "use_cache": False,
        }
        self.tokens_run += inputs["input_ids"].numel()
        if own_head:
            if self._keeps_logits:
                inputs["logits_to_keep"] = width - int(firsts.min())
            logits = self._model(**inputs).logits
            edges = chosen_logp(logits[scored[:, width - logits.shape[1] :].to(self._device)], targets)
        else:
            hidden = self._model.base_model(**inputs).last_hidden_state[scored.to(self._device)]
            edges = self._head.edge_logp(hidden, torch.arange(len(hidden)), targets)
        logp = torch.zeros(scored.shape, dtype=torch.float64)
        logp[scored] = edges.cpu()
        return logp.sum(1).tolist()

    def _hidden(self, **inputs: Any) -> Tensor:
        """Runs the model without its output matrix; returns the last hidden states, [B, L, D]."""
        self.tokens_run += inputs["input_ids"].numel()
        return self._model.base_model(**inputs, use_cache=True).last_hidden_state


def _allowed_sharing(model: Any) -> tuple[Sharing, float]:
    """Returns how much this architecture lets continuations share, and the shortest sliding window (∞ if none).

    Within the shortest window a sliding layer attends to everything, so short rows may be tries there too.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None) is not None:
        return Sharing.NONE, 0
    try:
        layers = DynamicCache(config=config).layers
    except KeyError:  # a layer type with a state of its own
        return Sharing.NONE, 0
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return Sharing.NONE, 0
    window = min((x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)), default=float("inf"))
    # A float mask for each pair of tokens is understood by these two; flash and flex attention are not.
    masks = config._attn_implementation in ("sdpa", "eager")
    return (Sharing.TRIE if masks else Sharing.PROMPT), window
