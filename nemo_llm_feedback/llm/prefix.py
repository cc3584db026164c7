"""Keeps the keys and values of prompts, so that every prompt runs through the LLM once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from nemo_llm_feedback.llm.packing import Ids


class PrefixLayer(DynamicLayer):
    """One layer's keys and values of prompts, joined to a batch's new ones while that layer runs, and never changed.

    Layers with a sliding window keep all of the prompt too; the mask hides what is out of reach.

    Args:
        keys: one [1, heads, P, head_dim] tensor (P prompt tokens) per row of the batch, or a single one for all rows.
        values: tensors of the same shapes.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self._length = max(tensor.shape[-2] for tensor in keys)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns keys and values [B, heads, P + L, head_dim] of prompts and new tokens, given [B, heads, L, …]."""
        return self._join(self._keys, key_states), self._join(self._values, value_states)

    def get_seq_length(self) -> int:
        """Returns P, the longest prompt's length in tokens."""
        return self._length

    def _join(self, prefixes: Sequence[Tensor], new: Tensor) -> Tensor:
        """Joins prompts, right-padded with zeros, and new states along the tokens."""
        padded = torch.cat([pad(prefix, (0, 0, 0, self._length - prefix.shape[-2])) for prefix in prefixes])
        return torch.cat([padded.expand(len(new), -1, -1, -1), new], dim=-2)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt's state: per layer (keys, values), and the log-probabilities [V] (float32) of what follows it."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    next_logp: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of the state in bytes."""
        return self.next_logp.nbytes + sum(tensor.nbytes for layer in self.layers for tensor in layer)


def joined_cache(prefixes: Sequence[Prefix]) -> Cache:
    """Returns a cache for one forward: row b continues ``prefixes[b]``, or every row the only one."""
    layers = zip(*(prefix.layers for prefix in prefixes), strict=True)
    return Cache(layers=[PrefixLayer(*zip(*layer, strict=True)) for layer in layers])


class PrefixStore:
    """Keeps the most recently used prompts' states within a memory limit, and always the last one put.

    Args:
        max_bytes: the limit.

    Attributes:
        num_bytes: memory of the kept states in bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._prefixes: OrderedDict[Ids, Prefix] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, prompt: Ids) -> Prefix | None:
        """Returns the prompt's state, or None if it is not kept."""
        if prompt in self._prefixes:
            self._prefixes.move_to_end(prompt)
        return self._prefixes.get(prompt)

    def put(self, prompt: Ids, prefix: Prefix) -> None:
        """Keeps a prompt's state; the least recently used ones make room."""
        self._prefixes[prompt] = prefix
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self._max_bytes and len(self._prefixes) > 1:
            self.num_bytes -= self._prefixes.popitem(last=False)[1].num_bytes

    def clear(self) -> None:
        """Forgets all states."""
        self._prefixes.clear()
        self.num_bytes = 0
