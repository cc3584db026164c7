"""The top-level keys of ``adapt``, and the keys of NeMo's and Lightning's sections whose values are checked early.

These sections take every key that NeMo and Lightning take; a key that is nearly one of theirs is a slip, and a value
that cannot be meant is refused before anything is loaded. What only NeMo and Lightning can judge (the arguments of an
optimizer) is tried by ``training.nemo_settings``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section, build, keys_of

Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


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


@dataclass(frozen=True, config=STRICT)
class ModelSettings(Section):
    """The parts of ``model`` that a run reads; all else of the model is the checkpoint's."""

    is_open = True

    train_ds: dict[str, Any]
    validation_ds: dict[str, Any]
    optim: dict[str, Any]
    optim_param_groups: dict[str, Any] | None = None

    def validate(self) -> list[str]:
        """Returns a fault where the loader would make no batches."""
        if self.train_ds.get("batch_size", 1) is None and not self.train_ds.get("use_lhotse"):
            return ["model.train_ds.batch_size must be set; only Lhotse's loader (use_lhotse=true) can do without."]
        return []


@dataclass(frozen=True, config=STRICT)
class DataSettings(Section):
    """``model.train_ds`` and ``model.validation_ds``."""

    # fmt: off
    more_keys = (
        "tarred_audio_filepaths", "use_bucketing", "pin_memory", "shuffle_n", "shuffle_seed", "max_open_streams",
        "batch_tokens",
    )
    # fmt: on
    is_open = True

    manifest_filepath: Annotated[Any, AfterValidator(_paths)] = None
    sample_rate: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    shuffle: bool = False
    num_workers: NonNegativeInt = 0
    min_duration: NonNegativeFloat | None = None
    max_duration: PositiveFloat | None = None
    batch_duration: PositiveFloat | None = None
    use_lhotse: bool = False
    is_tarred: bool = False


@dataclass(frozen=True, config=STRICT)
class OptimSettings(Section):
    """``model.optim``."""

    is_open = True

    name: str = "adamw"
    lr: PositiveFloat | None = None
    betas: tuple[ShareBelowOne, ...] | None = None
    weight_decay: NonNegativeFloat = 0.0
    sched: dict[str, Any] | None = None


@dataclass(frozen=True, config=STRICT)
class GroupSettings(Section):
    """A module's entry in ``model.optim_param_groups``."""

    is_open = True

    lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None


@dataclass(frozen=True, config=STRICT)
class SchedulerSettings(Section):
    """``model.optim.sched``."""

    is_open = True

    name: str | None = None
    warmup_steps: NonNegativeInt | None = None
    warmup_ratio: Share | None = None
    min_lr: NonNegativeFloat | None = None
    max_steps: PositiveInt | None = None


@dataclass(frozen=True, config=STRICT)
class TrainerSettings(Section):
    """``trainer``: arguments of Lightning's trainer; those without a field are left to it."""

    # fmt: off
    more_keys = (
        "strategy", "devices", "precision", "logger", "callbacks", "fast_dev_run", "max_time", "benchmark",
        "gradient_clip_algorithm", "inference_mode", "use_distributed_sampler",
        "profiler", "detect_anomaly", "barebones", "plugins", "sync_batchnorm", "default_root_dir",
        "enable_checkpointing", "enable_progress_bar", "enable_model_summary",
        "limit_val_batches", "limit_test_batches", "limit_predict_batches", "min_epochs", "num_sanity_val_steps",
        "reload_dataloaders_every_n_epochs",
    )
    # fmt: on

    accelerator: str = "auto"
    num_nodes: PositiveInt = 1
    max_steps: _Limit = -1
    min_steps: NonNegativeInt | None = None
    max_epochs: _Limit | None = None
    limit_train_batches: PositiveFloat | None = None
    overfit_batches: Annotated[float, Field(le=0)] = 0.0  # its loader would not be that of the unlabeled rows
    deterministic: Literal[True, False, "warn"] | None = None
    val_check_interval: PositiveFloat | None = None
    check_val_every_n_epoch: PositiveInt | None = None
    log_every_n_steps: NonNegativeInt | None = None
    accumulate_grad_batches: PositiveInt = 1
    gradient_clip_val: NonNegativeFloat | None = None

    def validate(self) -> list[str]:
        """Returns a fault where nothing ends the run."""
        if self.max_steps == -1 and self.max_epochs in (None, -1):
            return ["trainer.max_steps=-1 (no limit) needs trainer.max_epochs: nothing else would end the run."]
        return []


@dataclass(frozen=True, config=STRICT)
class ManagerSettings(Section):
    """``exp_manager``, of which NeMo checks the other keys; held-out rows decide when a run stops early."""

    is_open = True

    exp_dir: str | None = None
    explicit_log_dir: str | None = None
    checkpoint_callback_params: dict[str, Any] = field(default_factory=dict)
    create_early_stopping_callback: Literal[False] = False


@dataclass(frozen=True, config=STRICT)
class CheckpointSettings(Section):
    """``exp_manager.checkpoint_callback_params``."""

    is_open = True

    save_top_k: Annotated[int, Field(ge=-1)] = 1
    save_last: bool = True
    every_n_train_steps: PositiveInt | None = None
    every_n_epochs: PositiveInt | None = None


NEMO_SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "model.train_ds": DataSettings,
    "model.validation_ds": DataSettings,
    "model.optim": OptimSettings,
    "model.optim.sched": SchedulerSettings,
    "trainer": TrainerSettings,
    "exp_manager": ManagerSettings,
    "exp_manager.checkpoint_callback_params": CheckpointSettings,
}


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
    given: list[tuple[str, type[Section], Any]] = [
        ("", TopLevel, {key: value for key, value in tree.items() if key in keys_of(TopLevel)})
    ]
    given += [
        (path, cls, found) for path, cls in NEMO_SECTIONS.items() if (found := section_at(tree, path)) is not None
    ]
    groups = section_at(tree, "model.optim_param_groups")
    if isinstance(groups, Mapping):
        given += [(f"model.optim_param_groups.{name}", GroupSettings, group) for name, group in groups.items()]
    faults = []
    for path, cls, values in given:
        section, wrong = build(cls, values, where=path)
        faults += wrong or (section.validate() if section is not None else [])
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
