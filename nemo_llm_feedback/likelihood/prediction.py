"""The prediction network over the trie: one step per depth, each distinct prefix once."""

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

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def predict(
        self, y: Tensor | None, state: Any, add_sos: bool, batch_size: int | None = None
    ) -> tuple[Tensor, Any]: ...


def prefix_outputs(decoder: PredictionNetwork, trie: PrefixTrie) -> Tensor:
    """Output of the prediction network after each prefix of the trie.

    The network is stepped by depth: the nodes of one depth are a batch whose states are picked from their parents. The
    roots get the network's start (an all-zero embedding), as in its training forward.

    Args:
        decoder: the prediction network.
        trie: the prefix trie on the network's device; at least one node.

    Returns:
        [K, D] output after the prefix of node k, differentiable in the network's parameters.
    """
    order = torch.argsort(trie.depth, stable=True)
    sizes = torch.bincount(trie.depth).tolist()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)  # node → its row in the outputs by depth
    outputs: list[Tensor] = []
    state: Any = None
    first = previous = 0
    for depth, size in enumerate(sizes):
        nodes = order[first : first + size]
        with _without_cudnn(decoder, nodes):
            if depth == 0:
                out, state = decoder.predict(None, state=None, add_sos=False, batch_size=size)
            else:
                state = _pick(state, place[trie.parent[nodes]] - previous)
                out, state = decoder.predict(trie.token[nodes, None], state=state, add_sos=False)
        outputs.append(out[:, -1])
        previous, first = first, first + size
    return torch.cat(outputs).index_select(0, place)


def _pick(state: Any, rows: Tensor) -> Any:
    """Selects batch rows of a recurrent state: tensors [..., batch, H] in tuples and lists, or None."""
    if isinstance(state, Tensor):
        return state.index_select(-2, rows)
    if isinstance(state, (tuple, list)):
        return type(state)(_pick(part, rows) for part in state)
    if state is None:
        return None
    raise TypeError(f"cannot pick rows of a prediction-network state of type {type(state).__name__}.")


def _without_cudnn(decoder: PredictionNetwork, nodes: Tensor) -> AbstractContextManager[Any]:
    """cuDNN refuses the backward of an RNN in eval mode, and the feedback pass runs in eval mode with gradient."""
    if nodes.is_cuda and not decoder.training and torch.is_grad_enabled():
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()
