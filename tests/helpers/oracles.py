"""Brute-force likelihoods by enumeration of every alignment, and tiny transducer modules to run them on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

NEG_INF = float("-inf")


class TinyDecoder(nn.Module):
    """An LSTM prediction network with the ``predict`` of NeMo's RNNTDecoder."""

    def __init__(self, num_labels: int, width: int, *, layers: int = 1) -> None:
        super().__init__()
        self.blank_idx = num_labels
        self.embed = nn.Embedding(num_labels, width)
        self.rnn = nn.LSTM(width, width, layers)

    def predict(self, y, state=None, add_sos=True, batch_size=None):
        width = self.embed.embedding_dim
        x = self.embed(y) if y is not None else self.embed.weight.new_zeros((batch_size, 1, width))
        if add_sos:
            x = torch.cat([x.new_zeros((x.shape[0], 1, width)), x], dim=1)
        with torch.autocast("cpu", enabled=False):  # not every CPU has an LSTM in bfloat16
            out, state = self.rnn(x.transpose(0, 1), state)
        return out.transpose(0, 1), state


class TinyJoint(nn.Module):
    """A joint with the members of NeMo's RNNTJoint that the likelihood uses."""

    def __init__(self, encoder: int, prediction: int, *, num_classes: int, num_extra_outputs: int = 0) -> None:
        super().__init__()
        self.enc = nn.Linear(encoder, 5)
        self.pred = nn.Linear(prediction, 5)
        self.joint_net = nn.Sequential(nn.Tanh(), nn.Linear(5, num_classes + 1 + num_extra_outputs))
        self.num_classes_with_blank = num_classes + 1 + num_extra_outputs
        self.num_extra_outputs = num_extra_outputs
        self.log_softmax = None

    def project_encoder(self, x: Tensor) -> Tensor:
        return self.enc(x)

    def project_prednet(self, x: Tensor) -> Tensor:
        return self.pred(x)

    def joint_after_projection(self, f: Tensor, g: Tensor) -> Tensor:
        logits = self.joint_net(f.unsqueeze(2) + g.unsqueeze(1))
        return logits if self.log_softmax is False else logits.log_softmax(-1)


def ctc_oracle(log_probs: Tensor, hyp: Sequence[int], *, blank: int) -> float:
    """log Σ over all V^T frame strings of [T, V] ``log_probs`` that collapse to ``hyp``."""
    num_frames, num_classes = log_probs.shape
    total = []
    for path in itertools.product(range(num_classes), repeat=num_frames):
        if [v for v, _ in itertools.groupby(path) if v != blank] == list(hyp):
            total.append(sum(log_probs[t, v].item() for t, v in enumerate(path)))
    return _log_sum(total)


def joint_tables(encoded: Tensor, hyp: Sequence[int], decoder, joint, *, num_durations: int) -> tuple[Tensor, Tensor]:
    """[T, U + 1, V + 1] label and [T, U + 1, M] duration log-probabilities of one [T, D] utterance and hypothesis."""
    labels = torch.tensor(list(hyp), dtype=torch.long)[None]
    out, _ = decoder.predict(labels, state=None, add_sos=True)
    joint.log_softmax, before = False, joint.log_softmax
    logits = joint.joint_after_projection(joint.project_encoder(encoded[None]), joint.project_prednet(out))[0]
    joint.log_softmax = before
    num_labels = logits.shape[-1] - num_durations
    return logits[..., :num_labels].log_softmax(-1), logits[..., num_labels:].log_softmax(-1)


def transducer_paths(
    num_frames: int, hyp: Sequence[int], *, durations: Sequence[int] | None
) -> list[list[tuple[int, int, int | None, int | None]]]:
    """All complete paths as lists of arcs (t, u, label or None for blank, index of the duration or None for RNN-T).

    A path ends with a blank that lands on ``num_frames`` exactly after all labels; RNN-T (``durations`` None) has the
    blank move 1 and the label move 0.
    """
    moves = [(None, 1, True), (None, 0, False)] if durations is None else []
    for i, duration in enumerate(durations or ()):
        moves += [(i, duration, True)] * (duration > 0) + [(i, duration, False)]
    paths = []

    def extend(t: int, u: int, arcs: list) -> None:
        for index, step, is_blank in moves:
            arc = (t, u, None if is_blank else (hyp[u] if u < len(hyp) else -1), index)
            if is_blank and t + step == num_frames and u == len(hyp):
                paths.append([*arcs, arc])
            elif t + step < num_frames and (is_blank or u < len(hyp)):
                extend(t + step, u + (not is_blank), [*arcs, arc])

    if num_frames:
        extend(0, 0, [])
    return paths


def transducer_oracle(
    label_logp: Tensor, duration_logp: Tensor, hyp: Sequence[int], *, durations: Sequence[int] | None
) -> float:
    """log Σ over all complete paths; tables as from ``joint_tables``."""
    num_frames = label_logp.shape[0]
    if num_frames == 0:
        return NEG_INF if hyp else 0.0
    blank = label_logp.shape[-1] - 1
    label, duration = label_logp.tolist(), duration_logp.tolist()
    totals = []
    for path in transducer_paths(num_frames, hyp, durations=durations):
        score = 0.0
        for t, u, token, index in path:
            score += label[t][u][blank if token is None else token]
            score += 0.0 if index is None else duration[t][u][index]
        totals.append(score)
    return _log_sum(totals)


def transducer_mass(
    encoded: Tensor, decoder, joint, *, max_labels: int, durations: Sequence[int] | None
) -> tuple[dict[tuple[int, ...], float], float, float]:
    """Splits the probability of everything a transducer can do on one [T, D] utterance.

    Returns:
        Probability of each complete label sequence of at most ``max_labels`` labels; mass of the paths that emit one
        label more (the tail); mass of the paths that TDT loses: (blank, 0), a jump beyond T, a label that lands on T.
    """
    num_frames, extra = len(encoded), len(durations or ())
    num_labels = joint.num_classes_with_blank - extra
    done: dict[tuple[int, ...], float] = {}
    tail = leaked = 0.0
    moves = list(enumerate(durations)) if durations else None

    def visit(t: int, prefix: tuple[int, ...], mass: float) -> None:
        nonlocal tail, leaked
        label, duration = (
            x[t, -1].exp().tolist() for x in joint_tables(encoded, prefix, decoder, joint, num_durations=extra)
        )
        for v in range(num_labels):
            is_blank = v == num_labels - 1
            for i, step in moves or [(None, int(is_blank))]:
                p = mass * label[v] * (1.0 if i is None else duration[i])
                after = prefix if is_blank else (*prefix, v)
                if is_blank and step > 0 and t + step == num_frames:
                    done[after] = done.get(after, 0.0) + p
                elif (is_blank and step == 0) or t + step >= num_frames:
                    leaked += p
                elif len(after) > max_labels:
                    tail += p
                else:
                    visit(t + step, after, p)

    visit(0, (), 1.0)
    return done, tail, leaked


def _log_sum(values: list[float]) -> float:
    if not values:
        return NEG_INF
    top = max(values)
    return top if top == NEG_INF else top + math.log(math.fsum(math.exp(v - top) for v in values))
