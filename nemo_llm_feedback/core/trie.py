"""The prefix trie of hypotheses, by which the likelihood computes shared prefixes once: one node per prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrefixTrie:
    """All distinct prefixes of all hypotheses, shared within an utterance and never across utterances.

    Nodes are numbered by utterance, then depth, then parent. So a parent comes before its children, the nodes of an
    utterance are one contiguous range, and so are the children of any contiguous range of its nodes.

    Attributes:
        parent: [K] node of the prefix without its last label; −1 at a root (the empty prefix of an utterance).
        token: [K] the prefix's last label; −1 at a root.
        depth: [K] number of labels in the prefix, 0 at a root.
        utterance: [K] batch row that the node belongs to.
        leaf: [H] node that spells hypothesis h, in the order the hypotheses were given. Duplicates share a leaf; a
            leaf may have children (a hypothesis can be the prefix of another one).
        spans: (batch row, first node, one past the last node) of each utterance that has a hypothesis.
    """

    parent: Tensor
    token: Tensor
    depth: Tensor
    utterance: Tensor
    leaf: Tensor
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def build(cls, labels: Sequence[Sequence[int]], utterance: Sequence[int] | Tensor) -> PrefixTrie:
        """Builds the trie on the CPU.

        Args:
            labels: label ids of each of the H hypotheses, without blank, each ≥ 0; ragged; empty and duplicate
                hypotheses are allowed, and H may be 0.
            utterance: [H] batch row of each hypothesis, ≥ 0, in any order.

        Raises:
            ValueError: the two lengths differ, or a label or row is negative.
        """
        rows = np.asarray(utterance.cpu() if isinstance(utterance, Tensor) else utterance, dtype=np.int64).reshape(-1)
        if len(rows) != len(labels):
            raise ValueError(f"{len(labels)} hypotheses but {len(rows)} batch rows: give one row per hypothesis.")
        if len(rows) == 0:
            none = torch.zeros(0, dtype=torch.long)
            return cls(parent=none, token=none, depth=none, utterance=none, leaf=none, spans=())
        padded = _pad(labels)
        if rows.min() < 0 or padded[padded != _PAD].min(initial=0) < 0:
            raise ValueError("negative label or batch row: pass label ids without padding and rows of the batch.")

        # Sorting puts hypotheses with a common prefix next to each other, and a prefix before its continuations.
        keyed = np.concatenate([rows[:, None], padded], axis=1)
        order = _sort_rows(keyed)
        keyed = keyed[order]
        width = (keyed[:, 1:] != _PAD).sum(axis=1)  # [H] labels of the sorted hypotheses

        # introduced[h, j]: the prefix of length j of sorted hypothesis h occurs in no earlier one.
        shared = np.zeros(keyed.shape, dtype=bool)
        np.logical_and.accumulate(keyed[1:] == keyed[:-1], axis=1, out=shared[1:])
        introduced = ~shared & (np.arange(keyed.shape[1]) <= width[:, None])

        owner, depth = np.nonzero(introduced)
        span_key = keyed[owner, 0] * keyed.shape[1] + depth
        by_level = np.argsort(span_key, kind="stable")  # utterance, depth, then sorted order: parents in order
        owner, depth = owner[by_level], depth[by_level]
        number = np.full(keyed.shape, -1, dtype=np.int64)
        number[owner, depth] = np.arange(len(owner))
        np.maximum.accumulate(np.where(introduced, number, -1), axis=0, out=number)  # prefix (h, j) → its node

        node_utterance = keyed[owner, 0]
        leaf = np.empty(len(order), dtype=np.int64)
        leaf[order] = number[np.arange(len(order)), width]
        is_root = depth == 0
        firsts = np.flatnonzero(is_root)
        lasts = np.append(firsts[1:], len(owner))
        return cls(
            parent=torch.from_numpy(np.where(is_root, -1, number[owner, np.maximum(depth - 1, 0)])),
            token=torch.from_numpy(np.where(is_root, -1, keyed[owner, depth])),
            depth=torch.from_numpy(depth),
            utterance=torch.from_numpy(node_utterance),
            leaf=torch.from_numpy(leaf),
            spans=tuple(zip(node_utterance[firsts].tolist(), firsts.tolist(), lasts.tolist(), strict=True)),
        )

    @property
    def num_nodes(self) -> int:
        """K, the number of distinct prefixes, roots included."""
        return self.parent.shape[0]

    @property
    def num_hyps(self) -> int:
        """H, the number of hypotheses, duplicates counted."""
        return self.leaf.shape[0]

    def to(self, device: torch.device | str) -> PrefixTrie:
        """The same trie with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("parent", "token", "depth", "utterance", "leaf")}
        return replace(self, **moved)


_PAD = np.iinfo(np.int64).min  # sorts before every label, so that a prefix precedes its continuations


def _pad(labels: Sequence[Sequence[int]]) -> np.ndarray:
    """[H, U] labels, padded with ``_PAD`` to the longest hypothesis."""
    lens = np.fromiter((len(hyp) for hyp in labels), dtype=np.int64, count=len(labels))
    padded = np.full((len(labels), int(lens.max())), _PAD, dtype=np.int64)
    flat = [np.asarray(hyp, dtype=np.int64) for hyp in labels]
    padded[np.arange(padded.shape[1]) < lens[:, None]] = np.concatenate(flat)
    return padded


def _sort_rows(rows: np.ndarray) -> np.ndarray:
    """Indices that sort the rows of a [H, W] int64 matrix lexicographically; equal rows keep their order."""
    # Big-endian with the sign bit flipped, bytes compare as the numbers do: one sort instead of one per column.
    as_bytes = np.ascontiguousarray((rows ^ np.iinfo(np.int64).min).astype(">u8"))
    return np.argsort(as_bytes.view(f"V{8 * rows.shape[1]}").reshape(-1), kind="stable")
