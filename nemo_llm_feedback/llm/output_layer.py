"""The LLM's output matrix, applied only to the hidden states whose log-probabilities are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 256  # positions × vocabulary in float32 at a time


class OutputLayer:
    """Turns last hidden states into the logits that the model itself computes.

    Args:
        model: a ``transformers`` causal LM on its device, without gradients.

    Attributes:
        exact: whether hidden states and output matrix, taken apart, reproduce the model's logits.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._finish = self._find_finish()
        self.exact = self._finish is not None

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the model's logits [M, V] (M positions, V tokens) in float32 for hidden states [M, D]."""
        logits = self._model.get_output_embeddings()(hidden)
        return (self._finish(logits) if self._finish else logits).float()

    def _find_finish(self) -> Callable[[Tensor], Tensor] | None:
        """Finds what the model does to its logits after the output matrix, by comparing with a plain forward.

        Gemma caps them, Cohere multiplies and Granite divides them. None if no known way reproduces the model.
        """
        config = self._model.config.get_text_config()
        ids = torch.arange(1, 7, device=self._model.get_input_embeddings().weight.device)[None] % config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        expected = self._model(**inputs).logits.float()
        try:
            raw = self._model.get_output_embeddings()(self._model.base_model(**inputs).last_hidden_state)
        except (AttributeError, TypeError):
            return None
        finishes: list[Callable[[Tensor], Tensor]] = [nn.Identity()]
        if cap := getattr(config, "final_logit_softcapping", None):
            finishes.append(lambda logits: torch.tanh(logits / cap) * cap)
        if scale := getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", None):
            finishes += [lambda logits: logits * scale, lambda logits: logits / scale]
        for finish in finishes:
            if torch.allclose(finish(raw).float(), expected, rtol=1e-3, atol=1e-3):
                return finish
        return None


def pair_logp(states: Tensor, sources: Tensor, targets: Tensor, *, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns log p(target | position) of (position, target) pairs.

    Args:
        states: [M, D] hidden states of M positions, or [M, V] their logits.
        sources: [E] position of each pair, an index into ``states``, ascending; on the CPU.
        targets: [E] token id of each pair; on the model's device.
        logits_of: function from some of the states to their logits in float32.

    Returns:
        [E] natural-log probabilities in float64, on the model's device.
    """
    bounds = range(0, states.shape[0], _CHUNK)
    cuts = torch.searchsorted(sources, torch.tensor([*bounds, states.shape[0]])).tolist()
    sources = sources.to(states.device)
    parts = [torch.zeros(0, dtype=torch.float64, device=states.device)]
    for start, first, last in zip(bounds, cuts[:-1], cuts[1:], strict=True):
        logits = logits_of(states[start : start + _CHUNK])
        rows = sources[first:last] - start
        parts.append((logits[rows, targets[first:last]] - logits.logsumexp(-1)[rows]).double())
    return torch.cat(parts)
