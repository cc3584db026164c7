"""Every structural kind of released checkpoint, scaled down in width and depth: differences from four base models.

What is kept is what has made trouble or could: features, biases, layers of the prediction network, TDT's sigma and
omega, tokenizers, causal and chunked attention, and keys that old or new versions of NeMo leave out or add.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from helpers.tiny import CHARACTERS, WORDS, model_config, stock_class, unsure
from omegaconf import OmegaConf, open_dict

MODULES = "nemo.collections.asr.modules."
JAPANESE = "こんにちは今日は天気がいいですね珈琲を一つください牛乳と砂糖もお願いしますありがとうございました"
PUNCTUATED = ["Hello, Anna.", "A latte, please!", "One mocha to go?", "Thank you, Mr. Brown."]
# Symbols of newer checkpoints, which no text contains.
SYMBOLS = ["<|nospeech|>", "<|endoftext|>", "<|startoftranscript|>", "<|pnc|>", "<|en|>", "<|de|>"]


def make_tokenizers(folder: Path) -> dict[str, Path]:
    """Name → folder of a tokenizer in NeMo's layout: ``lower``, ``cased`` (with symbols), ``japanese``."""
    rng = random.Random(0)
    lower = [" ".join(rng.choices(WORDS, k=6)) for _ in range(200)]
    japanese = ["".join(rng.choices(JAPANESE, k=12)) for _ in range(200)]
    return {
        "lower": _tokenizer(folder / "lower", lower, size=48),
        "cased": _tokenizer(folder / "cased", PUNCTUATED * 20 + lower, size=80, user_defined_symbols=SYMBOLS),
        "japanese": _tokenizer(folder / "japanese", japanese, size=70, character_coverage=1.0),
    }


def _tokenizer(folder: Path, lines: Sequence[str], *, size: int, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    names = {"bos_id": -1, "eos_id": -1, "hard_vocab_limit": False, "minloglevel": 2, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=size, **names, **settings
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    listed = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(piece for piece in listed if piece != "<unk>") + "\n")
    return folder


# What NeMo's training scripts leave in the configuration of a checkpoint.
_LHOTSE: dict[str, Any] = {
    "use_lhotse": True,
    "skip_missing_manifest_entries": True,
    "input_cfg": None,
    "tarred_audio_filepaths": None,
    "manifest_filepath": None,
    "sample_rate": 16000,
    "shuffle": True,
    "num_workers": 2,
    "max_duration": 40.0,
    "min_duration": 0.1,
    "text_field": "answer",
    "batch_duration": None,
    "use_bucketing": True,
    "bucket_duration_bins": [1.0, 2.0],
    "bucket_batch_size": [4, 2],
    "num_buckets": 2,
    "bucket_buffer_size": 20,
    "shuffle_buffer_size": 20,
}
_RELEASED_BEAM = {"beam_size": 2, "return_best_hypothesis": False, "score_norm": True, "tsd_max_sym_exp": 50}
# Parakeet: 128 mel, no bias, two layers in the prediction network, Lhotse's settings of training.
_PARAKEET: dict[str, Any] = {
    "preprocessor": {"features": 128, "frame_splicing": 1, "window": "hann"},
    "encoder": {"feat_in": 128, "use_bias": False, "xscaling": False, "untie_biases": True, "pos_emb_max_len": 5000},
    "train_ds": _LHOTSE,
    "log_prediction": True,
    "skip_nan_grad": False,
    "interctc": {"loss_weights": [], "apply_at_layers": []},
}
_TRANSDUCER: dict[str, Any] = {
    "decoder": {"prednet": {"pred_rnn_layers": 2, "t_max": None}},
    "joint": {"fuse_loss_wer": True, "fused_batch_size": 4},
    "decoding": {"beam": _RELEASED_BEAM},
}
_TDT = {"loss": {"tdt_kwargs": {"sigma": 0.02, "omega": 0.1}}}
_CAUSAL: dict[str, Any] = {
    "preprocessor": {"normalize": "NA"},
    "encoder": {
        "causal_downsampling": True,
        "att_context_style": "chunked_limited",
        "att_context_size": [[28, 6], [28, 3], [28, 1], [28, 0]],
        "att_context_probs": None,
        "conv_context_size": "causal",
        "conv_norm_type": "layer_norm",
    },
}
_NEMO_1 = {"encoder": {"subsampling": "striding", "subsampling_factor": 4, "ff_expansion_factor": 2}}
_STATELESS = {
    "decoder": {
        "_target_": MODULES + "StatelessTransducerDecoder",
        "context_size": 2,
        "normalization_mode": "layer",
    }
}


def _block(filters: int, *, kernel: int, stride: int = 1, residual: bool = False, **more: Any) -> dict[str, Any]:
    size = {"filters": filters, "kernel": [kernel], "stride": [stride], "residual": residual}
    return {"repeat": 1, "dilation": [1], "dropout": 0.0, "separable": True, **size, **more}


def _convolutions(features: int, **more: Any) -> dict[str, Any]:
    """A ``ConvASREncoder`` with the blocks of QuartzNet; ``more`` in each of them as Citrinet and ContextNet have."""
    middle = _block(16, kernel=5, residual=True, repeat=2, **more)
    blocks = [_block(16, kernel=5, stride=2, **more), middle, _block(16, kernel=3, stride=2, **more)]
    return {"_target_": MODULES + "ConvASREncoder", "feat_in": features, "activation": "relu", "jasper": blocks}


_SE = {
    "se": True,
    "se_context_size": -1,
    "kernel_size_factor": 1.0,
    "stride_last": True,
    "residual_mode": "stride_add",
}
Kind = tuple[str, str, Sequence[dict[str, Any]], Sequence[str]]
# Name → kind of `tiny`, tokenizer, differences from it, keys that are missing.
KINDS: dict[str, Kind] = {
    "parakeet-tdt-0.6b-v2": ("tdt_bpe", "cased", [_PARAKEET, _TRANSDUCER, _TDT], ()),
    "parakeet-tdt-0.6b-v3": (
        "tdt_bpe",
        "cased",
        [_PARAKEET, _TRANSDUCER, _TDT, {"decoding": {"greedy": {"max_symbols": 10, "use_cuda_graph_decoder": False}}}],
        ("test_ds",),
    ),
    "parakeet-tdt_ctc-110m": ("hybrid_tdt_bpe", "cased", [_TDT, {"decoding": {"beam": _RELEASED_BEAM}}], ()),
    "parakeet-tdt_ctc-0.6b-ja": ("hybrid_tdt_bpe", "japanese", [_TDT, _TRANSDUCER], ()),
    "parakeet-ctc-0.6b": ("ctc_bpe", "lower", [{"encoder": {"use_bias": False, "xscaling": False}}], ("decoding",)),
    "parakeet-rnnt-0.6b": ("rnnt_bpe", "lower", [_TRANSDUCER, {"encoder": {"use_bias": False}}], ()),
    "parakeet-unified-en-0.6b": (
        "rnnt_bpe",
        "cased",
        [
            _PARAKEET,
            _TRANSDUCER,
            {
                "encoder": {
                    "att_context_style": "chunked_limited_with_rc",
                    "att_chunk_context_size": [[14], [1, 2, 7], [0, 1, 3]],
                    "conv_context_style": "dcc",
                    "att_context_size": [-1, -1],
                }
            },
        ],
        (),
    ),
    "stt_en_fastconformer_ctc_large": (
        "ctc_bpe",
        "lower",
        [{"interctc": {"loss_weights": [], "apply_at_layers": []}}],
        (),
    ),
    "stt_en_fastconformer_transducer_large": ("rnnt_bpe", "lower", [{"decoding": {"beam": _RELEASED_BEAM}}], ()),
    "stt_en_fastconformer_hybrid_large_pc": (
        "hybrid_bpe",
        "cased",
        [{"decoding": {"beam": _RELEASED_BEAM}, "joint": {"fuse_loss_wer": True}}],
        (),
    ),
    "stt_en_fastconformer_hybrid_large_streaming_multi": ("hybrid_bpe", "lower", [_CAUSAL], ()),
    "nemotron-speech-streaming-en-0.6b": ("rnnt_bpe", "cased", [_PARAKEET, _TRANSDUCER, _CAUSAL], ()),
    "stt_en_conformer_ctc_small": ("ctc_bpe", "lower", [_NEMO_1], ("decoding", "test_ds", "log_prediction")),
    "stt_en_conformer_transducer_small": (
        "rnnt_bpe",
        "lower",
        [_NEMO_1, {"variational_noise": {"start_step": 0, "std": 0.0}, "decoding": {"beam": _RELEASED_BEAM}}],
        ("loss", "test_ds", "log_prediction"),
    ),
    "stt_en_citrinet_256": ("ctc_bpe", "lower", [{"encoder": _convolutions(16, **_SE)}], ("decoding",)),
    "QuartzNet15x5Base-En": ("ctc_char", "", [{"encoder": _convolutions(16)}], ("decoding", "labels", "test_ds")),
    "stt_en_contextnet_256": ("rnnt_bpe", "lower", [{"encoder": _convolutions(16, **_SE)}], ()),
    "stt_multilingual_fastconformer_hybrid_large_pc": ("hybrid_bpe", "agg", [], ()),
    "stateless-rnnt": ("rnnt_bpe", "lower", [_STATELESS], ()),
    "stateless-tdt": ("tdt_bpe", "lower", [_STATELESS, {"decoder": {"context_size": 3}}], ()),
    "local-attention": (
        "tdt_bpe",
        "cased",
        [_PARAKEET, {"encoder": {"self_attention_model": "rel_pos_local_attn", "att_context_size": [8, 8]}}],
        (),
    ),
    "inter-ctc": (
        "ctc_bpe",
        "lower",
        [{"encoder": {"n_layers": 2}, "interctc": {"loss_weights": [0.3], "apply_at_layers": [0]}}],
        (),
    ),
}


def build_kind(name: str, path: Path, tokenizers: dict[str, Path]) -> Path:
    """Saves a random model of a kind of :data:`KINDS` as a stock ``.nemo``."""
    base, tokenizer, differences, missing = KINDS[name]
    cfg = model_config(base, tokenizers.get(tokenizer))
    if tokenizer == "agg":
        langs = {lang: {"dir": str(tokenizers["lower"]), "type": "bpe"} for lang in ("en", "de")}
        cfg.tokenizer = {"type": "agg", "langs": langs}
    for difference in differences:
        if "_target_" in difference.get("encoder", {}):
            cfg.pop("encoder")
        if difference.get("decoder", {}).get("_target_"):
            for key in ("random_state_sampling", "blank_as_pad"):
                cfg.decoder.pop(key)
        cfg = OmegaConf.merge(cfg, difference)
    for key in missing:
        cfg.pop(key, None)
    if "labels" in missing:  # the labels stand with the data, as in the oldest checkpoints
        cfg.train_ds.labels = CHARACTERS
    train_ds = cfg.pop("train_ds")  # a new model would read the data
    torch.manual_seed(0)
    model = stock_class(base)(cfg=cfg)
    with open_dict(model.cfg):
        model.cfg.train_ds = train_ds
    unsure(model, blank=0.0)
    model.save_to(str(path))
    return path
