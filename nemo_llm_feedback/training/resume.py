"""Random states and counters of a checkpoint, so that a resumed run takes the same steps as one never stopped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def random_states(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """The random states of this process and of some generators, as tensors and plain data (checkpoints are read as
    such)."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_states(states: dict[str, Any], generators: Sequence[torch.Generator]) -> None:
    """The inverse of :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    for generator, state in zip(generators, states["generators"], strict=True):
        generator.set_state(state.cpu())


def count_finished_batch(checkpoint: dict[str, Any]) -> None:
    """Counts the batch at whose end the checkpoint is written.

    Lightning 2.4 saves before it marks that batch as completed, and a restart falls back to what was completed: each
    resumed run would have one batch more in its epoch than there are, and would end without the last one's marks.

    Args:
        checkpoint: the checkpoint that Lightning is about to write; changed in place.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if not loop:
        return
    progress = loop["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        progress[part]["completed"] = progress[part]["processed"]
    # At the last of max_steps Lightning ends the epoch, wherever it is; a run that is prolonged goes on in its middle,
    # or finds it at its end (an ended one would have it take the next epoch for run through).
    epoch = loop["epoch_progress"]
    if epoch["current"]["processed"] == epoch["current"]["ready"]:
        for part in ("total", "current"):
            for name in ("processed", "completed"):
                epoch[part][name] = epoch[part]["ready"] - 1
    # The loggers' step, which is raised later still.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = int(checkpoint["global_step"])


def place_in_data(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """The epoch that a run resumed from the checkpoint is in, and how many of its batches are done.

    Args:
        checkpoint: a checkpoint as :func:`count_finished_batch` left it.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]["current"]["completed"]
    return int(loop["epoch_progress"]["current"]["processed"]), int(batches)
