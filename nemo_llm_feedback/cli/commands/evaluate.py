"""``nemo-llm-feedback evaluate``: score checkpoints or ready transcripts on a labelled manifest."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from nemo_llm_feedback.cli.commands import chosen_device, quiet_nemo
from nemo_llm_feedback.cli.options import Cuda, HeadName, JsonFile, NoAudio, TermsFile


@Parameter(name="*")
@dataclass(frozen=True)
class ScoringFlags:
    """How transcripts are scored.

    Attributes:
        normalizer: of both sides
        description: the domain in words, for the report
        terms: terms whose false alarms are counted
        entities_key: manifest key of the entities
        missing_entities: what to do with entities that their reference lacks
        group_by: manifest keys, e.g. speaker domain: a table per value
        samples: bootstrap resamples
        seed: of the bootstrap
    """

    _: KW_ONLY
    normalizer: Literal["none", "lower", "basic"] = "basic"
    description: Annotated[str, Parameter(name=("--description", "--context"))] = ""
    terms: tuple[str, ...] = ()
    terms_file: TermsFile = None
    entities_key: str = "entities"
    missing_entities: Literal["error", "skip"] = "error"
    group_by: tuple[str, ...] = ()
    samples: int = 2000
    seed: int = 0


@Parameter(name="*")
@dataclass(frozen=True)
class EvaluateOptions:
    """The flags of the command.

    Attributes:
        models: .nemo files; the first system is the base of the comparison
        manifest: NeMo manifest with text and, optionally, entities and context
        predictions: JSON Lines with audio_filepath and pred_text
        head: of a hybrid model
        batch_size: utterances per batch of the recogniser
        oracle: also the oracle WER of each model's N-best, of so many hypotheses
        b_wer: also B-WER; the value is the manifest key of each utterance's word list (entities if left out)
        report: write the report here, as HTML
    """

    models: tuple[str, ...] = ()
    _: KW_ONLY
    manifest: str | None = None
    predictions: tuple[str, ...] = ()
    head: HeadName = "auto"
    batch_size: int = 16
    cuda: Cuda = None
    oracle: int = 0
    scoring: ScoringFlags = field(default_factory=ScoringFlags)
    b_wer: bool | str = False
    json: JsonFile = None
    report: str | None = None
    no_audio: NoAudio = False


def run(options: EvaluateOptions = EvaluateOptions()) -> int:
    """Scores checkpoints or ready transcripts on a labelled manifest."""
    from nemo_llm_feedback.cli.jobs.evaluate import evaluate, evaluation_record, evaluation_text, make_scoring
    from nemo_llm_feedback.evaluation.records import write_record

    bias_key = "entities" if options.b_wer is True else options.b_wer or None
    scoring = make_scoring(**vars(options.scoring), bias_key=bias_key)
    device = "cpu"
    if options.models:
        quiet_nemo()
        device = chosen_device(options.cuda)
    evaluation = evaluate(
        options.models,
        manifest=options.manifest,
        predictions=options.predictions,
        scoring=scoring,
        head=options.head,
        batch_size=options.batch_size,
        oracle=options.oracle,
        device=device,
    )
    print(evaluation_text(evaluation))
    if options.json:
        write_record(options.json, evaluation_record(evaluation))
    if options.report:
        from nemo_llm_feedback.evaluation.report import evaluation_report, write_report

        report = evaluation_report(evaluation.comparison, left_out=evaluation.left_out)
        print(f"\nreport: {write_report(report, options.report, audio=not options.no_audio)}")
    return 0
