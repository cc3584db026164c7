"""NeMo's batched searches: captured as CUDA graphs where the weights stay, their findings copied at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Labels = tuple[int, ...]

# NeMo's boosting tree, or what stands for one per utterance, and its weight in the beam search.
Boosting = tuple[Any, float]

# A log-probability; −∞ would make NaNs in NeMo's beam.
_IMPOSSIBLE = -1e4


class Searches:
    """Runs NeMo's searches of one head; inside :meth:`cuda_graphs` those on a GPU are captured once and kept.

    A captured search holds the prediction network's first output and the boosting trees' first scores (NeMo computes
    them when it captures), so it must not outlive a change of the weights, and another list is another search.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] | None = None

    @contextmanager
    def cuda_graphs(self) -> Iterator[None]:
        """Inside, where no weight may change, searches on a GPU run as CUDA graphs; a context inside is this one."""
        outermost = self._kept is None
        if outermost:
            self._kept = {}
        try:
            yield
        finally:
            if outermost:
                self._kept = None  # and with it the graphs' memory

    def run(
        self,
        make: Callable[[bool], Callable[[Tensor, Tensor], Any]],
        inputs: Tensor,
        lengths: Tensor,
        *,
        kind: str,
        settings: tuple[Any, ...] = (),
        boosting: Boosting | None = None,
        dtype: torch.dtype,
    ) -> Any:
        """What NeMo's search finds.

        Args:
            make: whether CUDA graphs are allowed → the search, a function of inputs and lengths.
            inputs: [B, …] encoder output or log-probabilities.
            lengths: [B] frames.
            kind: names the search; of each kind, boosted or not, the last one is kept.
            settings: what it is made of, apart from the weights and the boosting.
            boosting: what boosts it, or None.
            dtype: the network's, in which the search runs: under autocast NeMo's beams would add up their scores in
                half precision, where a path of −40 nats has the next hundred frames for free.
        """
        able = boosting is None or boosting[0].compatible_with_cuda_graphs()
        with torch.autocast(inputs.device.type, enabled=False):
            if self._kept is None or not (able and on_gpu(inputs)):
                return make(False)(inputs.to(dtype), lengths)
            place, key = f"{kind}, boosted" if boosting else kind, (settings, boosting)
            if place not in self._kept or self._kept[place][0] != key:
                self._kept[place] = key, make(True)
            return self._kept[place][1](inputs.to(dtype), lengths)


def on_gpu(tensor: Tensor) -> bool:
    """Whether NeMo's searches over this tensor can be captured."""
    return tensor.is_cuda


def beam_labels(hyps: Any, *, rows: int, by_length: bool, collapse: bool) -> list[list[Labels]]:
    """The label sequences that a batched beam has found, best first: those of NeMo's ``to_nbest_hyps_list``.

    That one follows the pointers back and reads each hypothesis on the device: thousands of launches and hundreds of
    synchronisations per batch, where here the arrays are copied once.

    Args:
        hyps: NeMo's ``BatchedBeamHyps``.
        rows: B utterances; a captured search has room for more.
        by_length: rank by the score per label.
        collapse: merge repeated labels (CTC).

    Returns:
        B lists of at most N sequences.
    """
    scores = hyps.scores
    if by_length:
        scores = scores / (hyps.current_lengths_nb.to(scores.dtype) + 1)
    order = torch.sort(scores, dim=-1, descending=True).indices  # [B, N]
    active = (hyps.scores.gather(-1, order) > -torch.inf).cpu().numpy()
    steps, beam = int(hyps.current_lengths_wb.max()), order.cpu().numpy()
    labels, before = (part[..., :steps].cpu().numpy() for part in (hyps.transcript_wb, hyps.transcript_wb_prev_ptr))
    path = np.empty(labels.shape, dtype=labels.dtype)  # [B, N, steps]
    for t in range(steps - 1, -1, -1):
        path[..., t] = np.take_along_axis(labels[..., t], beam, axis=1)
        beam = np.take_along_axis(before[..., t], beam, axis=1)
    kept = (path >= 0) & (path != hyps.blank_index)
    if collapse:
        kept[..., 1:] &= path[..., 1:] != path[..., :-1]
    found = zip(path[:rows], kept[:rows], active[:rows], strict=True)
    return [[tuple(y[k].tolist()) for y, k, real in zip(*row, strict=True) if real] for row in found]


def nbest_labels(found: Sequence[Any]) -> list[list[Labels]]:
    """The label sequences in NeMo's N-best containers, per row."""
    return [[plain_labels(hyp.y_sequence) for hyp in row.n_best_hypotheses] for row in found]


def plain_labels(sequence: Any) -> Labels:
    """Plain integers from a list, a numpy array or an inference tensor."""
    return tuple(int(i) for i in (sequence.tolist() if hasattr(sequence, "tolist") else sequence))


def without_padding(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """CTC's [B, T, V+1] log-probabilities, with blank certain in the frames behind each row's length, [B].

    NeMo's beam_batch scores padded frames as audio; a certain blank there leaves every score as it is.
    """
    padded = torch.arange(log_probs.shape[1], device=log_probs.device)[None, :] >= lengths[:, None]
    certain = log_probs.new_full((log_probs.shape[2],), _IMPOSSIBLE)
    certain[-1] = 0.0
    return torch.where(padded[..., None], certain, log_probs)


def states_of_beams(
    src_states: Sequence[Tensor], batch_size: int, beam_size: int, indices: Tensor, dst_states: Any = None
) -> list[Tensor]:
    """NeMo's ``batch_aggregate_states_beam``: each beam takes over the state of the one that it continues.

    Args:
        src_states: the decoder's state, [batch_size · beam_size, C - 1] labels.
        batch_size, beam_size: how its rows are ordered.
        indices: [batch_size, beam_size] the beam of the same utterance that each one continues.
        dst_states: written to, if given.
    """
    first = torch.arange(0, batch_size * beam_size, beam_size, device=indices.device)[:, None]
    taken = [part[(first + indices).flatten()] for part in src_states]
    for target, part in zip(dst_states or (), taken, strict=False):
        target.copy_(part)
    return taken


def fusion(boosting: Boosting | None) -> dict[str, Any]:
    """The arguments by which NeMo's beam searches boost phrases."""
    return {} if boosting is None else {"fusion_models": [boosting[0]], "fusion_models_alpha": [boosting[1]]}
