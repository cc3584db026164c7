"""The prediction network over the trie: each distinct prefix once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_llm_feedback.trie import PrefixTrie


class PredictionNetwork(Protocol):
    """What is asked of a prediction network; NeMo's ``RNNTDecoder`` and ``StatelessTransducerDecoder`` have it."""

    training: bool
    blank_idx: int

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def predict(
        self, y: Tensor | None, state: Any, add_sos: bool, batch_size: int | None = None
    ) -> tuple[Tensor, Any]: ...


def prefix_outputs(decoder: PredictionNetwork, trie: PrefixTrie) -> Tensor:
    """Output of the prediction network after each prefix of the trie, as its training forward gives it.

    Args:
        decoder: the prediction network. One with a ``context_size`` is stateless: its output depends on the last
            labels only. Any other is recurrent and is stepped by depth.
        trie: the prefix trie on the network's device; at least one node.

    Returns:
        [K, D] output after the prefix of node k, differentiable in the network's parameters.
    """
    context = getattr(decoder, "context_size", None)
    with _without_cudnn(decoder, trie.token):
        return _by_depth(decoder, trie) if context is None else _by_window(decoder, trie, context)


def _by_depth(decoder: PredictionNetwork, trie: PrefixTrie) -> Tensor:
    """The nodes of one depth are a batch; their states are picked from their parents'."""
    order = torch.argsort(trie.depth, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)  # node → its row in the outputs by depth
    outputs: list[Tensor] = []
    state: Any = None
    first = previous = 0
    for depth, size in enumerate(torch.bincount(trie.depth).tolist()):
        nodes = order[first : first + size]
        if depth == 0:  # no label stands for the start: an embedding of zeros
            out, state = decoder.predict(None, state=None, add_sos=False, batch_size=size)
        else:
            state = _pick(state, place[trie.parent[nodes]] - previous)
            out, state = decoder.predict(trie.token[nodes, None], state=state, add_sos=False)
        outputs.append(out[:, -1])
        previous, first = first, first + size
    return torch.cat(outputs).index_select(0, place)


def _by_window(decoder: PredictionNetwork, trie: PrefixTrie, context: int) -> Tensor:
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


def _pick(state: Any, rows: Tensor) -> Any:
    """Selects batch rows of a recurrent state: tensors [..., batch, H] in tuples and lists, or None."""
    if isinstance(state, Tensor):
        return state.index_select(-2, rows)
    if isinstance(state, (tuple, list)):
        return type(state)(_pick(part, rows) for part in state)
    raise TypeError(f"cannot pick rows of a prediction-network state of type {type(state).__name__}.")


def _without_cudnn(decoder: PredictionNetwork, like: Tensor) -> AbstractContextManager[Any]:
    """cuDNN refuses the backward of an RNN in eval mode, and the feedback pass runs in eval mode with gradient."""
    if like.is_cuda and not decoder.training and torch.is_grad_enabled():
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()
