"""The tensors of the likelihood benchmark: N-best groups that differ like real ones, and a model that aligns them.

A random model spreads its probability over all alignments; a trained one holds it near one of them, and both the
exact backward pass and the band profit from that. So the joint is built to emit the next label of prefix k around a
frame τ_k: p(emit | t, k) = σ((t − τ_k) / WIDTH). The width is chosen so that emission times spread as was measured on
the shared RNN-T checkpoint (posterior standard deviation 0.27 frames on average, barista/dev; 0.22 for TDT).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood.prediction import prefix_outputs
from nemo_llm_feedback.core.trie import PrefixTrie

WIDTH = 0.2  # frames
DURATIONS = (0, 1, 2, 3, 4)
NUM_HYPS = 8
EDITS = Path(__file__).with_name("nbest_edits.json")

Labels = list[int]


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem.

    Attributes:
        rows: B utterances.
        frames: T encoder frames of each, 80 ms apart.
        labels: smallest and largest number of labels of a row's best hypothesis.
        vocabulary: V labels without blank.
        encoder, hidden: width of the encoder, and of prediction network and joint.
        layers, heads: of the FastConformer encoder of the training step.
    """

    rows: int
    frames: int
    labels: tuple[int, int]
    vocabulary: int
    encoder: int
    hidden: int
    layers: int
    heads: int


FULL = Shape(rows=4, frames=188, labels=(40, 60), vocabulary=1024, encoder=512, hidden=640, layers=17, heads=8)
SMALL = Shape(rows=2, frames=94, labels=(20, 30), vocabulary=512, encoder=176, hidden=320, layers=4, heads=4)
TINY = Shape(rows=2, frames=24, labels=(5, 7), vocabulary=64, encoder=16, hidden=64, layers=1, heads=2)


@dataclass(frozen=True)
class Problem:
    """One benchmark problem.

    Attributes:
        shape: its sizes.
        family: ``ctc``, ``rnnt`` or ``tdt``.
        groups: B lists of N label sequences, the best first.
        encoded: [B, T, D] encoder output, or [B, T, V + 1] logits for CTC.
        lengths: [B] frames.
        decoder, joint: NeMo's modules; None for CTC.
    """

    shape: Shape
    family: str
    groups: list[list[Labels]]
    encoded: Tensor
    lengths: Tensor
    decoder: Any = None
    joint: Any = None

    @property
    def flat(self) -> tuple[list[Labels], list[int]]:
        """All hypotheses and the row of each."""
        return [h for g in self.groups for h in g], [b for b, g in enumerate(self.groups) for _ in g]

    @property
    def best(self) -> list[Labels]:
        """The best hypothesis of each row."""
        return [group[0] for group in self.groups]

    @property
    def rho(self) -> float:
        """Unique nodes of the groups ÷ nodes of one hypothesis per row."""
        nodes = sum(len(hyp) + 1 for hyp in self.best)
        return PrefixTrie.build(*self.flat).num_nodes / nodes


def make_groups(shape: Shape, *, seed: int) -> tuple[list[list[Labels]], list[list[Tensor]]]:
    """Groups of N by the stored counts of real edits, and the frames at which each hypothesis's labels are emitted."""
    rng = random.Random(seed)
    counts = json.loads(EDITS.read_text(encoding="utf-8"))
    groups, times = [], []
    for row in range(shape.rows):
        low, high = shape.labels
        size = low + (high - low) * row // max(1, shape.rows - 1)
        base = [rng.randrange(shape.vocabulary) for _ in range(size)]
        frames = torch.linspace(3, shape.frames - 4, size) + torch.tensor([rng.uniform(-1, 1) for _ in range(size)])
        members, member_times = [base], [frames.tolist()]
        while len(members) < NUM_HYPS:
            parent = _draw(rng, counts["parent_of_member"][len(members)])
            labels, at = _edited(rng, members[parent], member_times[parent], counts, shape.vocabulary)
            if labels not in members:
                members.append(labels)
                member_times.append(at)
        groups.append(members)
        times.append([torch.tensor(t) for t in member_times])
    return groups, times


def _edited(
    rng: random.Random, labels: Labels, times: list[float], counts: dict[str, Any], vocabulary: int
) -> tuple[Labels, list[float]]:
    labels, times = list(labels), list(times)
    edits = int(_key(rng, counts["num_edits"]))
    twentieths = counts["first_edit_in_twentieths"]
    place = int((_draw(rng, twentieths) + rng.random()) / len(twentieths) * (len(labels) + 1))
    for _ in range(edits):
        kind = _key(rng, counts["kinds"])
        place = min(place, len(labels) if kind == "insert" else len(labels) - 1)
        if kind == "delete":
            del labels[place], times[place]
        elif kind == "insert":
            before = times[place - 1] if place else 1.0
            after = times[place] if place < len(times) else times[-1] + 2.0
            labels.insert(place, rng.randrange(vocabulary))
            times.insert(place, (before + after) / 2)
        else:
            labels[place] = rng.randrange(vocabulary)
        place += int(_key(rng, counts["labels_to_next_edit"]))
    return labels, times


def _draw(rng: random.Random, weights: Sequence[int]) -> int:
    return rng.choices(range(len(weights)), weights)[0]


def _key(rng: random.Random, counts: dict[str, int]) -> str:
    return rng.choices(list(counts), list(counts.values()))[0]


def make_problem(family: str, shape: Shape, *, seed: int = 0, device: str = "cpu") -> Problem:
    """Builds the problem of a family; the same seed gives the same tensors."""
    groups, times = make_groups(shape, seed=seed)
    torch.manual_seed(seed)
    lengths = torch.full((shape.rows,), shape.frames, device=device)
    if family == "ctc":
        logits = _ctc_logits(shape, groups, times)
        return Problem(shape, family, groups, logits.to(device), lengths)
    decoder, joint = _modules(shape, durations=DURATIONS if family == "tdt" else ())
    encoded = torch.randn(shape.rows, shape.frames, shape.encoder)
    encoded[..., 0] = torch.arange(shape.frames) / shape.frames
    problem = Problem(shape, family, groups, encoded, lengths, decoder, joint)
    _align(problem, times)
    return Problem(
        shape, family, groups, encoded.to(device), lengths, decoder.to(device).eval(), joint.to(device).eval()
    )


def _ctc_logits(shape: Shape, groups: list[list[Labels]], times: list[list[Tensor]]) -> Tensor:
    """[B, T, V + 1]: blank is probable but at the frame of a label; other members' labels are less probable there."""
    logits = torch.randn(shape.rows, shape.frames, shape.vocabulary + 1)
    logits[..., -1] += 8.0
    for row, (members, frames) in enumerate(zip(groups, times, strict=True)):
        for n, (labels, at) in enumerate(zip(members, frames, strict=True)):
            place = (row, at.round().long().clamp(0, shape.frames - 1), torch.tensor(labels))
            logits[place] = logits[place].clamp_min(12.0 if n == 0 else 9.0)
    return logits


def _modules(shape: Shape, *, durations: Sequence[int]) -> tuple[Any, Any]:
    """NeMo's LSTM prediction network and joint as in a FastConformer transducer."""
    from nemo.collections.asr.modules.rnnt import RNNTDecoder, RNNTJoint

    decoder = RNNTDecoder(
        prednet={"pred_hidden": shape.hidden, "pred_rnn_layers": 1, "dropout": 0.0}, vocab_size=shape.vocabulary
    )
    net = {"encoder_hidden": shape.encoder, "pred_hidden": shape.hidden, "joint_hidden": shape.hidden}
    joint = RNNTJoint(
        {**net, "activation": "relu", "dropout": 0.0},
        shape.vocabulary,
        num_extra_outputs=len(durations),
        log_softmax=False if durations else None,
    )
    with torch.no_grad():
        for param in decoder.parameters():
            param.mul_(6.0)  # so that different prefixes have outputs that one linear map can tell apart
    return decoder, joint


@torch.no_grad()
def _align(problem: Problem, times: list[list[Tensor]]) -> None:
    """Sets the joint's weights so that it emits each node's children around their frames.

    The hidden units are relu(±(t − τ_k)/WIDTH) and a code of the labels that may follow prefix k. The encoder gives t,
    a linear map of the prediction network's output gives τ_k and the code; it is solved for by least squares.
    """
    shape, joint = problem.shape, problem.joint
    trie = PrefixTrie.build(*problem.flat)
    tau, share = _targets(problem, trie, times)
    codes = (torch.rand(shape.vocabulary, shape.hidden - 2) < 0.1).float()
    strength = 12.0
    wanted = torch.zeros(trie.num_nodes, shape.hidden)
    wanted[:, 0], wanted[:, 1] = -tau / WIDTH, tau / WIDTH
    child = trie.parent >= 0
    norm = codes.square().sum(-1, keepdim=True)
    follow = (strength + share[child].log())[:, None] * (codes / norm)[trie.token[child]]
    wanted[:, 2:].index_add_(0, trie.parent[child], follow)
    seen = prefix_outputs(problem.decoder, trie).double()
    seen = torch.cat([seen, torch.ones(len(seen), 1)], dim=1)
    solved = torch.linalg.lstsq(seen, wanted.double(), driver="gelsd", rcond=1e-3).solution.float()
    joint.pred.weight.copy_(solved[:-1].T)
    joint.pred.bias.copy_(solved[-1])
    joint.enc.weight.zero_()
    joint.enc.bias.zero_()
    joint.enc.weight[0, 0], joint.enc.weight[1, 0] = shape.frames / WIDTH, -shape.frames / WIDTH
    last = joint.joint_net[-1]
    last.weight.zero_()
    last.bias.zero_()
    last.weight[: shape.vocabulary, 2:] = codes
    last.weight[shape.vocabulary, 1] = 1.0  # blank gains before τ_k …
    last.weight[: shape.vocabulary, 0] = 1.0  # … and labels behind it
    last.bias[shape.vocabulary] = strength


def _targets(problem: Problem, trie: PrefixTrie, times: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """[K] frame around which a child of node k is emitted, T without one; [K] share of a node among its siblings."""
    tau = torch.full((trie.num_nodes,), float(problem.shape.frames))
    share = torch.full((trie.num_nodes,), 0.1)
    flat = [t for row in times for t in row]
    for h in reversed(range(trie.num_hyps)):  # better members come later and win
        node = int(trie.leaf[h])
        for at in reversed(flat[h].tolist()):
            node = int(trie.parent[node])
            tau[node] = at
    for h in range(0, trie.num_hyps, NUM_HYPS):
        node = int(trie.leaf[h])
        while node >= 0:
            share[node] = 0.9
            node = int(trie.parent[node])
    return tau, share
