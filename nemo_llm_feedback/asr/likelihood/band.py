"""Skips lattice cells (frame, node) of next to no probability before the joint runs; the error in log p is bounded.

Which cells these are is not known before the joint is evaluated, so an upper bound is used. Let S be blank and
the labels that occur in an utterance's hypotheses. A softmax over S alone,

    q(v | t, k) = exp z_v(t, k) / Σ_{s in S} exp z_s(t, k)  ≥  p(v | t, k)      for v in S,

needs |S| of the V rows of the joint's last layer. With q on every arc the lattice gives an upper bound of log p(h) and
of the probability of every cell. Then

1. the cells whose visits add up to no more than a small mass are left out, the rest is evaluated in full;
2. the lattice over evaluated cells alone is a lower bound, and the one with p on evaluated and q on all other cells an
   upper bound of log p(h): where they are further apart than the tolerance, step 1 is repeated with the better bounds.

So the error is not estimated but bounded, for these weights and this audio, without an earlier pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemo_llm_feedback.asr.likelihood.joint import JointCells
from nemo_llm_feedback.asr.likelihood.lattice import ArcScores, lattice_log_prob
from nemo_llm_feedback.core.errors import ConfigError

_INF = float("inf")


@dataclass(frozen=True, eq=False)
class BandReport:
    """What the band left out in one call.

    Attributes:
        lost: [H] nats, ≥ 0: log p(h) exceeds the returned value by no more than this (up to the rounding of the
            logits); 0 for hypotheses without any path. Each is ≤ the tolerance.
        evaluated: cells that the joint evaluated in full.
        cells: cells of the exact computation.
        rounds: times that cells were chosen.
    """

    lost: Tensor
    evaluated: int
    cells: int
    rounds: int


@dataclass(frozen=True)
class Band:
    """Switches the banded lattice on.

    Attributes:
        tolerance: the most that log p of a hypothesis may lose, in nats, > 0.
        report: receives what was lost, once per call of the likelihood.
    """

    tolerance: float = 1e-3
    report: Callable[[BandReport], None] | None = None

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ConfigError(
                f"band tolerance {self.tolerance} must be > 0 nats; leave the band out for exact values."
            )


# Share of the tolerance that the cells left out in the first round may hold by the bounds (in each later one a tenth
# of the last), and rounds after which an utterance that is not within the tolerance is evaluated whole.
_SPARE, _MAX_ROUNDS = 0.5, 4


@torch.no_grad()
def banded_scores(cells: JointCells, *, durations: tuple[int, ...], band: Band) -> ArcScores:
    """Scores of the arcs out of the cells that matter, −inf for all others.

    Args:
        cells: the cells of the whole lattice.
        durations: frames of each duration; none for RNN-T.
        band: tolerance, and where to report.

    Returns:
        The scores, without gradient, for ``arc_scores(evaluated=…)``.

    Raises:
        ConfigError: the joint is in train mode or does not end in a Linear layer.
    """
    if cells.joint.training:
        raise ConfigError("the band needs the joint in eval mode: random masks would differ between its two passes.")
    every = cells.all_cells()
    done = torch.zeros_like(every)
    scores = _upper_bounds(cells)
    score = functools.partial(lattice_log_prob, trie=cells.trie, lengths=cells.lengths, durations=durations)
    parent = cells.trie.parent.clamp_min(0)
    rounds = 0
    while True:
        with torch.enable_grad():
            free = ArcScores(*(part.detach().requires_grad_() for part in scores))
            upper = score(free)
        # Every path takes a blank or a label arc beside its durations.
        blank, label = scores.blank.masked_fill(~done, -_INF), scores.label.masked_fill(~done[:, parent], -_INF)
        kept = ArcScores(blank, label, scores.durations)
        bound = upper.detach()
        lost = torch.where(bound == -_INF, torch.zeros_like(bound), bound - score(kept)).clamp_min(0.0)
        loose = ~(lost <= band.tolerance)  # a NaN is loose
        needed = every & ~done & _rows_of(loose, cells)
        if not bool(needed.any()):
            break
        if rounds < _MAX_ROUNDS:
            spare = band.tolerance * _SPARE * 0.1**rounds
            possible = bound.isfinite().to(bound.dtype)
            by_blank, by_label = torch.autograd.grad(upper, (free.blank, free.label), possible)
            visits = by_blank.index_add(1, parent, by_label)  # [T, K] expected, summed over hypotheses
            needed &= _visited(visits, needed, cells, spare=spare)
        cells.evaluate(needed, scores)
        done |= needed
        rounds += 1
    if band.report is not None:
        band.report(BandReport(lost, int(done.sum()), int(every.sum()), rounds))
    return kept


def _upper_bounds(cells: JointCells) -> ArcScores:
    """log q of every arc: normalised over blank and the labels of the utterance's hypotheses."""
    scores = cells.empty_scores()
    trie, blank, lengths = cells.trie, cells.blank, cells.lengths.tolist()
    extra = torch.arange(blank, blank + 1 + cells.num_durations, device=cells.lengths.device)  # blank, then durations
    hidden, outputs = cells.frames.shape[-1], cells.joint.num_classes_with_blank
    for row, start, stop in trie.spans:
        labels = trie.token[start + 1 : stop].unique()
        parent = trie.parent[start + 1 : stop] - start
        column = torch.searchsorted(labels, trie.token[start + 1 : stop])
        nodes = slice(start, stop)
        # Few outputs and no gradients are held, in the memory of a chunk of cells with all of them.
        wider = 2 * cells.chunk * (hidden + outputs) // (hidden + len(labels) + 1)
        step = max(1, wider // (stop - start))
        with _only_outputs(cells, torch.cat([labels, extra])):
            for first in range(0, lengths[row], step):
                frames = slice(first, min(first + step, lengths[row]))
                logits = cells.logits(cells.frames[row : row + 1, frames], cells.prefixes[None, nodes])[0]
                logits = logits.to(scores.blank.dtype)
                log_q = logits[..., : len(labels) + 1].log_softmax(-1)
                scores.blank[frames, nodes] = log_q[..., -1]
                scores.label[frames, start + 1 : stop] = log_q[:, parent, column]
                if cells.num_durations:
                    share = logits[..., len(labels) + 1 :].log_softmax(-1)
                    scores.durations[:, frames, nodes] = share.permute(2, 0, 1)
    return scores


@contextmanager
def _only_outputs(cells: JointCells, outputs: Tensor) -> Iterator[None]:
    """Inside, the joint computes only these of its outputs."""
    net: Any = getattr(cells.joint, "joint_net", None)
    if not (isinstance(net, nn.Sequential) and isinstance(net[-1], nn.Linear)):
        raise ConfigError("the band needs a joint whose joint_net ends in a Linear layer; leave the band out.")
    last = net[-1]
    net[-1] = nn.Linear(last.in_features, len(outputs), bias=last.bias is not None, device="meta")
    net[-1].load_state_dict({name: weight[outputs] for name, weight in last.state_dict().items()}, assign=True)
    net[-1].requires_grad_(False)  # autocast keeps a copy of what may get a gradient until its context ends
    try:
        yield
    finally:
        net[-1] = last


def _rows_of(loose: Tensor, cells: JointCells) -> Tensor:
    """[K] whether a node's utterance has a loose hypothesis."""
    trie = cells.trie
    rows = torch.zeros(len(cells.lengths), dtype=torch.bool, device=loose.device)
    rows[trie.utterance[trie.leaf[loose]]] = True
    return rows[trie.utterance]


def _visited(visits: Tensor, among: Tensor, cells: JointCells, *, spare: float) -> Tensor:
    """[T, K] the cells but for the least visited ones that add up to ``spare`` in each utterance."""
    visits = visits.masked_fill(~among, 0.0)
    needed = torch.zeros_like(among)
    for _, start, stop in cells.trie.spans:
        part = visits[:, start:stop]
        ordered = part.reshape(-1).sort().values
        # On the CPU: a GPU has no deterministic cumsum of floats, and the sum is needed here anyway.
        left_out = int((ordered.cpu().cumsum(0) <= spare).sum())
        needed[:, start:stop] = part >= ordered[min(left_out, len(ordered) - 1)]
    return needed
