"""``nemo-llm-feedback transcribe``: transcribe audio, by an LLM's rescoring if asked for."""

from __future__ import annotations

import sys
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from cyclopts import Group, Parameter

from nemo_llm_feedback.cli.commands import chosen_device, quiet_nemo
from nemo_llm_feedback.cli.options import Cuda, JudgeOptions
from nemo_llm_feedback.core.errors import ConfigError

_RESCORING = Group("Rescoring", help="score = log p(text|audio) + alpha·log p(text|context) + beta·words")


@Parameter(name="*", group=_RESCORING)
@dataclass(frozen=True)
class RescoringFlags:
    """What rescoring is made of beside its judge.

    Attributes:
        rescore: choose among the N-best with an LLM
        rescoring: settings as YAML (conf/rescoring.yaml); flags win
        quantization: of the LLM
        no_context: allow utterances without any context
        beam_size: hypotheses of the first pass
        boosted: more hypotheses from a beam boosted on the terms
        boosting_weight: of that beam
        term_swap: more hypotheses with terms swapped in
    """

    _: KW_ONLY
    rescore: bool = False
    rescoring: str | None = None
    quantization: Literal["nf4", "int8", "none"] | None = None
    no_context: bool = False
    beam_size: int | None = None
    boosted: int | None = None
    boosting_weight: float | None = None
    term_swap: int | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


@Parameter(name="*")
@dataclass(frozen=True)
class TranscribeFlags:
    """The flags of the command.

    Attributes:
        model: .nemo file or pretrained name
        audio: audio files and folders
        dataset_manifest: a NeMo manifest instead of AUDIO
        audio_type: comma-separated suffixes to take from folders; default: all known
        output_filename: manifest to write; default: print the transcripts
        batch_size: utterances per batch
        decoder_type: head of a hybrid model
        timestamps: word and segment times, in seconds
        nbest: write so many hypotheses with all score parts
    """

    model: str
    audio: tuple[str, ...] = ()
    _: KW_ONLY
    dataset_manifest: str | None = None
    audio_type: str | None = None
    output_filename: str | None = None
    batch_size: int = 16
    decoder_type: Literal["rnnt", "ctc"] | None = None
    timestamps: bool = False
    cuda: Cuda = None
    nbest: int = 0
    choice: RescoringFlags = field(default_factory=RescoringFlags)


def run(options: TranscribeFlags) -> int:
    """Transcribes audio, with LLM rescoring if asked for."""
    from nemo_llm_feedback.core.config.rescoring import parse_rescoring_config

    if options.batch_size < 1 or options.nbest < 0:
        raise ConfigError("--batch-size must be at least 1 and --nbest at least 0.")
    tree = _settings(options)
    settings = parse_rescoring_config(tree) if tree is not None else None
    quiet_nemo()
    from nemo_llm_feedback.cli.jobs import transcribe as job

    types = options.audio_type.split(",") if options.audio_type else job.AUDIO_TYPES
    rows = job.find_rows(options.audio, manifest=options.dataset_manifest, audio_types=types)
    found = job.transcribe(
        options.model,
        rows,
        batch_size=options.batch_size,
        decoder_type=options.decoder_type,
        timestamps=options.timestamps,
        device=chosen_device(options.cuda),
        rescoring=settings,
    )
    if options.output_filename:
        job.write_manifest(options.output_filename, found, nbest=options.nbest)
    else:
        print(job.transcripts_text(found, nbest=options.nbest))
    written = f"; written to {options.output_filename}" if options.output_filename else ""
    print(job.summary(found, written=written), file=sys.stderr)
    return 1 if found.failures else 0


def _settings(options: TranscribeFlags) -> dict[str, Any] | None:
    """The rescoring settings that file and flags name; None = the checkpoint's own decoding.

    Raises:
        ConfigError: flags of the rescoring without ``--rescore``.
    """
    choice = options.choice
    beside = {
        "nbest": choice.beam_size,
        "boosted": choice.boosted,
        "boosting_weight": choice.boosting_weight,
        "term_swap": choice.term_swap,
        "llm.quantization": choice.quantization,
        "context.required": False if choice.no_context else None,
    }
    given = choice.judge.settings() | {key: value for key, value in beside.items() if value is not None}
    judged = choice.rescore or choice.rescoring is not None
    if not judged and (choice.judge.overrides or any(key.startswith(("reward.", "llm.")) for key in given)):
        raise ConfigError("--alpha, --beta, --llm, --quantization and --set have no effect without --rescore; add it.")
    if not judged and not options.nbest and not given:
        return None
    tree: dict[str, Any] = _start(choice) if judged else {"reward": None}
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        tree |= {section: {**(tree.get(section) or {}), name: value}} if section else {name: value}
    if options.nbest and not tree.get("nbest"):
        from nemo_llm_feedback.rescoring.strategies import DEFAULT_NBEST

        tree["nbest"] = max(options.nbest, DEFAULT_NBEST)
    return tree


def _start(choice: RescoringFlags) -> dict[str, Any]:
    """The settings of the file or of ``--set``, as plain mappings."""
    from omegaconf import OmegaConf

    from nemo_llm_feedback.core.config.compose import compose_config
    from nemo_llm_feedback.core.config.rescoring import SHARED_SECTIONS, read_yaml

    judge = choice.judge
    if not judge.overrides:
        return read_yaml(choice.rescoring) if choice.rescoring else {}
    if choice.rescoring:
        raise ConfigError("--set and --rescoring FILE both give the settings: write them into the file, or use --set.")
    named = list(dict.fromkeys(override.lstrip("+~").split("=")[0].split(".")[0] for override in judge.overrides))
    strange = [section for section in named if section not in SHARED_SECTIONS]
    if strange:
        raise ConfigError(
            f"--set takes {', '.join(SHARED_SECTIONS)} here, not {', '.join(strange)}; what else rescoring has "
            "to set has flags of its own, or stands in the file of --rescoring."
        )
    composed: Any = OmegaConf.to_container(compose_config(judge.overrides), resolve=True, throw_on_missing=False)
    return {section: composed[section] for section in named}
