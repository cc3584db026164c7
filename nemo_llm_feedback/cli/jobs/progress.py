"""The progress bar of all jobs; on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(label: str, total: int, *, unit: str = "utt") -> Iterator[Callable[[int], None]]:
    """Shows a bar while inside.

    Args:
        label: name of the work.
        total: number of units.
        unit: name of a unit.

    Yields:
        A function that takes how many are done so far.
    """
    with tqdm(total=total, unit=unit, desc=label, disable=None) as bar:
        yield lambda done: bar.update(done - bar.n)
