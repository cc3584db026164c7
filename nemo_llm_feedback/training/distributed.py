"""What the ranks of a distributed run do together: fail, count, average and decide.

Lightning's DDP averages the gradients of the ranks. A loss that is a mean over *items* (groups with signal, labelled
rows), of which every rank has another number c_r, would then count an item of a rank with few of them for more. So
each of the R ranks multiplies its mean by R·c_r / Σ c: the average of the ranks is then the mean over all items, which
is what one process with the whole batch computes. The counts travel in one exchange a step, and with them the message
of a rank that has failed, so that no rank is left waiting in a collective.

Nothing here does anything in a run of one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from nemo_llm_feedback.core import errors
from nemo_llm_feedback.core.errors import FeedbackError, TrainingError


def num_ranks() -> int:
    """Processes of this run that train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return int(torch.distributed.get_world_size()) if ready else 1


def gather(value: Any) -> list[Any]:
    """The value of every rank, in their order; every rank must call this."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(found, value)
    return found


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank; every rank must call this. For whatever all ranks must decide alike."""
    if num_ranks() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


class Together:
    """Runs a block on every rank; if it fails on one, every rank raises.

    The block must hold no collective of its own. The rank that failed raises its own error; the others raise the same
    class (``TrainingError`` for one that is not ours), naming the rank.

    Attributes:
        mine: what this rank hands to the others; set it inside the block.
        all: after the block, ``mine`` of every rank in their order.
    """

    def __init__(self) -> None:
        self.mine: Any = None
        self.all: list[Any] = []

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt ends this process at once; the launcher ends the others
        failure = (type(error).__name__, str(error)) if error is not None else None
        found = gather((failure, self.mine))
        if error is None:
            for rank, (other, _) in enumerate(found):
                if other is not None:
                    raise _error_of(rank, *other)
        self.all = [mine for _, mine in found]


def _error_of(rank: int, name: str, message: str) -> FeedbackError:
    cls = getattr(errors, name, None)
    if isinstance(cls, type) and issubclass(cls, FeedbackError):
        return cls(f"on rank {rank}: {message}")
    return TrainingError(f"rank {rank} failed with {name}: {message}")


@dataclass(frozen=True)
class Report:
    """What a rank tells the others about its step.

    Attributes:
        counts: term of the loss → number of items of which the term is the mean on this rank.
        metrics: name → value; NaN where this rank has nothing to say.
        metric_counts: name → number of items of which the metric is the mean; ``rows`` where a name is absent.
        rows: unlabeled rows of this rank.
    """

    counts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    metric_counts: Mapping[str, float] = field(default_factory=dict)
    rows: int = 0


def shares(mine: Report, reports: Sequence[Report]) -> dict[str, float]:
    """Term → the factor R·c_r / Σ c that makes the average of the ranks the mean over all items; 0 without any.

    It is exactly 1 in a run of one process and where all ranks have as many.
    """
    out = {}
    for name, count in mine.counts.items():
        total = sum(report.counts.get(name, 0.0) for report in reports)
        out[name] = len(reports) * count / total if total else 0.0
    return out


def join_metrics(reports: Sequence[Report]) -> dict[str, float]:
    """Metrics of all ranks: means weighted by their counts, names that end in ``groups`` summed; NaN is left out."""
    if len(reports) == 1:
        return dict(reports[0].metrics)
    out: dict[str, float] = {}
    for name in dict.fromkeys(n for report in reports for n in report.metrics):
        pairs = [(r.metrics[name], r.metric_counts.get(name, r.rows)) for r in reports if name in r.metrics]
        pairs = [(value, count) for value, count in pairs if not math.isnan(value)]
        if name.endswith("groups"):
            out[name] = sum(value for value, _ in pairs)
        else:
            total = sum(count for _, count in pairs)
            out[name] = sum(value * count for value, count in pairs) / total if total else math.nan
    return out


def touch_all(module: nn.Module) -> Tensor:
    """A zero that gives every trainable parameter a gradient of zeros.

    DDP waits for a gradient of every parameter on every rank. A hybrid's idle head, a rank whose groups have no signal
    or a joint that a pass did not reach would leave it waiting. With this term in the loss each parameter reports once
    a step on every rank, and DDP's buckets need not search the graph (``find_unused_parameters``), which could not see
    what other ranks use. The empty slices keep values, and so a NaN or an infinity, out of the sum.
    """
    zeros = [p.flatten()[:0].sum() for p in module.parameters() if p.requires_grad]
    return torch.stack([zero.float() for zero in zeros]).sum() if zeros else torch.zeros(())


def local_lengths(model: nn.Module) -> None:
    """Keeps NeMo's encoders from talking to other ranks.

    They agree on the longest audio of all ranks in every forward pass, to reserve positions or masks for it. Here the
    ranks run encoders a different number of times (for labelled rows, for unlabeled rows, under the frozen reference,
    for looks at held-out rows on one rank), and would wait for one another for ever. The output is the same without.
    """
    for module in model.modules():
        if hasattr(module, "sync_max_audio_length"):
            vars(module)["sync_max_audio_length"] = False
        elif hasattr(module, "update_max_sequence_length"):  # the convolutional encoder has no switch
            vars(module)["update_max_sequence_length"] = MethodType(_own_length, module)


def _own_length(module: Any, *args: Any, **kwargs: Any) -> None:
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        type(module).update_max_sequence_length(module, *args, **kwargs)


@contextmanager
def local_metrics(model: nn.Module) -> Iterator[None]:
    """Inside this context NeMo's metrics are the rank's own.

    Its training step computes the WER of the batch, for which torchmetrics asks all ranks; a rank whose batch has no
    labelled row would not answer.
    """
    found = [module for module in model.modules() if isinstance(module, Metric)] if num_ranks() > 1 else []
    before = [metric._to_sync for metric in found]
    for metric in found:
        metric._to_sync = False
    try:
        yield
    finally:
        for metric, sync in zip(found, before, strict=True):
            metric._to_sync = sync
