"""Checks the inputs of the likelihoods (shapes, lengths, labels) and zeroes padding and broken rows."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_llm_feedback.core.trie import PrefixTrie


def clean_rows(x: Tensor, lengths: Tensor, trie: PrefixTrie) -> tuple[Tensor, Tensor]:
    """Zeroes frames behind each row's length and all frames of rows that are not finite.

    So neither padding nor a broken row can reach another row, or the weights' gradient (0 · NaN = NaN).

    Args:
        x: [B, T, D] any features; T may be 0.
        lengths: [B] valid frames of each row.
        trie: the prefix trie of the hypotheses, checked against the batch.

    Returns:
        [B, max(T, 1), D] features, and [B] whether the valid frames of the row are finite.

    Raises:
        ValueError: ``x``, ``lengths`` and the trie do not fit together.
    """
    check_shapes(x, lengths, trie)
    if x.shape[1] == 0:
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))
    valid = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # [B, T]
    row_ok = (x.isfinite().all(-1) | ~valid).all(-1)
    return x.masked_fill(~(valid & row_ok[:, None])[..., None], 0.0), row_ok


def check_shapes(x: Tensor, lengths: Tensor, trie: PrefixTrie) -> None:
    """Raises a ValueError that names the fault when rows, lengths and trie do not fit together."""
    if x.dim() != 3 or lengths.shape != x.shape[:1]:
        raise ValueError(f"expected [B, T, D] and [B], got {tuple(x.shape)} and {tuple(lengths.shape)}.")
    if int(lengths.max()) > x.shape[1] or int(lengths.min()) < 0:
        raise ValueError(f"lengths must lie in 0 … {x.shape[1]}, the frames given; got {lengths.tolist()}.")
    if trie.spans[-1][0] >= x.shape[0]:
        raise ValueError(f"the trie names batch row {trie.spans[-1][0]}, but the batch has {x.shape[0]} rows.")


def check_labels(trie: PrefixTrie, *, num_classes: int) -> None:
    """Raises a ValueError when a label is blank, the last class, or lies outside the vocabulary."""
    token = trie.token[trie.parent >= 0]
    if token.numel() and int(token.max()) >= num_classes - 1:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 2} (blank is {num_classes - 1}); the trie holds up to "
            f"{int(token.max())}. Pass label ids of this model's vocabulary, without blanks."
        )


def empty_result(x: Tensor) -> Tensor:
    """[0] result for a trie without hypotheses, attached to ``x``'s graph so that a backward pass works."""
    return x.reshape(-1)[:0].to(torch.promote_types(x.dtype, torch.float32))


def wide(like: Tensor) -> torch.dtype:
    """The dtype of the recursions: float64 where the tensor's device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
