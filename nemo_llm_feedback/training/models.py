"""The six NeMo classes with feedback, and ``restore``, which picks one by the checkpoint's exact target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.collections.asr.models import (
    ASRModel,
    EncDecCTCModel,
    EncDecCTCModelBPE,
    EncDecHybridRNNTCTCBPEModel,
    EncDecHybridRNNTCTCModel,
    EncDecRNNTBPEModel,
    EncDecRNNTModel,
)
from omegaconf import open_dict

from nemo_llm_feedback.asr.checkpoints import keep_artifacts, restored
from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.core.errors import CheckpointError
from nemo_llm_feedback.training.mixin import LLMFeedbackMixin


class FeedbackCTCModel(LLMFeedbackMixin, EncDecCTCModel):
    """Character CTC with feedback."""


class FeedbackCTCModelBPE(LLMFeedbackMixin, EncDecCTCModelBPE):
    """BPE CTC with feedback."""


class FeedbackRNNTModel(LLMFeedbackMixin, EncDecRNNTModel):
    """Character RNN-T or TDT with feedback."""


class FeedbackRNNTBPEModel(LLMFeedbackMixin, EncDecRNNTBPEModel):
    """BPE RNN-T or TDT with feedback."""


class FeedbackHybridRNNTCTCModel(LLMFeedbackMixin, EncDecHybridRNNTCTCModel):
    """Character hybrid with feedback."""


class FeedbackHybridRNNTCTCBPEModel(LLMFeedbackMixin, EncDecHybridRNNTCTCBPEModel):
    """BPE hybrid with feedback."""


_CLASSES = (
    FeedbackCTCModel,
    FeedbackCTCModelBPE,
    FeedbackRNNTModel,
    FeedbackRNNTBPEModel,
    FeedbackHybridRNNTCTCModel,
    FeedbackHybridRNNTCTCBPEModel,
)
CLASSES: dict[str, Any] = {cls.stock().__name__: cls for cls in _CLASSES}


def locate(path_or_name: str | Path) -> Path:
    """The ``.nemo`` of a path, or of a pretrained NeMo name (downloaded by NeMo).

    Raises:
        CheckpointError: neither a file nor a name that NeMo can fetch.
    """
    path = Path(path_or_name).expanduser()
    if path.exists() or path.suffix == ".nemo" or len(path.parts) > 2:
        return path
    try:
        return Path(ASRModel.from_pretrained(str(path_or_name), return_model_file=True))
    except Exception as error:  # NeMo raises many kinds here: unknown name, no network, hub errors
        raise CheckpointError(
            f"{path_or_name} is neither a file nor a pretrained name that could be fetched "
            f"({type(error).__name__}: {error})."
        ) from error


def restore(path_or_pretrained_name: str | Path, *, map_location: Any = None, trainer: Any = None) -> Any:
    """Restores a checkpoint as the feedback class of its exact stock class.

    Args:
        path_or_pretrained_name: a ``.nemo`` file, or a name such as ``nvidia/stt_en_fastconformer_transducer_large``.
        map_location: device to restore to; NeMo's default if None.
        trainer: a ``lightning.pytorch.Trainer``, or None.

    Returns:
        The model, with the context settings of its encoder as the checkpoint has them.

    Raises:
        CheckpointError: not a ``.nemo``, or a class that cannot be adapted; the message has the reason.
    """
    path = locate(path_or_pretrained_name)
    model = restored(path, classes=CLASSES, map_location=map_location, trainer=trainer)
    if getattr(model, "tokenizer", None) is None and not model.cfg.get("labels"):
        with open_dict(model.cfg):  # NeMo's loaders look for them here; old checkpoints have them in train_ds only
            model.cfg.labels = list(heads_of(model)[0].vocabulary.labels)
    model._artifact_folder = keep_artifacts(model, path)
    model._source_path = str(path.absolute())
    return model
