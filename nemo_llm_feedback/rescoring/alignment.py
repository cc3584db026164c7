"""Finds the frame at which each label of a given text is spoken (forced alignment), for CTC, RNN-T and TDT.

CTC paths come from NeMo's aligner. NeMo has none for transducers: its ``aligner_utils`` read frame-wise CTC
log-probabilities only, and its decoders give timestamps of the path that they took, not of a text that was chosen
afterwards. Their recursion is therefore here: that of the likelihood with max instead of the sum (Viterbi), on one
utterance at a time in float64, since only hypotheses that a user wants timestamps of are aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nemo.collections.asr.parts.utils.aligner_utils import viterbi_decoding
from torch import Tensor

from nemo_llm_feedback.asr.heads import Labels, TransducerHead
from nemo_llm_feedback.core.errors import DecodingError
from nemo_llm_feedback.core.trie import PrefixTrie

# Used instead of −inf, so that differences of sums stay numbers; far below any sum of real log-probabilities.
_NEVER = -1e9
# The same for NeMo's aligner, which computes in float32 and float64: a power of two is equal in both.
_NO_STATE = -(2.0**100)


def align_ctc(log_probs: Tensor, labels: Labels) -> tuple[list[int], list[int]]:
    """Best CTC path of a label sequence.

    Args:
        log_probs: [T, V+1] natural-log probabilities of the utterance's valid frames, blank last.
        labels: label ids without blank.

    Returns:
        The frame at which each label starts, and all frames that are not blank, both ascending.

    Raises:
        DecodingError: the audio has too few frames for the labels.
    """
    if not labels:
        return [], []
    scores = log_probs.detach().to("cpu", torch.float64).clamp_min(_NEVER)
    num_frames = len(scores)
    states = torch.full((2 * len(labels) + 1,), scores.shape[1] - 1)  # a blank before, between and behind labels
    states[1::2] = torch.tensor(labels)
    if num_frames == 0:
        raise _no_path(labels, num_frames)
    sizes = torch.tensor([num_frames]), torch.tensor([len(states)])
    (found,) = viterbi_decoding(scores[None], states[None], *sizes, torch.device("cpu"), _NO_STATE)
    path = torch.tensor(found)
    # Where there is no path, NeMo's result starts in a state that no path can start from.
    if path[0] > 1 or scores[torch.arange(num_frames), states[path]].sum() <= _NEVER:
        raise _no_path(labels, num_frames)
    starts = [int((path == 2 * u + 1).nonzero()[0]) for u in range(len(labels))]
    return starts, (path % 2).nonzero()[:, 0].tolist()


def align_transducer(head: TransducerHead, encoded: Tensor, labels: Labels) -> tuple[list[int], list[int]]:
    """Best path of a label sequence through the lattice of an RNN-T or TDT model.

    Args:
        head: the transducer head, in eval mode.
        encoded: [D, T] encoder output of the utterance's valid frames.
        labels: label ids without blank.

    Returns:
        The frame at which each label is emitted, ascending, and its duration in frames (1 for RNN-T).

    Raises:
        DecodingError: no complete path exists.
    """
    if not labels:
        return [], []
    num_frames = encoded.shape[1]
    if num_frames == 0:
        raise _no_path(labels, 0)
    chain = PrefixTrie.build([labels], [0])
    with torch.no_grad():
        cells = head.cells(encoded[None], torch.tensor([num_frames]), chain)
        scores = cells.evaluate(cells.all_cells(), cells.empty_scores(torch.float64))
    blank, label, taken = (part.cpu().clamp_min(_NEVER).numpy() for part in scores)
    blank_arcs, label_arcs = {1: blank}, {0: label[:, 1:]}
    if head.durations:
        blank_arcs = {m: blank + taken[i] for i, m in enumerate(head.durations) if m}
        label_arcs = {m: label[:, 1:] + taken[i, :, :-1] for i, m in enumerate(head.durations)}
    steps = _best_path(blank_arcs, label_arcs)
    if steps is None:
        raise _no_path(labels, num_frames)
    return [t for t, _ in steps], [move if head.durations else 1 for _, move in steps]


def _best_path(blank: dict[int, np.ndarray], label: dict[int, np.ndarray]) -> list[tuple[int, int]] | None:
    """(frame, move) of each label on the best path, or None where no path is possible.

    Args:
        blank: move in frames → [T, U+1] log-probability of a blank with this move at each cell.
        label: move in frames → [T, U] log-probability of the next label with this move.
    """
    num_frames, width = next(iter(blank.values())).shape
    best = np.full((num_frames, width), 2 * _NEVER * (num_frames + width))
    best[0, 0] = 0.0
    for t in range(num_frames):
        row = best[t]
        for m, arcs in blank.items():
            if t >= m:
                np.maximum(row, best[t - m] + arcs[t - m], out=row)
        for m, arcs in label.items():
            if m and t >= m:
                np.maximum(row[1:], best[t - m, :-1] + arcs[t - m], out=row[1:])
        if 0 in label:
            # Labels that take no frame move along the row: a running maximum once their sum is subtracted.
            walked = np.concatenate([[0.0], label[0][t].cumsum()])
            best[t] = walked + np.maximum.accumulate(row - walked)
    t, k = num_frames, width - 1
    steps: list[tuple[int, int]] = []
    while t or k:
        options = [(best[t - m, k] + a[t - m, k], m, False) for m, a in blank.items() if m <= t]
        if k and t < num_frames:  # the last move is a blank that reaches the end exactly
            options += [(best[t - m, k - 1] + a[t - m, k - 1], m, True) for m, a in label.items() if m <= t]
        score, move, is_label = max(options, default=(_NEVER, 0, False))
        if t == num_frames and score <= _NEVER:
            return None
        t -= move
        if is_label:
            k -= 1
            steps.append((t, move))
    return steps[::-1]


def _no_path(labels: Sequence[int], num_frames: int) -> DecodingError:
    """The error for labels that do not fit into the frames."""
    return DecodingError(
        f"no path spells {len(labels)} labels in {num_frames} frames, so they have no timestamps: the audio is too "
        "short for its transcript; decode it without timestamps."
    )
