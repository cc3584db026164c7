"""Communication between the ranks of a distributed run; a run of one process is left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType, TracebackType
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from nemo_llm_feedback.core import errors
from nemo_llm_feedback.core.errors import FeedbackError, TrainingError

T = TypeVar("T")
Result = TypeVar("Result")


def num_ranks() -> int:
    """Processes of this run that train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return int(torch.distributed.get_world_size()) if ready else 1


def this_rank() -> int:
    """This process's place among them, from 0."""
    return int(torch.distributed.get_rank()) if num_ranks() > 1 else 0


def gather(value: Any) -> list[Any]:
    """The value of every rank, in their order; every rank must call this."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(found, value)
    return found


Block = TypeVar("Block", bound="CollectiveBlock")


class CollectiveBlock:
    """Runs a block on every rank; if it fails on one, every rank raises, so that none waits in a collective for ever.

    The block must not hold another collective. The rank that failed raises its error; the others raise the same
    class (``TrainingError`` for one that is not ours), naming the rank.

    Attributes:
        mine: this rank's message to the others; set it inside the block.
        all: after the block, ``mine`` of every rank in their order.
    """

    def __init__(self) -> None:
        self.mine: Any = None
        self.all: list[Any] = []

    def __enter__(self: Block) -> Block:
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


def shared(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[Result]]) -> list[Result]:
    """The result of each item, in their order. Every rank works on its share, so that none waits for another's work
    on all of them: a collective that is not answered within its time limit ends the run.

    Args:
        items: the same on every rank, each of which must call this.
        work: items → one result each; may be given none, and must not hold a collective.
    """
    with CollectiveBlock() as ranks:
        ranks.mine = list(work(items[this_rank() :: num_ranks()]))
    return [ranks.all[i % len(ranks.all)][i // len(ranks.all)] for i in range(len(items))]


def average_gradients(module: nn.Module) -> None:
    """Makes every gradient the mean of all ranks', as DDP does, for steps that are taken without it.

    Args:
        module: each trainable parameter has a gradient, on every rank (:func:`zero_grad_for_unused`).
    """
    for parameter in module.parameters() if num_ranks() > 1 else ():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= num_ranks()


def _error_of(rank: int, name: str, message: str) -> FeedbackError:
    cls = getattr(errors, name, None)
    if isinstance(cls, type) and issubclass(cls, FeedbackError):
        return cls(f"on rank {rank}: {message}")
    return TrainingError(f"rank {rank} failed with {name}: {message}")


def zero_grad_for_unused(module: nn.Module) -> Tensor:
    """A zero that gives every trainable parameter a gradient of zeros.

    DDP waits for a gradient of every parameter on every rank. A hybrid's idle head, a rank whose groups have no signal
    or a joint that a pass did not reach would leave it waiting. With this term in the loss each parameter reports once
    per step on every rank, and DDP's buckets need not search the graph (``find_unused_parameters``), which could not
    see what other ranks use. The empty slices keep values, and so a NaN or an infinity, out of the sum.
    """
    zeros = [p.flatten()[:0].sum() for p in module.parameters() if p.requires_grad]
    return torch.stack([zero.float() for zero in zeros]).sum() if zeros else torch.zeros(())


def local_lengths(model: nn.Module) -> None:
    """Keeps NeMo's encoders from talking to other ranks.

    They agree on the longest audio of all ranks in every forward pass, to reserve positions or masks for it. Here the
    ranks run encoders a different number of times (for labelled rows, for unlabeled rows, under the frozen reference,
    for shares of the held-out rows), and would wait for one another for ever. The output is the same without.
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
    """Inside this context NeMo's metrics are not joined over ranks.

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
