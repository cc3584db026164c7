"""Reads the configuration and class of a ``.nemo`` file, and saves models so that stock NeMo restores them."""

from __future__ import annotations

import copy
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_llm_feedback.core.errors import CheckpointError

SUPPORTED = (
    "EncDecCTCModel",
    "EncDecCTCModelBPE",
    "EncDecRNNTModel",
    "EncDecRNNTBPEModel",
    "EncDecHybridRNNTCTCModel",
    "EncDecHybridRNNTCTCBPEModel",
)
_NEMO = "nemo.collections.asr.models."
_REFUSED = {
    "MultiTask": "an attention encoder-decoder (Canary) has no frame-synchronous lattice, on which "
    "this plugin computes log p",
    "Prompt": "a prompt-conditioned model needs a prompt per row, which unlabeled manifests do not have",
    "EOU": "an end-of-utterance model emits markers that no text reward can judge",
    "MultiTalker": "a multitalker model needs speaker kernels per row",
    "MT": "a multitalker model needs speaker kernels per row",
    "Transf": "an attention decoder has no frame-synchronous lattice",
    "SLU": "a spoken-language-understanding model emits no transcript",
}


def read_config(path: str | Path) -> DictConfig:
    """The model configuration inside a ``.nemo``, without touching its weights.

    Raises:
        CheckpointError: the file is missing, or not a ``.nemo``.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a .nemo checkpoint or a pretrained NeMo name.")
    try:
        with tarfile.open(file, "r:*") as archive:
            names = {os.path.normpath(name): name for name in archive.getnames()}
            member = archive.extractfile(names["model_config.yaml"])
            assert member is not None
            return DictConfig(OmegaConf.create(member.read().decode("utf-8")))
    except (tarfile.TarError, KeyError, UnicodeDecodeError, EOFError) as error:
        raise CheckpointError(
            f"{path} is not a .nemo checkpoint ({type(error).__name__}: {error}); a Lightning .ckpt becomes one by "
            "`nemo-llm-feedback export CKPT --base BASE.nemo`."
        ) from None


def supported_class(config: DictConfig, *, origin: str | Path) -> str:
    """The stock class that a checkpoint's ``target`` names, without its module.

    Args:
        config: the checkpoint's model configuration.
        origin: where it comes from, for messages.

    Raises:
        CheckpointError: the class, its loss or its joint is not supported; the message gives the reason.
    """
    target = str(config.get("target", ""))
    name = target.rsplit(".", 1)[-1]
    if not target.startswith(_NEMO) or name not in SUPPORTED:
        why = next((reason for key, reason in _REFUSED.items() if key in name), "its likelihood is not known here")
        raise CheckpointError(
            f"{origin} holds {target or 'no target class'}, which cannot be adapted: {why}. "
            f"Supported are exactly {', '.join(SUPPORTED)}."
        )
    loss = str(OmegaConf.select(config, "loss.loss_name"))
    if "multiblank" in loss or OmegaConf.select(config, "decoding.big_blank_durations"):
        raise CheckpointError(
            f"{origin} is a multi-blank transducer, which cannot be adapted: big blanks need another lattice. "
            "Use an RNN-T, TDT or CTC checkpoint."
        )
    if str(OmegaConf.select(config, "joint._target_")).endswith("HATJoint"):
        raise CheckpointError(
            f"{origin} has a HAT joint, whose blank is factored out; use a checkpoint with RNNTJoint."
        )
    return name


def keep_artifacts(model: Any, path: str | Path) -> tempfile.TemporaryDirectory[str]:
    """Copies a restored model's artifacts (tokenizer, vocabulary …) out of its ``.nemo`` and registers the copies.

    NeMo reads them from the source again at every save, so that a model whose source was moved or overwritten could no
    longer be saved.

    Args:
        model: the restored model; its registered artifacts are changed.
        path: the ``.nemo`` file that it was restored from.

    Returns:
        The folder of the copies, which must live as long as the model.
    """
    from nemo.utils.model_utils import ArtifactPathType

    folder = tempfile.TemporaryDirectory(prefix="nemo_llm_feedback_artifacts_")
    with tarfile.open(Path(path).expanduser(), "r:*") as archive:
        members = {os.path.basename(m.name): m for m in archive.getmembers() if m.isfile()}
        for item in (getattr(model, "artifacts", None) or {}).values():
            if item.path_type is not ArtifactPathType.TAR_PATH:
                continue
            name = os.path.basename(item.path).removeprefix("nemo:")
            source = archive.extractfile(members[name])
            assert source is not None
            # NeMo prefixes a fresh hash to every saved copy; unless the old one is removed, names grow.
            plain = name.split("_", 1)[1] if len(name) > 33 and name[32] == "_" else name
            target = Path(folder.name) / name / plain
            target.parent.mkdir()
            target.write_bytes(source.read())
            item.path, item.path_type = str(target), ArtifactPathType.LOCAL_PATH
    return folder


@contextmanager
def stock_config(model: Any, *, target: str, facts: dict[str, Any] | None) -> Iterator[None]:
    """While saving, the model's config names the stock class and holds nothing of the plugin but a record of the run.

    Args:
        model: a NeMo model.
        target: dotted path of the stock class.
        facts: stored under the key ``adaptation``, which NeMo ignores; None = nothing.
    """
    original = model._cfg
    clean = copy.deepcopy(original)
    with open_dict(clean):
        clean.target = target
        for key in ("feedback", "objective", "proposals", "reward", "llm", "context"):
            clean.pop(key, None)
        if facts:
            clean.adaptation = OmegaConf.create(facts)
    model._cfg = clean
    try:
        yield
    finally:
        model._cfg = original


@contextmanager
def atomic_path(path: str | Path) -> Iterator[str]:
    """Yields a temporary name beside ``path`` and moves it there on success, so a failed save leaves the old file."""
    final = Path(path).expanduser().absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.stem}.{os.getpid()}.tmp{final.suffix}")
    try:
        yield str(temporary)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
