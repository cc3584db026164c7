"""Best paths of given label sequences, i.e. at which frame each label is spoken, for CTC, RNN-T and TDT.

The recursions are those of the likelihoods with max in the place of the sum (Viterbi), on one utterance at a time in
float64 on the CPU: only hypotheses that a user asked timestamps for are aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Labels
from nemo_llm_feedback.asr.likelihood.prediction import prefix_outputs
from nemo_llm_feedback.core.errors import DecodingError
from nemo_llm_feedback.core.trie import PrefixTrie

# In the place of −inf, so that differences of sums stay numbers; far below any sum of real log-probabilities.
_NEVER = -1e9
# Most cells (frame, prefix) of the joint that are evaluated at once.
_CELLS = 4096


@dataclass(frozen=True)
class Alignment:
    """Where the labels of a hypothesis are on its best path.

    Attributes:
        frames: frame at which each label starts, ascending.
        durations: frames that each label takes: TDT's own durations; the length of CTC's run; 1 for RNN-T.
        spoken: CTC only: all frames that are not blank, ascending.
    """

    frames: tuple[int, ...]
    durations: tuple[int, ...]
    spoken: tuple[int, ...] = ()


def align_ctc(log_probs: Tensor, labels: Labels) -> Alignment:
    """Best CTC path of a label sequence.

    Args:
        log_probs: [T, V+1] natural-log probabilities of an utterance's valid frames; blank is the last.
        labels: label ids without blank.

    Raises:
        DecodingError: the audio has too few frames for the labels.
    """
    if not labels:
        return Alignment((), ())
    scores = log_probs.detach().to("cpu", torch.float64).clamp_min(_NEVER).numpy()
    num_frames, blank = scores.shape[0], scores.shape[1] - 1
    states = np.full(2 * len(labels) + 1, blank)
    states[1::2] = labels
    skip = np.zeros(len(states), dtype=bool)  # a label may follow the one before without a blank unless it repeats it
    skip[3::2] = states[3::2] != states[1:-2:2]
    best = np.full(len(states), 2 * _NEVER * num_frames)
    if num_frames:
        best[:2] = scores[0, states[:2]]
    back = np.zeros((num_frames, len(states)), dtype=np.int8)
    for t in range(1, num_frames):
        moves = np.stack([best, _shifted(best, 1), np.where(skip, _shifted(best, 2), 4 * _NEVER * num_frames)])
        back[t] = moves.argmax(0)
        best = moves.max(0) + scores[t, states]
    state = len(states) - 1 if best[-1] > best[-2] else len(states) - 2
    if best[state] <= _NEVER:
        raise _no_path(labels, num_frames)
    path = np.empty(num_frames, dtype=np.int64)
    for t in range(num_frames - 1, -1, -1):
        path[t] = state
        state -= back[t, state]
    spoken = np.flatnonzero(path % 2)
    frames = [int(np.flatnonzero(path == 2 * u + 1)[0]) for u in range(len(labels))]
    runs = [int((path == 2 * u + 1).sum()) for u in range(len(labels))]
    return Alignment(tuple(frames), tuple(runs), tuple(spoken.tolist()))


def align_transducer(
    encoded: Tensor, labels: Labels, *, decoder: Any, joint: Any, durations: Sequence[int] = ()
) -> Alignment:
    """Best path of a label sequence through the lattice of an RNN-T or TDT model.

    Args:
        encoded: [D, T] encoder output of an utterance's valid frames.
        labels: label ids without blank.
        decoder, joint: NeMo's prediction network and joint, in eval mode.
        durations: TDT's durations in frames; none for RNN-T.

    Raises:
        DecodingError: no complete path exists.
    """
    if not labels:
        return Alignment((), ())
    if encoded.shape[1] == 0:
        raise _no_path(labels, 0)
    blank, label, taken = _arcs(encoded, labels, decoder, joint)
    blank_arcs, label_arcs = {1: blank}, {0: label}
    if durations:
        blank_arcs = {m: blank + taken[i] for i, m in enumerate(durations) if m}
        label_arcs = {m: label + taken[i, :, :-1] for i, m in enumerate(durations)}
    best = _best_scores(blank_arcs, label_arcs)
    return _trace(best, blank_arcs, label_arcs, labels)


def _arcs(encoded: Tensor, labels: Labels, decoder: Any, joint: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[T, U+1] blank, [T, U] next label and [M, T, U+1] durations: log-probabilities in float64."""
    blank = joint.num_classes_with_blank - joint.num_extra_outputs - 1
    with torch.no_grad():
        chain = PrefixTrie.build([list(labels)], [0]).to(encoded.device)
        prediction = joint.project_prednet(prefix_outputs(decoder, chain)[None])
        frames = joint.project_encoder(encoded.T[None])
        step = max(1, _CELLS // (len(labels) + 1))
        index = torch.tensor(labels, device=encoded.device)
        found: list[list[Tensor]] = [[], [], []]
        for start in range(0, frames.shape[1], step):
            logits = joint.joint_after_projection(frames[:, start : start + step], prediction)[0].double()
            log_probs = logits[..., : blank + 1].log_softmax(-1)
            found[0].append(log_probs[..., blank])
            found[1].append(log_probs[:, :-1].gather(2, index[None, :, None].expand(len(logits), -1, 1))[..., 0])
            found[2].append(logits[..., blank + 1 :].log_softmax(-1).permute(2, 0, 1))
    parts = (torch.cat(found[0]), torch.cat(found[1]), torch.cat(found[2], 1))
    scores = tuple(part.cpu().clamp_min(_NEVER).numpy() for part in parts)
    return scores[0], scores[1], scores[2]


def _best_scores(blank: dict[int, np.ndarray], label: dict[int, np.ndarray]) -> np.ndarray:
    """[T, U+1] score of the best path to each cell; arcs by move, labels [T, U] by the prefix that they leave."""
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
            # Labels that take no frame run along the row: a running maximum once their own sum is taken off.
            walked = np.concatenate([[0.0], label[0][t].cumsum()])
            best[t] = walked + np.maximum.accumulate(row - walked)
    return best


def _trace(best: np.ndarray, blank: dict[int, np.ndarray], label: dict[int, np.ndarray], labels: Labels) -> Alignment:
    num_frames, k = best.shape[0], best.shape[1] - 1
    # The last move is a blank that reaches the end exactly.
    ends = [(best[num_frames - m, k] + arcs[num_frames - m, k], m) for m, arcs in blank.items() if m <= num_frames]
    last = max(ends, default=(_NEVER, 0))
    if last[0] <= _NEVER:
        raise _no_path(labels, num_frames)
    t = num_frames - last[1]
    frames: list[int] = []
    taken: list[int] = []
    while t or k:
        options = [(best[t - m, k] + a[t - m, k], m, False) for m, a in blank.items() if m <= t]
        if k:
            options += [(best[t - m, k - 1] + a[t - m, k - 1], m, True) for m, a in label.items() if m <= t]
        _, move, is_label = max(options)
        t -= move
        if is_label:
            k -= 1
            frames.append(t)
            taken.append(1 if set(label) == {0} else move)
    return Alignment(tuple(reversed(frames)), tuple(reversed(taken)))


def _shifted(row: np.ndarray, by: int) -> np.ndarray:
    out = np.full_like(row, 4 * _NEVER * len(row))
    out[by:] = row[:-by]
    return out


def _no_path(labels: Sequence[int], num_frames: int) -> DecodingError:
    return DecodingError(
        f"no path spells {len(labels)} labels in {num_frames} frames, so they have no timestamps: the audio is too "
        "short for its transcript; decode it without timestamps."
    )


def plain_ids(sequence: Any) -> list[int]:
    """Plain integers from a list, a numpy array or an inference tensor."""
    return [int(i) for i in (sequence.tolist() if hasattr(sequence, "tolist") else sequence)]
