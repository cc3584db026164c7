"""The top-level keys of ``adapt``, and the keys of NeMo's and Lightning's sections whose values are checked early.

These sections take every key that NeMo and Lightning take; a key that is nearly one of theirs is a slip, and a value
that cannot be meant is refused before anything is loaded. What only NeMo and Lightning can judge (the arguments of an
optimizer) is tried by ``training.inputs``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section, build, keys_of
from nemo_llm_feedback.core.config.sections import Share, ShareBelowOne


def _endless_or_positive(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError(f"must be at least 1, or -1 for no limit, got {value}.")
    return value


def _paths(value: Any) -> Any:
    items = value if isinstance(value, (list, tuple)) else [value]
    if value is not None and not all(isinstance(item, (str, list)) for item in items):
        raise ValueError(f"must be a path or a list of paths, got {value!r}.")
    return value


_Limit = Annotated[int, AfterValidator(_endless_or_positive)]


@dataclass(frozen=True, config=STRICT)
class TopLevel(Section):
    """The keys of ``adapt`` that stand in no section.

    Attributes:
        name: of the run's folder and of the adapted checkpoint.
        init_from_nemo_model, init_from_pretrained_model: the starting checkpoint, a file or a name; one of the two.
        output: the adapted ``.nemo``; null = in the run's folder.
        seed: of everything that is drawn.
        runs: 1, or the number of runs (seeds ``seed``, ``seed + 1`` …) whose weights are averaged.
        resume: ``auto`` goes on with an unfinished run of the same settings, ``never`` starts anew.
        evaluate_batch_size: utterances per batch where transcripts are compared before and after.
        verbose: whether the terminal shows what NeMo, Lightning and transformers write, too.
        report_audio: whether ``report.html`` holds recordings.
    """

    name: Annotated[str, Field(min_length=1)] = "adapted"
    init_from_nemo_model: str | None = None
    init_from_pretrained_model: str | None = None
    output: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    runs: PositiveInt = 1
    resume: Literal["auto", "never"] = "auto"
    evaluate_batch_size: PositiveInt = 16
    verbose: bool = False
    report_audio: bool = True


def _section(path: str, groups: list[tuple[str, Any]]) -> type:
    """What pydantic checks a section by; Lightning's takes no other keys, NeMo's take any."""
    kinds = {name: kind for names, kind in groups for name in names.split()}
    fields = [(name, kind, *([] if name in _NEEDED else [field(default=None)])) for name, kind in kinds.items()]
    made = make_dataclass(path.replace(".", "_"), fields, kw_only=True, namespace={"is_open": path != "trainer"})
    return dataclass(made, config=STRICT)


_SECTION = dict[str, Any]
_DATA: list[tuple[str, Any]] = [
    ("manifest_filepath", Annotated[Any, AfterValidator(_paths)]),
    ("sample_rate batch_size", PositiveInt | None),
    ("shuffle use_lhotse is_tarred", bool),
    ("num_workers", NonNegativeInt),
    ("min_duration", NonNegativeFloat | None),
    ("max_duration batch_duration", PositiveFloat | None),
    ("tarred_audio_filepaths use_bucketing pin_memory shuffle_n shuffle_seed max_open_streams batch_tokens", Any),
]
# Section → keys by the type of their values; ``Any``, where they are not looked at. None has to be given, but these.
_NEEDED = ("train_ds", "validation_ds", "optim")
_KEYS: dict[str, list[tuple[str, Any]]] = {
    # All else of ``model`` is the checkpoint's.
    "model": [("train_ds validation_ds optim", _SECTION), ("optim_param_groups", _SECTION | None)],
    "model.train_ds": _DATA,
    "model.validation_ds": _DATA,
    "model.optim": [
        ("name", str),
        ("lr", PositiveFloat | None),
        ("betas", tuple[ShareBelowOne, ...] | None),
        ("weight_decay", NonNegativeFloat),
        ("sched", _SECTION | None),
    ],
    "model.optim.sched": [
        ("name", str | None),
        ("warmup_steps", NonNegativeInt | None),
        ("warmup_ratio", Share | None),
        ("min_lr", NonNegativeFloat | None),
        ("max_steps", PositiveInt | None),
    ],
    "trainer": [
        ("accelerator", str),
        ("num_nodes accumulate_grad_batches", PositiveInt),
        ("max_steps", _Limit),
        ("max_epochs", _Limit | None),
        ("min_steps log_every_n_steps", NonNegativeInt | None),
        ("limit_train_batches val_check_interval", PositiveFloat | None),
        ("check_val_every_n_epoch", PositiveInt | None),
        ("overfit_batches", Annotated[float, Field(le=0)]),  # its loader would not be that of the unlabeled rows
        ("deterministic", Literal[True, False, "warn"] | None),
        ("gradient_clip_val", NonNegativeFloat | None),
        ("strategy devices precision logger callbacks fast_dev_run max_time benchmark gradient_clip_algorithm", Any),
        ("inference_mode use_distributed_sampler profiler detect_anomaly barebones plugins", Any),
        ("sync_batchnorm", Literal[False] | None),  # ranks without labelled rows would not come to its exchange
        ("default_root_dir enable_checkpointing enable_progress_bar enable_model_summary limit_val_batches", Any),
        ("limit_test_batches limit_predict_batches min_epochs num_sanity_val_steps", Any),
        ("reload_dataloaders_every_n_epochs", Any),
    ],
    "exp_manager": [
        ("exp_dir explicit_log_dir", str | None),
        ("checkpoint_callback_params", _SECTION),
        ("create_early_stopping_callback", Literal[False]),  # held-out rows decide when a run stops early
    ],
    "exp_manager.checkpoint_callback_params": [
        ("save_top_k", Annotated[int, Field(ge=-1)]),
        ("save_last", bool),
        ("every_n_train_steps every_n_epochs", PositiveInt | None),
    ],
}
NEMO_SECTIONS: dict[str, type] = {path: _section(path, groups) for path, groups in _KEYS.items()}
_GROUP = _section("group", [("lr weight_decay", NonNegativeFloat | None)])


def section_at(tree: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of nested mappings; None where there is none."""
    node: Any = tree
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def value_faults(tree: Mapping[str, Any]) -> list[str]:
    """Every value of the top level and of NeMo's sections that cannot be meant, as a sentence.

    Args:
        tree: plain nested mappings of any of the sections of ``adapt``; what is absent is not looked at.
    """
    given: list[tuple[str, type, Any]] = [("", TopLevel, {key: tree[key] for key in keys_of(TopLevel) if key in tree})]
    given += [
        (path, cls, found) for path, cls in NEMO_SECTIONS.items() if (found := section_at(tree, path)) is not None
    ]
    groups = section_at(tree, "model.optim_param_groups")
    if isinstance(groups, Mapping):
        given += [(f"model.optim_param_groups.{name}", _GROUP, group) for name, group in groups.items()]
    faults = [fault for path, cls, values in given for fault in build(cls, values, where=path)[1]]
    # What is no mapping is a fault already.
    train, trainer = (
        node if isinstance(node := section_at(tree, path), Mapping) else {} for path in ("model.train_ds", "trainer")
    )
    if train.get("batch_size", 1) is None and not train.get("use_lhotse"):
        faults.append("model.train_ds.batch_size must be set; only Lhotse's loader (use_lhotse=true) can do without.")
    if trainer and trainer.get("max_steps", -1) == -1 and trainer.get("max_epochs") in (None, -1):
        faults.append("trainer.max_steps=-1 (no limit) needs trainer.max_epochs: nothing else would end the run.")
    for name in ("model", "trainer", "exp_manager"):
        faults += [
            f"{path} must be a finite number, got {value!r}." for path, value in _not_finite(tree.get(name), name)
        ]
    return list(dict.fromkeys(faults))


def _not_finite(node: Any, path: str) -> Iterator[tuple[str, float]]:
    """The numbers below a node that are NaN or infinite, with their paths; keys without a field have them, too."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _not_finite(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _not_finite(value, f"{path}[{index}]")
    elif isinstance(node, float) and not math.isfinite(node):
        yield path, node
