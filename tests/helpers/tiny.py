"""Tiny NeMo models, audio and manifests, built in code; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import soundfile
import torch
from omegaconf import OmegaConf

SAMPLE_RATE = 16000
CHARACTERS = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]
WORDS = [
    "a",
    "latte",
    "with",
    "soy",
    "milk",
    "please",
    "and",
    "one",
    "large",
    "mocha",
    "to",
    "go",
    "thank",
    "you",
    "very",
    "much",
    "the",
    "small",
    "tea",
    "is",
    "hot",
]
DURATIONS = [0, 1, 2, 3, 4]
LOOK_AHEADS = [[4, 1], [4, 0]]

KINDS = (
    "ctc_char",
    "ctc_bpe",
    "rnnt_char",
    "rnnt_bpe",
    "tdt_char",
    "tdt_bpe",
    "hybrid_char",
    "hybrid_bpe",
    "hybrid_tdt_char",
    "hybrid_tdt_bpe",
)


def make_tokenizer(folder: Path, *, words: Sequence[str] = WORDS, size: int = 48) -> Path:
    """A SentencePiece BPE tokenizer of at most ``size`` pieces in NeMo's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words, 6)) for _ in range(300)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        model_type="bpe",
        bos_id=-1,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(name for name in names if name != "<unk>") + "\n", encoding="utf-8")
    return folder


def model_config(kind: str, tokenizer_dir: Path | None, **overrides: Any) -> Any:
    """The configuration of a tiny model of one kind; ``overrides`` are dotted keys with ``__`` for dots."""
    family, bpe, tdt = kind.split("_")[0], kind.endswith("bpe"), "tdt" in kind
    labels = [] if bpe else CHARACTERS
    dim = 16
    empty_ds = {"manifest_filepath": None, "sample_rate": SAMPLE_RATE, "batch_size": 2, "shuffle": False}
    cfg: dict[str, Any] = {
        "sample_rate": SAMPLE_RATE,
        "log_prediction": False,
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": SAMPLE_RATE,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "features": 16,
            "n_fft": 512,
            "dither": 1e-5,
            "pad_to": 0,
        },
        "spec_augment": {
            "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
            "freq_masks": 1,
            "time_masks": 1,
            "freq_width": 4,
            "time_width": 0.05,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": 16,
            "feat_out": -1,
            "n_layers": 1,
            "d_model": dim,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": 8,
            "ff_expansion_factor": 2,
            "self_attention_model": "rel_pos",
            "n_heads": 2,
            "conv_kernel_size": 5,
            "dropout": 0.1,
            "dropout_pre_encoder": 0.1,
            "dropout_emb": 0.0,
            "dropout_att": 0.1,
            "conv_norm_type": "batch_norm",
            "att_context_size": [-1, -1],
        },
        "train_ds": dict(empty_ds),
        "validation_ds": dict(empty_ds),
        "test_ds": dict(empty_ds),
        "optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
    }
    if bpe:
        cfg["tokenizer"] = {"dir": str(tokenizer_dir), "type": "bpe"}
    else:
        cfg["labels"] = labels
        for section in ("train_ds", "validation_ds", "test_ds"):
            cfg[section]["labels"] = labels
    ctc_decoder = {
        "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
        "feat_in": dim,
        "num_classes": len(labels) if not bpe else -1,
        "vocabulary": labels,
    }
    if family == "ctc":
        cfg["decoder"] = ctc_decoder
    else:
        cfg |= _transducer_sections(labels, dim, tdt)
        if family == "hybrid":
            cfg["aux_ctc"] = {"ctc_loss_weight": 0.3, "use_cer": False, "decoder": ctc_decoder}
            cfg["aux_ctc"]["decoding"] = {"strategy": "greedy_batch"}
    built = OmegaConf.create(cfg)
    for key, value in overrides.items():
        OmegaConf.update(built, key.replace("__", "."), value)
    return built


def _transducer_sections(labels: Sequence[str], dim: int, tdt: bool) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "model_defaults": {"enc_hidden": dim, "pred_hidden": 12, "joint_hidden": 12},
        "decoder": {
            "_target_": "nemo.collections.asr.modules.RNNTDecoder",
            "normalization_mode": None,
            "random_state_sampling": False,
            "blank_as_pad": True,
            "prednet": {"pred_hidden": 12, "pred_rnn_layers": 1, "dropout": 0.1},
            "vocab_size": len(labels),
        },
        "joint": {
            "_target_": "nemo.collections.asr.modules.RNNTJoint",
            "log_softmax": None,
            "preserve_memory": False,
            "fuse_loss_wer": False,
            "fused_batch_size": 2,
            "jointnet": {
                "joint_hidden": 12,
                "activation": "relu",
                "dropout": 0.1,
                "encoder_hidden": dim,
                "pred_hidden": 12,
            },
            "num_classes": len(labels),
            "vocabulary": labels,
        },
        "decoding": {"strategy": "greedy_batch", "greedy": {"max_symbols": 5}, "beam": {"beam_size": 4}},
        "loss": {"loss_name": "default", "warprnnt_numba_kwargs": {"fastemit_lambda": 0.0}},
    }
    if tdt:
        sections["model_defaults"] |= {"tdt_durations": DURATIONS, "num_tdt_durations": len(DURATIONS)}
        sections["joint"]["num_extra_outputs"] = len(DURATIONS)
        sections["decoding"] |= {"model_type": "tdt", "durations": DURATIONS}
        kwargs = {"durations": DURATIONS, "fastemit_lambda": 0.0, "clamp": -1.0, "sigma": 0.0, "omega": 0.0}
        sections["loss"] = {"loss_name": "tdt", "tdt_kwargs": kwargs}
    return sections


def stock_class(kind: str) -> Any:
    """The stock NeMo class of a kind."""
    from nemo.collections.asr import models

    names = {"ctc": "EncDecCTCModel", "rnnt": "EncDecRNNT", "tdt": "EncDecRNNT", "hybrid": "EncDecHybridRNNTCTC"}
    family, bpe = kind.split("_")[0], kind.endswith("bpe")
    if family == "ctc":
        return getattr(models, "EncDecCTCModelBPE" if bpe else "EncDecCTCModel")
    return getattr(models, names[family] + ("BPEModel" if bpe else "Model"))


def unsure(model: Any, *, blank: float = 3.0) -> None:
    """Changes a fresh model's weights so that it writes some labels, and its beam different ones.

    Args:
        model: changed in place.
        blank: added to a transducer's logit of blank.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh models are so sure of nothing that every beam member is alike; larger weights make them differ.
            parameter.mul_(1.5)
        if hasattr(model, "joint"):
            # An untrained joint emits some thirty labels a frame; a real one mostly blanks.
            last = model.joint.num_classes_with_blank - 1 - model.joint.num_extra_outputs
            model.joint.joint_net[-1].bias[last] += blank


def build_nemo(kind: str, path: Path, *, tokenizer_dir: Path | None = None, seed: int = 0, **overrides: Any) -> Path:
    """Saves a randomly initialised tiny model of a kind as a stock ``.nemo``."""
    torch.manual_seed(seed)
    model = stock_class(kind)(cfg=model_config(kind, tokenizer_dir, **overrides))
    unsure(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_to(str(path))
    return path


def build_streaming(path: Path, kind: str, *, tokenizer_dir: Path | None = None) -> Path:
    """A tiny streaming model that has the look-aheads of `LOOK_AHEADS`."""
    encoder = {"att_context_size": LOOK_AHEADS, "att_context_style": "chunked_limited", "conv_context_size": "causal"}
    encoder |= {"causal_downsampling": True, "conv_norm_type": "layer_norm"}
    settings = {f"encoder__{key}": value for key, value in encoder.items()}
    return build_nemo(kind, path, tokenizer_dir=tokenizer_dir, **settings)


def write_audio(path: Path, *, seconds: float, seed: int) -> Path:
    """Noise with a moving tone, 16 kHz mono."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * seed + 300 * t) * t)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (tone + 0.05 * rng.standard_normal(len(t))).astype(np.float32), SAMPLE_RATE)
    return path


def write_manifest(path: Path, texts: Sequence[str | None], *, seconds: float = 1.2, **extra: Sequence[Any]) -> Path:
    """A manifest with one row a text; ``None`` leaves the key out; ``extra`` adds one value a row."""
    lines = []
    for i, text in enumerate(texts):
        length = seconds + 0.1 * (i % 3)
        audio = write_audio(path.parent / "wav" / f"{path.stem}_{i}.wav", seconds=length, seed=i)
        line: dict[str, Any] = {"audio_filepath": str(audio.relative_to(path.parent)), "duration": length}
        if text is not None:
            line["text"] = text
        lines.append(line | {key: values[i] for key, values in extra.items()})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
