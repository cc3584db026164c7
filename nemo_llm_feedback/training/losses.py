"""The loss of a step as a sum of means that are joined over ranks, and the objective's part of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_llm_feedback.core.config import SOURCE_NAMES, ObjectiveConfig
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.core.types import pad_groups
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.training.distributed import CollectiveBlock
from nemo_llm_feedback.training.group_math import Groups
from nemo_llm_feedback.training.objectives import (
    OBJECTIVES,
    ObjectiveOutput,
    group_mass,
    hyperparameters,
    reference_kl,
    self_training,
    sequence_k3,
)


@dataclass(frozen=True)
class Mean:
    """A mean over some items (groups with signal, rows) of this rank.

    Attributes:
        value: the mean; a term of the loss has a gradient.
        count: number of items.
        weight: factor of a term in the loss.
    """

    value: Tensor | float
    count: float
    weight: float = 1.0


class LossSum(CollectiveBlock):
    """The terms of a step's loss and its metrics, each a mean over other items; joined over ranks in one exchange.

    Lightning's DDP averages the gradients of the ranks. A term that is a mean over c_r items on rank r would then
    count an item of a rank with few of them for more. So each of the R ranks multiplies its mean by R·c_r / Σ c: the
    average of the ranks is then the mean over all items, which is what one process with the whole batch computes.

    Used as a context it exchanges counts and metrics at its end, and an error of one rank is raised on all.

    Attributes:
        terms: name → term of the loss.
        metrics: name → value to log; a name that ends in ``groups`` is a number, which is added over ranks.
        feedback_rows: unlabeled rows of this rank that are learned from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, Mean] = {}
        self.metrics: dict[str, Mean] = {}
        self.feedback_rows = 0

    def add(self, name: str, value: Tensor, *, count: float, weight: float = 1.0) -> None:
        """Adds a term of the loss, the mean over ``count`` items."""
        self.terms[name] = Mean(value, count, weight)

    def log(self, metrics: Mapping[str, Tensor | float], *, count: float) -> None:
        """Adds metrics that are means over ``count`` items; NaN = nothing to report on this rank."""
        self.metrics |= {name: Mean(value, count) for name, value in metrics.items()}

    def join(self, other: LossSum, *, weight: float = 1.0, head: str = "", prefix: str = "") -> None:
        """Takes in the terms, times ``weight`` and named ``head/term``, and the metrics, named with ``prefix``."""
        for name, term in other.terms.items():
            self.terms[f"{head}/{name}" if head else name] = replace(term, weight=weight * term.weight)
        self.metrics |= {prefix + name: metric for name, metric in other.metrics.items()}

    def __exit__(self, *error: object) -> None:
        self.mine = (
            {name: term.count for name, term in self.terms.items()},
            {name: (float(metric.value), metric.count) for name, metric in self.metrics.items()},
            self.feedback_rows,
        )
        super().__exit__(*error)  # type: ignore[arg-type]

    def total(self) -> Tensor | None:
        """The weighted sum of the terms, each scaled by R·c_r / Σ c; None without any."""
        parts = [term.weight * self._share(name) * term.value for name, term in self.terms.items()]
        if not parts:
            return None
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]  # type: ignore[arg-type, return-value]

    def _share(self, name: str) -> float:
        if not self.all:
            return 1.0
        total = sum(counts.get(name, 0.0) for counts, _, _ in self.all)
        return len(self.all) * self.terms[name].count / total if total else 0.0

    def joined_metrics(self) -> dict[str, float]:
        """Metrics over all ranks: means weighted by their counts, numbers added; NaN is left out."""
        if len(self.all) == 1:
            return {name: value for name, (value, _) in self.all[0][1].items()}
        out = {}
        for name in dict.fromkeys(name for _, metrics, _ in self.all for name in metrics):
            pairs = [metrics[name] for _, metrics, _ in self.all if name in metrics]
            pairs = [(value, count) for value, count in pairs if not math.isnan(value)]
            total = sum(count for _, count in pairs)
            if name.endswith("groups"):
                out[name] = sum(value for value, _ in pairs)
            else:
                out[name] = sum(value * count for value, count in pairs) / total if total else math.nan
        return out


def objective_loss(config: ObjectiveConfig, logp: Tensor, nbest: NBestBatch, *, head: str) -> LossSum:
    """The run's objective and its regularisers for one head.

    Args:
        config: the objective with its hyperparameters, and the weights of the regularisers.
        logp: [B, N] policy log p of each member, natural log, with gradient; padding holds −inf.
        nbest: the B groups.
        head: the head whose rewards and reference scores are used.

    Returns:
        The term ``objective`` and the regularisers, with their metrics.
    """
    tensors = (nbest.rewards[head], nbest.ref_logp[head], nbest.mask, nbest.old_logp[head])
    lengths = pad_groups([[float(len(y)) for y in row] for row in nbest.labels], fill=0.0)
    groups = Groups(logp, *(values.to(logp.device) for values in (*tensors, lengths)))
    chosen = {name: getattr(config, name) for name in hyperparameters(config.name)}
    taught = groups
    if config.source:
        theirs = nbest.supplied_by(config.source).to(logp.device)
        taught, chosen["label"] = groups._replace(mask=groups.mask & theirs), "reference"
    output = OBJECTIVES[config.name](taught, **chosen)
    count = float(output.metrics["groups"])
    loss = LossSum()
    loss.add("objective", output.loss, count=count)
    loss.log(output.metrics, count=count)
    loss.log({name: output.metrics[name] for name in ("groups", "signal_fraction")}, count=len(nbest))
    pseudo_label = functools.partial(self_training, label="reward", min_confidence=0.0)
    regularisers: dict[str, tuple[float, Callable[[Groups], ObjectiveOutput]]] = {
        "pseudo_label": (config.pseudo_label_weight, pseudo_label),
        "mass": (config.mass_weight, group_mass),
        "reference_kl": (config.reference_kl_weight, reference_kl),
    }
    # What nothing judges is neither learned from nor held. Plain self-training has no judge.
    judged = (groups.rewards.isfinite() | ~groups.feasible).all(dim=1, keepdim=True)
    plain = config.name == "self_training" and config.label != "reward"
    held = groups if plain else groups._replace(mask=groups.mask & judged)
    for name, (weight, regulariser) in regularisers.items():
        if weight > 0:
            term = regulariser(held)
            loss.add(name, term.loss, count=float(term.metrics["groups"]), weight=weight)
            loss.log({f"{name}_loss": term.loss.detach()}, count=len(nbest))
    loss.log({"k3_reference": sequence_k3(groups._replace(logp=logp.detach())).loss}, count=len(nbest))
    return loss


def nbest_metrics(nbest: NBestBatch, logp: Tensor, *, head: str) -> dict[str, float]:
    """What is logged of a batch of groups beside the objective's metrics.

    Args:
        nbest: the B groups.
        logp: [B, N] policy log p, without gradient.
        head: the head whose scores are read.

    Returns:
        ``reward/<part>`` means over members; ``members`` = mean distinct members; ``unique_fraction`` of members;
        ``empty_fraction`` = groups whose most probable member is empty; ``length_ratio`` = expected length under the
        policy ÷ under the reference; ``reward_length_correlation`` within groups; ``reward_gap`` = best reward −
        reward of the policy's favourite, nats; ``reward_gain`` = expected reward under the policy − under the
        reference; ``best_from_<source>`` = share of groups whose best member it gave (several sources
        may have given one).
    """
    sizes, texts = nbest.sizes, nbest.texts
    policy = torch.softmax(logp.detach().float().cpu().nan_to_num(nan=-1e4, neginf=-1e4), dim=1)
    reference = torch.softmax(nbest.ref_logp[head].nan_to_num(neginf=-1e4), dim=1)
    lengths = pad_groups([[float(text_length(t)) for t in row] for row in texts], fill=0.0)
    favourite = policy.argmax(dim=1).tolist()
    out = {
        "members": sum(sizes) / len(sizes),
        "unique_fraction": sum(len(set(row)) for row in texts) / sum(sizes),
        "empty_fraction": sum(not row[n] for row, n in zip(texts, favourite, strict=True)) / len(texts),
        "length_ratio": float((policy * lengths).sum() / (reference * lengths).sum().clamp(min=1e-6)),
    }
    for name, values in nbest.parts.items():
        out[f"reward/{name}"] = float(values[values.isfinite()].mean())
    rewards = nbest.rewards[head]
    judged = [b for b, size in enumerate(sizes) if rewards[b, :size].isfinite().all()]
    if judged:
        best = {b: int(rewards[b, : sizes[b]].argmax()) for b in judged}
        gained = ((policy - reference) * rewards.nan_to_num()).sum(dim=1)
        out["reward_gain"] = float(gained[judged].mean())
        out["reward_gap"] = sum(float(rewards[b, best[b]] - rewards[b, favourite[b]]) for b in judged) / len(judged)
        out["reward_length_correlation"] = _within_group_correlation(
            [rewards[b, : sizes[b]] for b in judged], [lengths[b, : sizes[b]] for b in judged]
        )
        given = (name for row in nbest.sources for names in row for name in names)
        for source in dict.fromkeys(("greedy", *SOURCE_NAMES, *given)):
            share = sum(source in nbest.sources[b][n] for b, n in best.items()) / len(judged)
            out[f"best_from_{source}"] = share
    return out


def _within_group_correlation(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """Pearson correlation of the group-centred values, pooled; 0 where one of them does not vary."""
    x = torch.cat([v - v.mean() for v in xs])
    y = torch.cat([v - v.mean() for v in ys])
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale > 1e-12 else 0.0
