"""Turns a training checkpoint, or the average of several, into a plain ``.nemo`` with a model card beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from nemo_llm_feedback.asr.checkpoints import refuse_nonfinite
from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.look_ahead import look_aheads
from nemo_llm_feedback.asr.lora import has_lora, inject, merged
from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.core.config import FeedbackConfig, RunConfig
from nemo_llm_feedback.core.console import quiet
from nemo_llm_feedback.core.errors import CheckpointError, ConfigError, short
from nemo_llm_feedback.core.text_files import stem, to_number
from nemo_llm_feedback.core.version import __version__
from nemo_llm_feedback.evaluation.model_card import card_path, write_model_card
from nemo_llm_feedback.evaluation.records import check_writable
from nemo_llm_feedback.evaluation.transcribe import score_sets
from nemo_llm_feedback.training.inputs import labelled_rows
from nemo_llm_feedback.training.mixin import CHECKPOINT_KEY
from nemo_llm_feedback.training.models import locate, restore

_NORMALIZER = "basic"
_ONE_BASE = "average runs that started from one checkpoint."
# What was measured on the weights of one run, and does not hold for others.
_MEASURED = ("before", "after", "gain", "general_wer_rise")


@quiet()
def export(
    checkpoint: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    manifest: str | Path | None = None,
    interpolation: float = 1.0,
    device: str = "cpu",
) -> Path:
    """Writes the plain ``.nemo`` of a checkpoint, or of the average of several, and its model card.

    Args:
        checkpoint: a Lightning ``.ckpt`` of a run, or a ``.nemo`` (rewritten with the stock class as target); several,
            of runs that started from one base: the mean of their weights.
        base: the ``.nemo`` that the ``.ckpt`` was trained from; gives configuration and tokenizer. A checkpoint of
            this plugin names its base; it is needed where that file has moved.
        output: where to write; beside the checkpoint, with the suffix ``.nemo``, if None. Needed for several.
        manifest: labelled rows on which base and export are scored for the card; None = the card has what the
            ``.nemo`` holds of its training; a ``.ckpt`` holds nothing.
        interpolation: 0 < W ≤ 1, share of the way from the base's weights to the adapted ones: below 1, less of what
            was learned and less of what was lost of other speech. Below 1 it needs an output, and ``base`` unless a
            ``.ckpt`` names it.
        device: where base and export are scored, ``cpu`` or ``cuda:0`` ….

    Returns:
        The path written; the card has the suffix ``.md``. A ``.nemo`` rewritten in place keeps the card it has.

    Raises:
        CheckpointError: unusable files, a missing base, the base as output, weights of another model, or several or
            an interpolation without an output.
        ConfigError: ``interpolation`` is out of range, or ``output`` cannot be written or is the manifest.
        ManifestError: the manifest cannot be read or has rows without text.
    """
    given = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    sources = [Path(name).expanduser() for name in given]
    missing = [str(source) for source in sources if not source.is_file()]
    if missing or not sources:
        raise CheckpointError(f"{', '.join(missing) or 'no checkpoint'}: no such file.")
    if not 0 < interpolation <= 1:
        raise ConfigError(f"--interpolation {interpolation:g}: give a share of the run above 0, at most 1.")
    mean = len(sources) > 1 or interpolation < 1
    if mean and not output:
        raise CheckpointError("an average of checkpoints, or with the base, needs a name: add --output AVERAGE.nemo.")
    target = Path(output).expanduser() if output else sources[0].with_name(f"{stem(sources[0])}.nemo")
    rows = labelled_rows(str(manifest)) if manifest else {}
    if (rows or interpolation < 1) and not base and any(source.suffix == ".nemo" for source in sources):
        what = "is mixed with" if interpolation < 1 else "is scored against"
        raise CheckpointError(f"{', '.join(map(str, sources))} {what} its base: add --base BASE.nemo.")
    if mean and any(target.is_file() and target.samefile(source) for source in sources):
        raise CheckpointError(f"--output {output} is one of the checkpoints, which would be lost: choose another.")
    check_writable(target, inputs=(manifest,))
    run = _averaged(sources, base, interpolation) if mean else _opened(sources[0], base)
    same = run.base and os.path.isfile(run.base) and target.is_file() and target.samefile(run.base)
    if same or (target.is_file() and target not in sources and target.name == run.facts.get("base")):
        raise CheckpointError(f"--output {output} is the base, which would be lost: choose another name.")
    learned = _as_learned(run)
    run.model._adaptation_facts = run.facts
    run.model.save_to(str(target))
    if rows or target not in sources or not card_path(target).is_file():
        place = torch.device(device)
        before = score_sets(restore(str(run.base), map_location=place), rows, learned) if rows else {}
        after = score_sets(run.model.to(place), rows, learned)
        write_model_card(target, facts=run.facts, before=before, after=after, normalizer=_NORMALIZER)
    return target


@dataclass(frozen=True)
class _Run:
    """A file's model, its base where that is known, and what the file holds of how it was made."""

    name: str
    model: Any
    base: str | Path | None
    facts: dict[str, Any]


def _as_learned(run: _Run) -> RunConfig:
    """The head and the attention context that learned, in which the card says that it measures.

    Raises:
        CheckpointError: the encoder has no such context.
    """
    context = run.facts.get("look_ahead")
    encoder = run.model.encoder
    if context is not None and context not in (look_aheads(encoder) or [list(encoder.att_context_size)]):
        raise CheckpointError(
            f"{run.name} says that it learned in the attention context {short(context)}, which its encoder does not "
            "have: the file was changed; export the run again."
        )
    learned: Any = {"heads": "ctc"} if run.facts.get("decoder_type") == "ctc" else {}
    return RunConfig(feedback=FeedbackConfig(**learned, look_ahead=context and tuple(map(int, context))))


def _opened(source: Path, base: str | Path | None) -> _Run:
    """The run of a ``.nemo`` or of a Lightning checkpoint, restored on the CPU."""
    if source.suffix == ".nemo":
        facts: Any = OmegaConf.to_container(read_config(source).get("adaptation") or OmegaConf.create())
        return _Run(str(source), restore(source, map_location="cpu"), base, facts)
    content = _read_lightning(source)
    weights, ours = content["state_dict"], _mapping(content.get(CHECKPOINT_KEY))
    # A file from elsewhere may name anything; only a file that is here is taken, nothing is fetched.
    base = base or (named if isinstance(named := ours.get("base"), str) and os.path.isfile(named) else None)
    if not base:
        raise CheckpointError(
            f"{source} does not name its base, or names none that is here: add --base BASE.nemo, what it was trained "
            "from."
        )
    model = restore(base, map_location="cpu")
    if ranks := {value.shape[:1] for name, value in weights.items() if ".lora_A." in name}:
        lora = _mapping(ours.get("lora"))
        rank, alpha = lora.get("rank"), lora.get("alpha")
        if type(rank) is not int or type(alpha) is not int or ranks != {(rank,)} or alpha < 1:
            raise CheckpointError(f"{source} lacks the rank and alpha that its LoRA weights were trained with.")
        inject(model, rank=rank, alpha=alpha)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit {base}: {str(error).splitlines()[0]}") from None
    refuse_nonfinite(weights, origin=source)
    facts = {"plugin": f"nemo_llm_feedback {__version__}", "base": Path(base).name}
    step = content.get("global_step")
    return _Run(str(source), model, base, facts | {"steps": step if type(step) is int else 0})


@torch.no_grad()
def _averaged(sources: Sequence[Path], base: str | Path | None, interpolation: float) -> _Run:
    """The mean of files' weights (Wortsman et al. 2022, arXiv 2203.05482: "model soups"), those of LoRA as merged,
    interpolated with the base's (arXiv 2109.01903: the ensemble of weights that keeps what fine-tuning loses).

    Only runs from one base can be averaged: their weights lie near each other, those of models that were trained
    apart do not, and their mean recognises nothing.

    Raises:
        CheckpointError: another class, other output symbols, other shapes or another base than the first one's.
    """
    first: _Run | None = None
    mean: dict[str, Tensor] = {}
    known: list[dict[str, Any]] = []
    for source in sources:
        run = _opened(source, base)
        first = first or run
        known.append(run.facts)
        bases = sorted({str(facts["base"]) for facts in known if facts.get("base")})
        if len(bases) > 1:
            raise CheckpointError(f"{source} comes from another base ({', '.join(bases)}): {_ONE_BASE}")
        with merged(run.model):
            weights = run.model.state_dict()
        mean = mean or {key: value.clone() for key, value in weights.items()}
        _move(mean, weights, 1 / len(known), run=run, first=first)
    assert first is not None
    facts = {
        key: value
        for key, value in known[0].items()
        if key not in _MEASURED and all(other.get(key) == value for other in known)
    }
    facts |= {"averaged": len(known)} if len(known) > 1 else {}
    if interpolation < 1:
        start = locate(str(first.base))  # runs name the file, and a pretrained name is not its file's
        if facts.get("base") and start.name != facts["base"]:
            raise CheckpointError(
                f"the runs started from {facts['base']}, not from {start}: give that file as --base."
            )
        origin = _Run(str(start), restore(start, map_location="cpu"), None, {})
        _move(mean, origin.model.state_dict(), 1 - interpolation, run=origin, first=first)
        facts["interpolation"] = interpolation * (to_number(facts.get("interpolation")) or 1.0)
    # The mean has LoRA merged in: layers that have it apart cannot take the mean, those of the base can.
    holder = restore(str(first.base), map_location="cpu") if has_lora(first.model) else first.model
    holder.load_state_dict(mean, strict=True)
    return _Run(first.name, holder, first.base, facts)


def _move(mean: dict[str, Tensor], weights: Mapping[str, Tensor], share: float, *, run: _Run, first: _Run) -> None:
    """Goes a share of the way from the mean to a model's weights, if the model is of the first one's kind."""
    if type(run.model) is not type(first.model) or _symbols(run.model) != _symbols(first.model):
        raise CheckpointError(f"{run.name} and {first.name} have not the same class and output symbols: {_ONE_BASE}")
    if {key: value.shape for key, value in weights.items()} != {key: value.shape for key, value in mean.items()}:
        raise CheckpointError(f"{run.name} and {first.name} have weights of other names or shapes: {_ONE_BASE}")
    for key, value in weights.items():
        if value.is_floating_point():
            mean[key] += share * (value - mean[key])


def _symbols(model: Any) -> list[str]:
    """What the outputs stand for, in order: BPE pieces or characters."""
    return list(heads_of(model)[0].vocabulary.labels)


def _read_lightning(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, read as tensors and plain data: a file from elsewhere cannot run code here."""
    try:
        with torch.serialization.safe_globals(_plain_config_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of broken bytes the reader raises anything
        raise CheckpointError(f"{path} cannot be read as a Lightning checkpoint ({str(error)[:300]}).") from None
    weights = _mapping(_mapping(content).get("state_dict"))
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise CheckpointError(f"{path} has no state_dict of tensors: it is not a Lightning checkpoint.")
    return {**content, "state_dict": weights}


def _mapping(value: Any) -> dict[Any, Any]:
    """The value if it is a mapping, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def _plain_config_types() -> list[Any]:
    """What NeMo's hyper-parameters are stored as: OmegaConf's containers, which hold data only."""
    import typing
    from collections import defaultdict

    from omegaconf import base, nodes

    containers = [DictConfig, ListConfig, base.ContainerMetadata, base.Metadata, defaultdict, dict, list, int]
    scalars = [nodes.AnyNode, nodes.StringNode, nodes.IntegerNode, nodes.FloatNode, nodes.BooleanNode]
    return [*containers, *scalars, typing.Any]
