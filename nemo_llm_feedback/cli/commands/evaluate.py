"""``nemo-llm-feedback evaluate``: score checkpoints or ready transcripts on a labelled manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_llm_feedback.cli.commands import chosen_device, quiet_nemo

HELP = "score checkpoints or ready transcripts on a labelled manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help=".nemo files; the first system is the base of the comparison")
    add("--manifest", help="NeMo manifest with text and, optionally, entities and context")
    add("--predictions", nargs="+", default=[], metavar="FILE", help="JSON Lines with audio_filepath and pred_text")
    add("--context", "--description", dest="description", default="", help="the domain in words, for the report")
    add("--terms", nargs="+", default=[], metavar="TERM", help="terms whose false alarms are counted")
    add("--terms-file", help="the same from a file: one a line, a JSON list, or a JSON object of lists")
    add("--head", default="auto", choices=("auto", "ctc", "transducer"))
    add("--batch-size", type=int, default=16)
    add("--cuda", type=int, help="number of the GPU, −1 = CPU (default: GPU 0 if there is one)")
    add("--normalizer", default="basic", choices=("none", "lower", "basic"), help="of both sides; default: basic")
    add("--oracle", type=int, default=0, metavar="N", help="also the oracle WER of each model's N-best")
    add("--group-by", nargs="+", default=[], metavar="KEY", help="manifest keys, e.g. speaker domain: a table a value")
    add("--entities-key", default="entities", metavar="KEY", help="manifest key of the entities")
    add("--missing-entities", default="error", choices=("error", "skip"), help="entities not in their reference")
    add("--b-wer", nargs="?", const="entities", metavar="KEY", help="also B-WER; KEY holds each utterance's word list")
    add("--samples", type=int, default=2000, help="bootstrap resamples")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--json", metavar="FILE", help="write the numbers here too")
    add("--report", metavar="FILE.html", help="write the report here")
    add("--no-audio", action="store_true", help="no audio in the report")


def run(options: argparse.Namespace) -> int:
    """Prints the tables; writes the numbers and the report where asked to."""
    import json

    from nemo_llm_feedback.cli.jobs.evaluate import evaluate, evaluation_json, evaluation_text, make_scoring

    scoring = make_scoring(
        normalizer=options.normalizer,
        description=options.description,
        terms=options.terms,
        terms_file=options.terms_file,
        entities_key=options.entities_key,
        bias_key=options.b_wer,
        group_by=tuple(options.group_by),
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
        text = json.dumps(evaluation_json(evaluation), indent=2, ensure_ascii=False)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.report:
        from nemo_llm_feedback.evaluation.report import evaluation_report, write_report

        report = evaluation_report(evaluation.comparison, left_out=evaluation.left_out)
        print(f"\nreport: {write_report(report, options.report, audio=not options.no_audio)}")
    return 0
