"""Turns a training checkpoint into a plain ``.nemo``."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_llm_feedback.checkpoints import read_config, supported_class
from nemo_llm_feedback.errors import CheckpointError
from nemo_llm_feedback.models import restore


def export(checkpoint: str | Path, *, base: str | Path | None = None, output: str | Path | None = None) -> Path:
    """Writes the plain ``.nemo`` of a checkpoint.

    Args:
        checkpoint: a Lightning ``.ckpt`` of a run, or a ``.nemo`` (rewritten with the stock class as target).
        base: the ``.nemo`` that the ``.ckpt`` was trained from; gives configuration and tokenizer.
        output: where to write; beside the checkpoint, with the suffix ``.nemo``, if None.

    Returns:
        The path written.

    Raises:
        CheckpointError: unusable files, a missing base, or weights of another model.
    """
    source = Path(checkpoint).expanduser()
    if not source.is_file():
        raise CheckpointError(f"{checkpoint}: no such file.")
    target = Path(output).expanduser() if output else source.with_suffix(".nemo")
    if source.suffix == ".nemo":
        supported_class(read_config(source), origin=source)
        restore(source, map_location="cpu").save_to(str(target))
        return target
    if base is None:
        raise CheckpointError(f"{checkpoint} is no .nemo: add --base BASE.nemo, the checkpoint it was trained from.")
    model = restore(base, map_location="cpu")
    try:
        # Only tensors and plain data are read: a .ckpt from elsewhere cannot run code here.
        weights = torch.load(source, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be read as a Lightning checkpoint ({error}).") from None
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit {base}: {str(error).splitlines()[0]}") from None
    model.save_to(str(target))
    return target
