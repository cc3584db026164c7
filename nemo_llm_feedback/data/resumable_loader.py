"""A training loader that continues a killed run at the batch where it stopped.

Lightning 2.4 counts the batches of an unfinished epoch but starts the loader at its first batch again, and a shuffle
drawn from the process's random state differs after a restart anyway. Here the order of an epoch depends on the seed
and the epoch's number only, and the position in it is what Lightning's checkpoint counts (``training/resume.py``).
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

_KEPT = (
    "dataset", "batch_size", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
    "multiprocessing_context", "persistent_workers",
)  # fmt: skip

# Lightning may take a batch before it trains on the last one.
_KNOWN = 3


class ResumableLoader:
    """NeMo's loader, able to start in the middle of an epoch; all other attributes are those of NeMo's loader.

    Lightning does not change a loader that is not a ``DataLoader``, so the split over the ranks is made here, too.

    Args:
        loader: NeMo's training loader.
        seed: seed of the order, the same on all ranks.
        rank, num_ranks: rank of this process and number of ranks; NeMo splits Lhotse's and tarred data itself.
        shuffle: whether the classic loader shuffles.

    Attributes:
        looks_ahead: whether the next pass gives a batch only once the one behind it has been read (:meth:`following`).
    """

    def __init__(self, loader: DataLoader, *, seed: int, rank: int, num_ranks: int, shuffle: bool) -> None:
        self._place: _Place | None = None  # a stream has no sampler
        streamed = isinstance(loader.dataset, IterableDataset)
        if not streamed and loader.batch_size is None:
            self._place = _Place(loader.sampler, 1)  # Lhotse: the sampler yields whole batches, without their audio
        elif not streamed:
            order: DistributedSampler[Any] = DistributedSampler(
                loader.dataset, num_replicas=num_ranks, rank=rank, shuffle=shuffle, seed=seed, drop_last=False
            )
            self._place = _Place(order, loader.batch_size or 1)
        self._loader = loader if self._place is None else _rebuilt(loader, self._place)
        # Workers' seeds would otherwise be drawn from the random state that dropout uses, also in a resumed epoch.
        self._loader.generator = torch.Generator().manual_seed(seed)
        self._epoch = 0
        self._resume = (0, 0)
        self.looks_ahead = False
        self._behind: deque[tuple[int, Any]] = deque(maxlen=_KNOWN)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def sampler(self) -> ResumableLoader:
        """The loader itself: Lightning calls ``set_epoch`` on the attribute of this name."""
        return self

    @property
    def batch_sampler(self) -> None:
        """None, so that Lightning looks at ``sampler``."""
        return None

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which with the seed gives the order of the next pass."""
        self._epoch = epoch

    def start_at(self, *, epoch: int, batches: int) -> None:
        """Makes the pass over an epoch skip its first batches, which a checkpoint has already seen.

        The epoch is set as well, since a resumed run's first pass may begin before Lightning sets it.

        Args:
            epoch: number of the epoch that was interrupted.
            batches: batches of it that were done.
        """
        self._epoch, self._resume = epoch, (epoch, batches)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning makes the iterator before it sets the epoch, and nothing runs before the first batch.
        (epoch, done), self._resume = self._resume, (0, 0)
        skip = done if epoch == self._epoch else 0
        if not skip:
            # torch's loader draws its workers' seed here; this draw keeps dropout equal to that of a stock run.
            torch.empty((), dtype=torch.int64).random_()
        if self._place is not None:
            self._place.set(epoch=self._epoch, batches=skip)
        batches: Iterator[Any] = itertools.islice(self._loader, skip if self._place is None else 0, None)
        self._behind.clear()
        if not self.looks_ahead:
            yield from batches
            return
        for number, (batch, behind) in enumerate(itertools.pairwise(itertools.chain(batches, [None])), skip):
            self._behind.append((number, behind))
            yield batch

    def following(self, number: int) -> Any:
        """The batch behind one of the last that were given; None at the end of the pass, or if it looks not ahead.

        Args:
            number: of the batch in its epoch, those of a resumed one included.
        """
        return next((behind for known, behind in self._behind if known == number), None)


class _Place(Sampler[Any]):
    """A sampler that can skip its first batches, which are then never loaded."""

    def __init__(self, order: Any, items: int) -> None:
        self._order, self._items = order, items
        self._skip = 0

    def set(self, *, epoch: int, batches: int) -> None:
        """Sets epoch and number of skipped batches of the next pass."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)
        self._skip = batches * self._items

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._order), self._skip, None)

    def __len__(self) -> int:
        return len(self._order)


def _rebuilt(loader: DataLoader, sampler: Sampler[Any]) -> DataLoader:
    """A copy of the loader with another sampler, since torch does not allow to set it."""
    kept = {name: getattr(loader, name) for name in _KEPT}
    if loader.batch_size is not None:  # else torch refuses this flag, also when it is False
        kept["drop_last"] = loader.drop_last
    if loader.num_workers:
        kept["prefetch_factor"] = loader.prefetch_factor
    return DataLoader(sampler=sampler, **kept)


def run_seed() -> int:
    """The run's seed, the same on all ranks, from the environment, where Lightning's ``seed_everything`` puts it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def resumable(loader: Any, *, rank: int, num_ranks: int, shuffle: bool) -> Any:
    """NeMo's training loader as a :class:`ResumableLoader`; other iterables are returned as they are."""
    if not isinstance(loader, DataLoader):
        return loader
    return ResumableLoader(loader, seed=run_seed(), rank=rank, num_ranks=num_ranks, shuffle=shuffle)
