"""Turns a training checkpoint into a plain ``.nemo``."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from nemo_llm_feedback.checkpoints import read_config, supported_class
from nemo_llm_feedback.errors import CheckpointError
from nemo_llm_feedback.feedback import CHECKPOINT_KEY
from nemo_llm_feedback.lora import inject
from nemo_llm_feedback.models import restore


def export(checkpoint: str | Path, *, base: str | Path | None = None, output: str | Path | None = None) -> Path:
    """Writes the plain ``.nemo`` of a checkpoint.

    Args:
        checkpoint: a Lightning ``.ckpt`` of a run, or a ``.nemo`` (rewritten with the stock class as target).
        base: the ``.nemo`` that the ``.ckpt`` was trained from; gives configuration and tokenizer. A checkpoint of
            this plugin names its own; it is needed where that file has moved.
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
    content = _read_lightning(source)
    base = base or content.get(CHECKPOINT_KEY, {}).get("base")
    if not base:
        raise CheckpointError(f"{checkpoint} does not name its base: add --base BASE.nemo, what it was trained from.")
    model, weights = restore(base, map_location="cpu"), content["state_dict"]
    if any(".lora_" in name for name in weights):
        inject(model, **content[CHECKPOINT_KEY]["lora"])
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit {base}: {str(error).splitlines()[0]}") from None
    model.save_to(str(target))
    return target


def _read_lightning(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, read as tensors and plain data: a file from elsewhere cannot run code here."""
    try:
        with torch.serialization.safe_globals(_plain_config_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise CheckpointError(f"{path} has no state_dict: it is no Lightning checkpoint.")
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read as a Lightning checkpoint ({str(error)[:300]}).") from None
    return content


def _plain_config_types() -> list[Any]:
    """What NeMo's hyper-parameters are stored as: OmegaConf's containers, which hold data only."""
    import typing
    from collections import defaultdict

    from omegaconf import base, nodes

    containers = [DictConfig, ListConfig, base.ContainerMetadata, base.Metadata, defaultdict, dict, list, int]
    scalars = [nodes.AnyNode, nodes.StringNode, nodes.IntegerNode, nodes.FloatNode, nodes.BooleanNode]
    return [*containers, *scalars, typing.Any]
