"""Restores ``.nemo`` files safely, and saves models so that stock NeMo restores them."""

from __future__ import annotations

import copy
import glob
import logging
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from nemo_llm_feedback.asr.nemo_file import WEIGHTS, read_config, read_files
from nemo_llm_feedback.core.errors import CheckpointError, list_faults

SUPPORTED = (
    "EncDecCTCModel",
    "EncDecCTCModelBPE",
    "EncDecRNNTModel",
    "EncDecRNNTBPEModel",
    "EncDecHybridRNNTCTCModel",
    "EncDecHybridRNNTCTCBPEModel",
)
_TEMPORARY = ".{stem}.{process}.tmp{suffix}"
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
    if OmegaConf.select(config, "tokenizer.type") == "agg":
        raise CheckpointError(
            f"{origin} has an aggregate tokenizer, with one language per tokenizer, which cannot be adapted: labels "
            "are those of a language, which rows do not name. Use the checkpoint of one language "
            "(stt_de_fastconformer_hybrid_large_pc …), or one with a joint tokenizer (parakeet-tdt-0.6b-v3)."
        )
    if str(OmegaConf.select(config, "joint._target_")).endswith("HATJoint"):
        raise CheckpointError(
            f"{origin} has a HAT joint, whose blank is factored out; use a checkpoint with RNNTJoint."
        )
    return name


def restored(
    path: str | Path, *, classes: Mapping[str, Any] | None = None, map_location: Any = None, trainer: Any = None
) -> Any:
    """Restores a ``.nemo``; nothing in it is executed, and no file outside it nor the environment is read for it.

    Args:
        path: the file.
        classes: name of a supported class → class to restore it as; NeMo's if None.
        map_location: device to restore to; NeMo's default if None.
        trainer: a ``lightning.pytorch.Trainer``, or None.

    Raises:
        CheckpointError: not a ``.nemo``, damaged, a class that is not supported, or weights that are not finite.
    """
    from nemo.collections.asr import models
    from nemo.core import ModelPT

    config = read_config(path)
    name = supported_class(config, origin=path)
    cls = classes[name] if classes else getattr(models, name)
    given = {"override_config_path": config, "map_location": map_location, "trainer": trainer}
    logger = logging.getLogger("nemo_logger")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # NeMo logs the traceback of whatever it cannot build; the error names it
    try:
        with _no_larger_than(path):
            model = cls.restore_from(str(Path(path).expanduser()), save_restore_connector=_connector(), **given)
    except Exception as error:
        # NeMo leaves its process-wide flag set, and every later model would skip its data set-up.
        ModelPT._set_model_restore_state(is_being_restored=False)
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path} cannot be restored ({type(error).__name__}: {reason}). It is damaged, or was made by another "
            "version of NeMo: get it again, or save it again by this version."
        ) from error
    finally:
        logger.setLevel(before)
    refuse_nonfinite(model.state_dict(), origin=path)
    return model


def refuse_nonfinite(weights: Mapping[str, Tensor], *, origin: str | Path) -> None:
    """Raises a CheckpointError that names the weights with a NaN or an infinite value."""
    bad = [key for key, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise CheckpointError(list_faults(f"{origin} has NaN or infinite weights; use another checkpoint:", bad))


@contextmanager
def _no_larger_than(path: str | Path) -> Iterator[None]:
    """Inside, a model that has more parameters than the weights of a file have bytes is refused as it is built."""
    files, _ = read_files(path, {})
    if WEIGHTS not in files:
        raise CheckpointError(f"{path} is not a .nemo checkpoint: it has no {WEIGHTS}.")
    left = files[WEIGHTS] + 2**20

    def count(module: Any, name: str, parameter: Tensor | None) -> None:
        """Counts a parameter that a module has been given."""
        nonlocal left
        left -= 0 if parameter is None else parameter.numel()
        if left < 0:
            raise CheckpointError(
                f"{path}: its configuration describes a larger model than the one whose weights it has."
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _connector() -> Any:
    """NeMo's reader of ``.nemo`` files, which here reads tensors only, whatever the environment says."""
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    class TensorsOnly(SaveRestoreConnector):
        """Refuses pickled objects and compressed weights, which can grow without end."""

        @staticmethod
        def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> Any:
            if zipfile.is_zipfile(model_weights):
                with zipfile.ZipFile(model_weights) as parts:
                    unpacked = sum(part.file_size for part in parts.infolist())
                if unpacked > os.path.getsize(model_weights):
                    raise ValueError(f"{WEIGHTS} is compressed, as PyTorch writes none")
            return torch.load(model_weights, map_location=map_location, weights_only=True)

    return TensorsOnly()


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
    items = [
        (os.path.basename(i.path).removeprefix("nemo:"), i) for i in (getattr(model, "artifacts", None) or {}).values()
    ]
    _, content = read_files(path, {name: sys.maxsize for name, _ in items})
    for name, item in items:
        # NeMo prefixes a fresh hash to every saved copy; unless the old one is removed, names grow.
        plain = name.split("_", 1)[1] if len(name) > 33 and name[32] == "_" else name
        target = Path(folder.name) / name / plain
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content[name])
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
    temporary = final.with_name(_TEMPORARY.format(stem=final.stem, process=os.getpid(), suffix=final.suffix))
    try:
        yield str(temporary)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files that a kill inside :func:`atomic_path` has left beside ``path``."""
    final = Path(path).expanduser().absolute()
    pattern = _TEMPORARY.format(stem=glob.escape(final.stem), process="*", suffix=final.suffix)
    for left in final.parent.glob(pattern):
        try:
            process = int(left.name.removesuffix(final.suffix).split(".")[-2])
            os.kill(process, 0)  # only asks whether it lives
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            continue
