"""Log-probabilities from the LLM's hidden states: positions are picked before the vocabulary is multiplied in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CHUNK = 256  # positions × vocabulary in float32 at a time


class OutputLayer:
    """From last hidden states to logits as the model makes them.

    Args:
        model: a ``transformers`` causal LM on its device, without gradients.

    Attributes:
        exact: whether hidden states and output matrix could be taken apart so that they reproduce the model's logits.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        finish = self._find_finish()
        self.exact = finish is not None
        self._finish: Callable[[Tensor], Tensor] = finish or _as_they_are

    def next_logp(self, hidden: Tensor) -> Tensor:
        """Returns log-probabilities [M, V] in float32 of hidden states [M, D]; for few positions."""
        return self.logits(hidden).log_softmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the model's logits [M, V] in float32 of hidden states [M, D]."""
        return self._finish(self._model.get_output_embeddings()(hidden)).float()

    def _find_finish(self) -> Callable[[Tensor], Tensor] | None:
        """Finds what the model does to its logits after the output matrix, by comparing with a plain forward.

        Gemma caps them, Cohere multiplies and Granite divides them. None if nothing known reproduces the model.
        """
        config = self._model.config.get_text_config()
        ids = torch.arange(1, 7, device=self._model.get_input_embeddings().weight.device)[None] % config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        expected = self._model(**inputs).logits.float()
        try:
            raw = self._model.get_output_embeddings()(self._model.base_model(**inputs).last_hidden_state)
        except (AttributeError, TypeError):
            return None
        finishes: list[Callable[[Tensor], Tensor]] = [_as_they_are]
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
        states: [M, D] the positions' hidden states, or [M, V] their logits.
        sources: [E] position in ``states`` of each pair, ascending; on the CPU.
        targets: [E] token ids; on the model's device.
        logits_of: some of the states → their logits in float32.

    Returns:
        [E] natural log, float64, on the model's device.
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


def _as_they_are(logits: Tensor) -> Tensor:
    return logits
