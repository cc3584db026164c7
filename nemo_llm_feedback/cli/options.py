"""The flags of all commands: what each is called, which key of the settings it sets, and the groups that are shared.

A group is a dataclass whose fields are flags and whose docstring is their help. A field that sets a key has the same
name in every command (``KEYS``); NeMo's names from its example scripts are taken, too (``NEMO_NAMES``).

Seconds of wall time for ``score --help`` on two CPU cores: cyclopts 0.17 (argparse by hand: 0.05); for a command with
ten flags cyclopts 0.12, simple-parsing 0.09, jsonargparse 0.14, tyro 0.15, pydantic-settings 0.17. cyclopts takes
nested dataclasses, lists without brackets and flags with an optional value; its errors name the nearest flag.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeInt, PositiveInt

from nemo_llm_feedback.core.errors import ConfigError

# Field of an option group → the key that it sets.
KEYS = {
    "manifest": "model.train_ds.manifest_filepath",
    "validation": "model.validation_ds.manifest_filepath",
    "output": "output",
    "max_steps": "trainer.max_steps",
    "seed": "seed",
    "runs": "runs",
    "resume": "resume",
    "head": "feedback.heads",
    "samples": "proposals.samples",
    "cache": "reward.cache",
    "llm": "llm.model",
    "quantization": "llm.quantization",
    "description": "context.description",
    "terms": "context.terms",
    "terms_file": "context.terms_file",
    "alpha": "reward.alpha",
    "beta": "reward.beta",
    # of rescoring
    "beam_size": "nbest",
    "boosted": "boosted",
    "boosting_weight": "boosting_weight",
    "term_swap": "term_swap",
}
# Arguments of NeMo's example scripts, each an alias of a flag (``adapt`` takes them as keys, see ``compose_config``).
_NEMO_INPUTS = "model_path pretrained_name audio_dir audio_type dataset_manifest"
_NEMO_OTHERS = "output_filename decoder_type cuda batch_size timestamps"
NEMO_NAMES = frozenset(f"{_NEMO_INPUTS} {_NEMO_OTHERS}".split(" "))
HeadName = Annotated[
    Literal["auto", "ctc", "transducer", "rnnt"],
    Parameter(name=("--head", "--decoder-type"), help="head of a hybrid model; rnnt = transducer"),
]
Device = Annotated[
    str,
    Parameter(name=("--device", "--cuda"), help="auto (a GPU if there is one), cpu, cuda, cuda:1; or NeMo's number"),
]
Manifest = Parameter(name=("--manifest", "--dataset-manifest"))
Output = Parameter(name=("--output", "--output-filename", "--out"))
Models = Parameter(name=("--model", "--model-path", "--pretrained-name"))
TermsFile = Annotated[
    str | None, Parameter(help="terms that may occur: one per line, a JSON list, or a JSON object of lists")
]
_RESCORING = Group("Rescoring", help="score = log p(text|audio) + alpha·log p(text|context) + beta·words")
JsonFile = Annotated[str | None, Parameter(help="write everything here too, as JSON")]
NoAudio = Annotated[bool, Parameter(help="no audio in the page, for private data")]


def device_name(given: str) -> str:
    """The device of the flag ``--device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a number is NeMo's, −1 the CPU.

    Raises:
        ConfigError: it is none of them.
    """
    name = {"-1": "cpu", "gpu": "cuda"}.get(given, f"cuda:{given}" if given.isdecimal() else given)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device {given}: give auto, cpu, cuda or cuda:N with the number of a GPU.")
    return name


def torch_device(given: str) -> str:
    """The device that the flag ``--device`` names, as torch has it.

    Raises:
        ConfigError: there is no such GPU.
    """
    name = device_name(given)
    if name == "cpu":
        return name
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return "cuda:0" if count else "cpu"
    number = int(name[5:] or 0)
    if number >= count:
        raise ConfigError(f"--device {given}: {count} GPU(s) here; give cuda:N with a smaller number, or cpu.")
    return f"cuda:{number}"


def head_of(given: str) -> str:
    """The head of the flag ``--head``, whose ``rnnt`` is NeMo's name of a transducer."""
    return "transducer" if given == "rnnt" else given


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """An error's text with flags in the place of the keys that they set.

    Args:
        message: names keys, e.g. ``llm.model is missing`` or ``reward.alpha=2``.
        flags: key → flag, of the flags that the command has.
    """
    lines = message.split("\n")
    for key, flag in flags.items():
        named = rf"(?<![\w.-]){re.escape(key)}(?!\w|\.\w)"
        named += "" if "." in key else "(?==| must )"  # `output` and `seed` are words, too
        for i, line in enumerate(lines):
            if "unknown key" not in line:  # it came as a key, and stays one
                lines[i] = re.sub(named, flag, re.sub(rf"{named}=(?=\S)", f"{flag} ", line))
    return "\n".join(lines)


def given(*groups: Any, **flags: Any) -> dict[str, Any]:
    """Name → value of the flags that were given: paths as texts, several values as a tuple.

    Args:
        groups: groups of flags, which may hold others.
        flags: further flags.
    """
    found: dict[str, Any] = {}
    for name, value in [*(item for group in groups for item in vars(group).items()), *flags.items()]:
        if is_dataclass(value):
            found |= given(value)
        elif value is not None and value != () and value != "":
            found[name] = tuple(map(str, value)) if isinstance(value, (tuple, list)) else value
            found[name] = str(value) if isinstance(value, Path) else found[name]
    return found


def keys_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the settings that flags set.

    Args:
        flags: what :func:`given` gave.
    """
    found = {KEYS[name]: list(v) if isinstance(v, tuple) else v for name, v in flags.items() if name in KEYS}
    for key in (KEYS["manifest"], KEYS["validation"]):
        if len(found.get(key, ())) == 1:
            (found[key],) = found[key]
    if "head" in flags:
        found[KEYS["head"]] = head_of(flags["head"])
    if base := flags.get("base"):
        found["init_from_nemo_model" if base.endswith(".nemo") else "init_from_pretrained_model"] = base
    if (device := device_name(flags.get("device", "auto"))) != "auto":
        found |= {"llm.device": device} | ({"trainer.devices": [int(device[5:])]} if ":" in device else {})
    return found


def compose(flags: Mapping[str, Any], overrides: Sequence[str] = (), **files: Any) -> Any:
    """The configuration that flags and settings make; the flags win.

    Args:
        flags: see :func:`keys_of`.
        overrides: further settings, ``KEY=VALUE``.
        files: ``config_name`` and ``config_dir`` of ``compose_config``.

    Raises:
        ConfigError: settings that cannot be used.
    """
    from omegaconf import OmegaConf

    from nemo_llm_feedback.core.config.compose import compose_config

    groups = [f"objective={flags['objective']}"] if "objective" in flags else []
    keys = keys_of(flags)
    if "llm.device" in keys:
        groups.append("trainer=cpu" if keys["llm.device"] == "cpu" else "trainer=gpu")
    cfg = compose_config([*flags.get("overrides", ()), *overrides, *groups], **files)
    for key, value in keys.items():
        OmegaConf.update(cfg, key, _literal(value))
    return cfg


def _literal(value: Any) -> Any:
    """A flag's value as it is, where ``${`` is no reference to another key."""
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """What judges hypotheses; None leaves the value of the configuration.

    Attributes:
        llm: folder, hub id or GGUF file of the causal LM
        quantization: quantisation of the LLM
        description: completes 'a transcript of …', e.g. 'an order at a coffee shop'
        terms: terms that may occur
        terms_file: terms that may occur: one per line, or JSON
        alpha: weight of the LLM; default: measured, so that its scores spread three times as far as the recogniser's
        beta: bonus per word, in nats; default: 2·alpha, or 0 with a reward that does not fall with the length
        overrides: settings as `adapt` takes them, e.g. reward=entity reward.settings.weight=3
    """

    llm: str | None = None
    quantization: Literal["nf4", "int8", "none"] | None = None
    description: str | None = None
    terms: tuple[str, ...] = ()
    terms_file: TermsFile = None
    alpha: float | None = None
    beta: float | None = None
    overrides: Annotated[tuple[str, ...], Parameter(name="--set")] = ()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """The settings of `adapt` that are given most often; every other one, and these too, as KEY=VALUE.

    Attributes:
        base: .nemo file or pretrained name
        manifest: NeMo manifests; rows without text are learned from feedback
        validation: labelled manifests, scored before and after
        output: the adapted .nemo; default: in the run's folder
        objective: distill, mwer, grpo, gspo, dpo, reinforce or self_training
        max_steps: optimizer steps
        samples: hypotheses that are sampled from the model
        head: head of a hybrid that learns
        device: where it is trained
        seed: seed of the run, or of the first one
        runs: 3: three runs, and the mean of their weights
        resume: auto goes on with an unfinished run of the same settings
    """

    base: Annotated[str | None, Parameter(name=("--base", "--model", "--model-path", "--pretrained-name"))] = None
    manifest: Annotated[tuple[str, ...], Manifest] = ()
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    validation: tuple[str, ...] = ()
    output: Annotated[str | None, Output] = None
    objective: str | None = None
    max_steps: int | None = None
    samples: int | None = None
    head: HeadName | None = None
    device: Device | None = None
    seed: int | None = None
    runs: int | None = None
    resume: Literal["auto", "never"] | None = None


@Parameter(name="*", group=_RESCORING)
@dataclass(frozen=True, kw_only=True)
class RescoringFlags:
    """What rescoring is made of beside its judge.

    Attributes:
        rescore: choose among the N-best with an LLM
        no_context: allow utterances without any context
        beam_size: hypotheses of the first pass
        boosted: more hypotheses from a beam boosted on the terms
        boosting_weight: weight of the terms in that beam
        term_swap: more hypotheses with terms swapped in
    """

    rescore: bool = False
    no_context: bool = False
    beam_size: int | None = None
    boosted: int | None = None
    boosting_weight: float | None = None
    term_swap: int | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ScoringFlags:
    """How transcripts are scored.

    Attributes:
        normalizer: text normalisation of reference and transcript
        description: the domain in words, for the report
        terms: terms whose false alarms are counted
        entities_key: manifest key of the entities
        missing_entities: what to do with entities that their reference lacks
        group_by: manifest keys, e.g. speaker domain: a table per value
        samples: bootstrap resamples
        seed: seed of the bootstrap
    """

    normalizer: Literal["none", "lower", "basic"] = "basic"
    description: Annotated[str, Parameter(name=("--description", "--context"))] = ""
    terms: tuple[str, ...] = ()
    terms_file: TermsFile = None
    entities_key: str = "entities"
    missing_entities: Literal["error", "skip"] = "error"
    group_by: tuple[str, ...] = ()
    samples: Annotated[PositiveInt, Parameter(name="--resamples")] = 2000
    seed: NonNegativeInt = 0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Segmenting:
    """How recordings are cut, in seconds.

    Attributes:
        min_duration: shorter segments are left out
        max_duration: longer ones are split at their longest silences
        merge_gap: speech with less silence between is one segment, as long as it stays under the maximum
        padding: audio kept on both sides of speech, half the silence at most
        threshold: speech probability from which a frame is speech, 0 to 1
    """

    min_duration: float = 1.0
    max_duration: float = 20.0
    merge_gap: float = 0.5
    padding: float = 0.2
    threshold: float = 0.5

    def validate(self) -> list[str]:
        """Returns every fault as a sentence."""
        faults = [f"--{k.replace('_', '-')} {v}: not a number." for k, v in vars(self).items() if not math.isfinite(v)]
        if not 0 < self.min_duration < self.max_duration:
            faults.append(
                f"--min-duration and --max-duration must be 0 < min < max, got {self.min_duration} and "
                f"{self.max_duration}."
            )
        if self.merge_gap < 0 or self.padding < 0:
            faults.append(f"--merge-gap and --padding must be ≥ 0, got {self.merge_gap} and {self.padding}.")
        if self.padding * 2 >= self.max_duration - 0.5:
            faults.append(f"--padding {self.padding} leaves no room for speech in --max-duration {self.max_duration}.")
        if not 0 < self.threshold < 1:
            faults.append(f"--threshold must be in (0, 1), got {self.threshold}.")
        return faults


def rescoring_tree(choice: RescoringFlags, nbest: int, *, own_texts: bool) -> dict[str, Any] | None:
    """The rescoring settings that the flags name; None = the checkpoint's decoding.

    Args:
        choice: the flags.
        nbest: hypotheses to write per utterance.
        own_texts: for another model's manifest: only texts of this model, as it writes them.

    Raises:
        ConfigError: flags of the rescoring without ``--rescore``, or settings of other sections or with faults.
    """
    from nemo_llm_feedback.core.config import rescoring
    from nemo_llm_feedback.core.config.run import plain

    keys, overrides = keys_of(given(choice)), choice.judge.overrides
    if not choice.rescore and (overrides or any(key.startswith(("reward.", "llm.")) for key in keys)):
        raise ConfigError("--alpha, --beta, --llm, --quantization and --set have no effect without --rescore; add it.")
    if not (choice.rescore or choice.no_context or nbest or keys):
        return None
    sections, single = rescoring.SHARED_SECTIONS, rescoring.KEYS_OF_ADAPT
    named = dict.fromkeys(override.lstrip("+~").split("=")[0] for override in overrides)
    if strange := [key for key in named if key.split(".")[0] not in sections and key not in single.values()]:
        raise ConfigError(
            f"--set takes {', '.join((*sections, *single.values()))} here, not {', '.join(strange)}; the hypotheses "
            "have flags: --beam-size, --boosted, --boosting-weight and --term-swap."
        )
    composed = plain(compose(given(choice)))
    tree = {name: composed[name] for name in (*sections, *(key for key in keys if "." not in key))}
    for name, key in single.items():
        if key in named:
            section, _, inner = key.partition(".")
            tree[name] = composed[section][inner]
    tree["context"]["required"] &= not choice.no_context
    if not choice.rescore:
        tree["reward"] = None
    if nbest and not tree.get("nbest"):
        tree["nbest"] = max(nbest, rescoring.DEFAULT_NBEST)
    tree |= {"external": 0, "normalizer": "none"} if own_texts else {}
    rescoring.parse_rescoring_config(tree)  # refuses faults before NeMo is imported
    return tree
