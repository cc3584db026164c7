"""The prefix trie against a dictionary of prefixes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_llm_feedback.core.trie import PrefixTrie

Hyps = list[tuple[int, list[int]]]  # (batch row, labels)

HYPS = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=5)), max_size=12)


def build(hyps: Hyps) -> PrefixTrie:
    return PrefixTrie.build([labels for _, labels in hyps], [row for row, _ in hyps])


def spelled(trie: PrefixTrie, node: int) -> tuple[int, ...]:
    """The labels on the way from the root to the node."""
    labels: list[int] = []
    while trie.parent[node] >= 0:
        labels.append(int(trie.token[node]))
        node = int(trie.parent[node])
    return tuple(reversed(labels))


def test_example() -> None:
    trie = build([(1, [7, 8, 9]), (1, [7, 8]), (0, []), (1, [7, 8, 9]), (0, [5]), (1, [7, 4])])
    assert trie.utterance.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert trie.parent.tolist() == [-1, 0, -1, 2, 3, 3, 5]
    assert trie.token.tolist() == [-1, 5, -1, 7, 4, 8, 9]
    assert trie.depth.tolist() == [0, 1, 0, 1, 2, 2, 3]
    assert trie.leaf.tolist() == [6, 5, 0, 6, 1, 4]
    assert trie.spans == ((0, 0, 2), (1, 2, 7))
    assert (trie.num_nodes, trie.num_hyps) == (7, 6)


@settings(deadline=None)
@given(HYPS)
def test_nodes_are_the_distinct_prefixes_of_each_utterance(hyps: Hyps) -> None:
    trie = build(hyps)
    expected = {(row, tuple(labels[:n])) for row, labels in hyps for n in range(len(labels) + 1)}
    found = [(int(trie.utterance[k]), spelled(trie, k)) for k in range(trie.num_nodes)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert trie.depth.tolist() == [len(prefix) for _, prefix in found]
    assert [found[leaf] for leaf in trie.leaf.tolist()] == [(row, tuple(labels)) for row, labels in hyps]


@settings(deadline=None)
@given(HYPS)
def test_nodes_are_ordered_by_utterance_depth_and_parent(hyps: Hyps) -> None:
    trie = build(hyps)
    key = list(
        zip(trie.utterance.tolist(), trie.depth.tolist(), trie.parent.tolist(), trie.token.tolist(), strict=True)
    )
    assert key == sorted(key)
    assert all(parent < node for node, parent in enumerate(trie.parent.tolist()))
    rows = [row for row, start, stop in trie.spans for _ in range(start, stop)]
    assert rows == trie.utterance.tolist()


def test_long_labels_and_large_ids_sort_as_numbers() -> None:
    hyps = [(0, [2**40 + 1] * 300), (0, [255] * 300), (0, [256] * 300), (0, [2**40] * 300)]
    trie = build(hyps)
    assert trie.num_nodes == 1 + 4 * 300
    assert [spelled(trie, leaf) for leaf in trie.leaf.tolist()] == [tuple(labels) for _, labels in hyps]


def test_no_hypotheses() -> None:
    trie = PrefixTrie.build([], [])
    assert (trie.num_nodes, trie.num_hyps, trie.spans) == (0, 0, ())
    assert trie.leaf.dtype == torch.long


def test_rows_may_be_a_tensor_and_labels_may_be_tensors() -> None:
    labels = [[1, 2], [1], []]
    expected = PrefixTrie.build(labels, [2, 2, 0])
    trie = PrefixTrie.build([torch.tensor(hyp, dtype=torch.int32) for hyp in labels], torch.tensor([2, 2, 0]))
    assert torch.equal(trie.parent, expected.parent)
    assert torch.equal(trie.leaf, expected.leaf)


def test_to_moves_every_tensor() -> None:
    moved = build([(0, [1, 2]), (0, [1])]).to("meta")
    for name in ("parent", "token", "depth", "utterance", "leaf"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.spans == ((0, 0, 3),)


@pytest.mark.parametrize(
    ("labels", "rows", "message"),
    [([[1]], [0, 0], "one row per hypothesis"), ([[-1]], [0], "negative"), ([[1]], [-1], "negative")],
)
def test_faults_are_named(labels: list[list[int]], rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTrie.build(labels, rows)
