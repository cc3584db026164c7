"""Packs continuations of prompts into few, dense rows of a batch.

A row holds the distinct prefixes of several continuations of one prompt: the nodes of a trie over LLM tokens. Each
node is one token at its position in its sequence, sees the prompt and its ancestors, and predicts its children and the
continuations that end there. A row with a single continuation is an ordinary sequence.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_llm_feedback.core.trie import PrefixTrie

Ids = tuple[int, ...]
ROW_NODES = 256  # nodes of a trie in one row: attention within a row costs their square
_PADDING = 1.05  # widest batch, as a multiple of its real tokens
_KEY_FACTOR = 16  # rows × (prompt + nodes) ≤ this × token budget: bounds one layer's joined keys


class Sharing(enum.IntEnum):
    """How much of the work the continuations of one prompt share."""

    NONE = 0  # nothing: prompt and continuation run as one row
    PROMPT = 1  # the prompt's keys and values
    TRIE = 2  # those, and every common prefix


@dataclass(frozen=True)
class PackedRow:
    """Continuations of one prompt that go through the model as one row.

    Attributes:
        prompt: the prompt's token ids.
        continuations: token ids of each, at least one; the last one is only predicted, never put in.
        num_nodes: number of distinct prefixes to put in; 0 if every continuation is a single token.
    """

    prompt: Ids
    continuations: tuple[Ids, ...]
    num_nodes: int


def plan_rows(prompt: Ids, continuations: Iterable[Ids], *, max_nodes: int) -> list[PackedRow]:
    """Splits a prompt's continuations into rows of about equal size.

    Args:
        prompt: the prompt's token ids.
        continuations: token ids of each, at least one.
        max_nodes: most nodes per row, half a continuation more or less; 0 = one continuation per row.
    """
    if not max_nodes:
        return [PackedRow(prompt, (ids,), len(ids) - 1) for ids in continuations]
    order = sorted(continuations, key=lambda ids: ids[:-1])  # neighbours share their prefixes
    inputs = [ids[:-1] for ids in order]
    fresh = [len(inputs[0]), *(len(two) - _common(one, two) for one, two in itertools.pairwise(inputs))]
    target = sum(fresh) / max(1, -(-sum(fresh) // max_nodes))
    starts, size = [0], 0
    for place, new in enumerate(fresh):
        if size and size + new / 2 > target:
            starts.append(place)
            size = 0
        size += new if place > starts[-1] else len(inputs[place])
    return [
        PackedRow(prompt, tuple(order[start:end]), len(inputs[start]) + sum(fresh[start + 1 : end]))
        for start, end in itertools.pairwise((*starts, len(order)))
    ]


def _common(one: Ids, two: Ids) -> int:
    """Length of the common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def batch_rows(rows: Iterable[PackedRow], *, token_budget: int, slack: int) -> Iterator[list[PackedRow]]:
    """Groups rows into batches of similar width within the token budget; a batch has at least one row.

    Args:
        rows: the rows in any order.
        token_budget: most nodes per batch, padding included; also most tokens of its prompts, where they differ.
        slack: batches of at most this many nodes, padding included, may have any share of padding.
    """
    batch: list[PackedRow] = []
    prompts: set[Ids] = set()
    nodes = longest = 0
    for row in sorted(rows, key=lambda r: -r.num_nodes):
        width = batch[0].num_nodes if batch else row.num_nodes  # the first one is the widest
        size, different = len(batch) + 1, len(prompts) + (row.prompt not in prompts)
        reach = max(longest, len(row.prompt))
        fits = (
            size * width <= min(token_budget, max(slack, _PADDING * (nodes + row.num_nodes)))
            and (different == 1 or different * reach <= token_budget)
            and size * (reach + width) <= _KEY_FACTOR * token_budget
        )
        if batch and not fits:
            yield batch
            batch, prompts, nodes, longest = [], set(), 0, 0
        batch.append(row)
        prompts.add(row.prompt)
        nodes, longest = nodes + row.num_nodes, max(longest, len(row.prompt))
    if batch:
        yield batch


class PackedBatch:
    """The tensors of a batch of B rows of up to L nodes, which predict E tokens; on the CPU.

    Attributes:
        ids: [B, L] token ids of the rows' nodes, right-padded with 0.
        positions: [B, L] positions of the nodes in their sequences, in tokens.
        real: [B, L] (bool) which of them are nodes and not padding.
        sources: [E] where a token is predicted: −1 − b for row b's prompt, else the node's rank among the real ones
            in row-major order; ascending.
        targets: [E] ids of the predicted tokens.
    """

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        owner = [b for b, row in enumerate(rows) for _ in row.continuations]
        continuations = [ids for row in rows for ids in row.continuations]
        self._trie = trie = PrefixTrie.build([ids[:-1] for ids in continuations], owner)
        self._prompt_lens = torch.tensor([len(row.prompt) for row in rows])
        firsts = torch.tensor([first for _, first, _ in trie.spans])
        self._is_node = is_node = trie.depth > 0
        self._column = torch.arange(trie.num_nodes) - firsts[trie.utterance] - 1  # −1 at a root, the prompt's end
        shape = (len(rows), max(last - first - 1 for _, first, last in trie.spans))
        self.ids, self.positions = torch.zeros(2, *shape, dtype=torch.long)
        self.real = torch.zeros(shape, dtype=torch.bool)
        where = (trie.utterance[is_node], self._column[is_node])
        self.ids[where] = trie.token[is_node]
        self.positions[where] = self._prompt_lens[where[0]] + trie.depth[is_node] - 1
        self.real[where] = True
        # Predictions: each node by its parent, and each continuation's last token by its leaf.
        rank = torch.where(is_node, torch.cumsum(is_node, 0) - 1, -1 - trie.utterance)
        last_ids = torch.tensor([ids[-1] for ids in continuations])
        sources = torch.cat([rank[trie.parent[is_node]], rank[trie.leaf]])
        self._order = sources.argsort(stable=True)
        self.sources = sources[self._order]
        self.targets = torch.cat([trie.token[is_node], last_ids])[self._order]

    def trie_mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the mask [B, 1, L, P + L]: 0 on prompt (P), ancestors and self, the dtype's lowest number elsewhere.

        It is additive, because a boolean mask of this shape is silently wrong under eager attention.
        """
        trie, (rows, width) = self._trie, self.real.shape
        seen = np.tile(np.eye(width, dtype=bool), (rows, 1))  # [B · L, L]; padding sees itself: no empty softmax
        place = (trie.utterance * width + self._column).numpy()
        for node, parent in self._levels():
            seen[place[node]] |= seen[place[parent]]
        longest = int(self._prompt_lens.max())
        prompt = torch.arange(longest)[None] < self._prompt_lens[:, None]
        nodes = torch.from_numpy(seen).view(rows, width, width)
        allowed = torch.cat([prompt[:, None].expand(-1, width, -1), nodes], dim=2).to(device)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    def sequence_mask(self) -> Tensor:
        """Returns the mask [B, P + L], 1 on real tokens, for rows of one continuation behind one common prompt (P)."""
        prompt = torch.ones(len(self.real), int(self._prompt_lens.max()), dtype=torch.bool)
        return torch.cat([prompt, self.real], dim=1).long()

    def sums(self, pair_logp: Tensor) -> list[float]:
        """Returns the sum of log-probabilities per continuation, in the rows' order.

        Args:
            pair_logp: [E] natural-log probability of each of the ``targets`` at its source, float64.
        """
        trie, num_nodes = self._trie, int(self._is_node.sum())
        logp = torch.empty_like(pair_logp)
        logp[self._order] = pair_logp
        path = np.zeros(trie.num_nodes)
        path[self._is_node.numpy()] = logp[:num_nodes].numpy()
        for node, parent in self._levels():
            path[node] += path[parent]
        return (torch.from_numpy(path)[trie.leaf] + logp[num_nodes:]).tolist()

    def _levels(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the trie's nodes and their parents depth by depth, from those whose parents are nodes too."""
        depth, parent = self._trie.depth.numpy(), self._trie.parent.numpy()
        order = np.argsort(depth, kind="stable")
        ends = np.cumsum(np.bincount(depth))
        for start, end in itertools.pairwise(ends[1:].tolist()):
            node = order[start:end]
            yield node, parent[node]
