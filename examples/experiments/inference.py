"""What competes with adaptation at inference: stock NeMo's beam, NeMo's phrase boosting, rescoring with the LLM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nemo.collections.asr.models import ASRModel
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_llm_feedback.core.config import ContextConfig
from nemo_llm_feedback.data.manifests import Row, read_manifest

BEAM = 8


def nemo_beam(
    checkpoint: Path,
    manifest: Path,
    target: Path,
    *,
    terms_file: Path | None = None,
    weight: float = 0.0,
    set_beam: Callable[[Any], None] | None = None,
) -> Path:
    """Decodes with stock NeMo's batched beam search and writes predictions, unless they are there.

    Args:
        checkpoint: ``.nemo``.
        manifest: its rows' own lists of terms come before the file's.
        target: JSON Lines with ``pred_text``.
        terms_file: boosted in every row; None = none.
        weight: ``boosting_tree_alpha``; 0 = a plain beam.
        set_beam: sets the model's decoding instead of the boosted or plain beam.
    """
    if target.is_file():
        return target
    model: Any = ASRModel.restore_from(str(checkpoint), map_location="cpu")
    model.eval()
    logging.setLevel(logging.ERROR)
    rows = read_manifest(str(manifest))
    shared = ContextConfig(terms_file=str(terms_file)).load().terms if terms_file else ()
    by_terms: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        terms = tuple(dict.fromkeys((*row.context.terms, *shared))) if weight else ()
        by_terms.setdefault(terms, []).append(i)
    texts = [""] * len(rows)
    for terms, members in by_terms.items():
        if set_beam is None:
            _set_beam(model, terms, weight)
        else:
            set_beam(model)
        with torch.no_grad():
            found = model.transcribe([rows[i].audio for i in members], batch_size=16, verbose=False)
        for i, hypothesis in zip(members, found, strict=True):
            texts[i] = getattr(hypothesis, "text", hypothesis)
    return _write(target, rows, texts)


def _set_beam(model: Any, terms: Sequence[str], weight: float) -> None:
    """NeMo's batched beam of the model's main head, boosted on the terms."""
    beam: dict[str, Any] = {"beam_size": BEAM, "return_best_hypothesis": True, "allow_cuda_graphs": False}
    if terms:
        beam["boosting_tree"] = {
            "key_phrases_list": list(terms),
            "context_score": 1.0,
            "depth_scaling": 2.0,
            "use_triton": torch.cuda.is_available(),
        }
        beam["boosting_tree_alpha"] = weight
    ctc = not hasattr(model, "joint")
    decoding = OmegaConf.create(OmegaConf.to_container(model.cfg.decoding, resolve=True))
    decoding.strategy = "beam_batch" if ctc else "malsd_batch"
    decoding.beam = OmegaConf.create(beam)
    model.change_decoding_strategy(decoding, verbose=False)


def rescored(
    checkpoint: Path, manifest: Path, target: Path, *, llm: str, context: Sequence[str], judge: Sequence[str]
) -> Path:
    """Decodes with this package's rescoring and writes predictions, unless they are there.

    Args:
        checkpoint, manifest, target: as of :func:`nemo_beam`.
        llm: its folder or hub id.
        context: flags of ``transcribe`` that give the context.
        judge: flags of ``transcribe`` that give the reward and its weights.
    """
    if not target.is_file():
        command = [sys.executable, "-m", "nemo_llm_feedback.cli.main", "transcribe", str(checkpoint)]
        command += ["--dataset-manifest", str(manifest), "--output-filename", str(target), "--rescore"]
        command += ["--llm", llm, *context, *judge]
        with open(target.with_suffix(".log"), "w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return target


def _write(target: Path, rows: Sequence[Row], texts: Sequence[str]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({**row.data, "audio_filepath": row.audio, "pred_text": text})
        for row, text in zip(rows, texts, strict=True)
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target
