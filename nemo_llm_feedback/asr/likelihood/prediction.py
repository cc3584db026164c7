"""Runs the prediction network over the trie, each distinct prefix once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.core.trie import PrefixTrie


def prefix_outputs(decoder: Any, trie: PrefixTrie) -> Tensor:
    """Output of the prediction network after each prefix of the trie, as its training forward gives it.

    Args:
        decoder: NeMo's prediction network. One with a ``context_size`` is stateless: its output depends on the last
            labels only. Any other is recurrent and is stepped by depth.
        trie: the prefix trie on the network's device; at least one node.

    Returns:
        [K, D] output after the prefix of node k, differentiable in the network's parameters.
    """
    context = getattr(decoder, "context_size", None)
    if context is not None:
        return _by_window(decoder, trie, context)
    parent = trie.parent[trie.parent >= 0]
    stepped = len(parent.unique()) < len(parent)  # some node has two children
    with _fit_for_backward(decoder, trie.token, stepped=stepped):
        return _by_depth(decoder, trie) if stepped else _by_sequence(decoder, trie)


def _by_sequence(decoder: Any, trie: PrefixTrie) -> Tensor:
    """Each utterance's only path in one run (one hypothesis per utterance); several times faster than by step."""
    sizes = torch.tensor([stop - start for _, start, stop in trie.spans], device=trie.token.device)
    row = torch.repeat_interleave(sizes)
    labels = trie.token.new_zeros((len(sizes), int(trie.depth.max())))
    child = trie.parent >= 0
    labels[row[child], trie.depth[child] - 1] = trie.token[child]
    out, _ = decoder.predict(labels, state=None, add_sos=True)
    return out[row, trie.depth]


def _by_depth(decoder: Any, trie: PrefixTrie) -> Tensor:
    """The nodes of one depth are a batch; their states are picked from their parents'."""
    order = torch.argsort(trie.depth, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)  # node → its row in the outputs by depth
    outputs: list[Tensor] = []
    state: tuple[Tensor, ...] = ()
    first = previous = 0
    for depth, size in enumerate(torch.bincount(trie.depth).tolist()):
        nodes = order[first : first + size]
        if depth == 0:  # no label stands for the start: an embedding of zeros
            out, state = decoder.predict(None, state=None, add_sos=False, batch_size=size)
        else:
            state = tuple(part.index_select(-2, place[trie.parent[nodes]] - previous) for part in state)
            out, state = decoder.predict(trie.token[nodes, None], state=state, add_sos=False)
        outputs.append(out[:, -1])
        previous, first = first, first + size
    return torch.cat(outputs).index_select(0, place)


def _by_window(decoder: Any, trie: PrefixTrie, context: int) -> Tensor:
    """All nodes at once, each with its last ``context`` labels.

    Not by the network's state: NeMo's loses labels at the start of an utterance from a context of 4 on
    (``StatelessNet.forward`` cuts with a negative index), unlike its training forward.
    """
    is_root = trie.parent < 0
    node = torch.arange(trie.num_nodes, device=trie.token.device)
    window = []
    for _ in range(context):
        window.append(trie.token[node].masked_fill(is_root[node], decoder.blank_idx))  # blank embeds as zeros
        node = torch.where(is_root[node], node, trie.parent[node])
    out, _ = decoder.predict(torch.stack(window[::-1], dim=1), state=None, add_sos=False)
    return out[:, -1].masked_fill(is_root[:, None], 0.0)


def _fit_for_backward(decoder: Any, like: Tensor, *, stepped: bool) -> AbstractContextManager[Any]:
    """Switches off the RNN kernels that cannot run the backward pass, or that run it slowly.

    cuDNN refuses the backward of an RNN in eval mode, and the feedback pass runs in eval mode with gradient. oneDNN
    spends some 20 ms on the weights' gradient in every call, four times as long as PyTorch's own LSTM (measured, 640
    wide), and there is a call for each depth.
    """
    if not torch.is_grad_enabled():
        return nullcontext()
    if like.is_cuda and not decoder.training:
        return torch.backends.cudnn.flags(enabled=False)
    if stepped and like.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None)
    return nullcontext()
