"""``nemo-llm-feedback evaluate``: score checkpoints or ready transcripts on a labelled manifest."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from nemo_llm_feedback.cli.commands import chosen_device, quiet_nemo
from nemo_llm_feedback.cli.options import Cuda, HeadName, JsonFile, NoAudio, TermsFile


@Parameter(name="*")
@dataclass(frozen=True)
class EvaluateOptions:
    """The flags of the command.

    Attributes:
        models: .nemo files; the first system is the base of the comparison
        manifest: NeMo manifest with text and, optionally, entities and context
        predictions: JSON Lines with audio_filepath and pred_text
        description: the domain in words, for the report
        terms: terms whose false alarms are counted
        head: of a hybrid model
        batch_size: utterances per batch of the recogniser
        normalizer: of both sides
        oracle: also the oracle WER of each model's N-best, of so many hypotheses
        group_by: manifest keys, e.g. speaker domain: a table per value
        entities_key: manifest key of the entities
        missing_entities: what to do with entities that their reference lacks
        b_wer: also B-WER; the value is the manifest key of each utterance's word list (entities if left out)
        samples: bootstrap resamples
        seed: of the bootstrap
        report: write the report here, as HTML
    """

    models: tuple[str, ...] = ()
    _: KW_ONLY
    manifest: str | None = None
    predictions: tuple[str, ...] = ()
    description: Annotated[str, Parameter(name=("--description", "--context"))] = ""
    terms: tuple[str, ...] = ()
    terms_file: TermsFile = None
    head: HeadName = "auto"
    batch_size: int = 16
    cuda: Cuda = None
    normalizer: Literal["none", "lower", "basic"] = "basic"
    oracle: int = 0
    group_by: tuple[str, ...] = ()
    entities_key: str = "entities"
    missing_entities: Literal["error", "skip"] = "error"
    b_wer: bool | str = False
    samples: int = 2000
    seed: int = 0
    json: JsonFile = None
    report: str | None = None
    no_audio: NoAudio = False


def run(options: EvaluateOptions = EvaluateOptions()) -> int:
    """Scores checkpoints or ready transcripts on a labelled manifest."""
    from nemo_llm_feedback.cli.jobs.evaluate import evaluate, evaluation_record, evaluation_text, make_scoring
    from nemo_llm_feedback.evaluation.records import write_record

    scoring = make_scoring(
        normalizer=options.normalizer,
        description=options.description,
        terms=options.terms,
        terms_file=options.terms_file,
        entities_key=options.entities_key,
        bias_key="entities" if options.b_wer is True else options.b_wer or None,
        group_by=options.group_by,
        missing_entities=options.missing_entities,
        samples=options.samples,
        seed=options.seed,
    )
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
