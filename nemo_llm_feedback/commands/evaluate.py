"""``nemo-llm-feedback evaluate``: score checkpoints on a labelled manifest."""

from __future__ import annotations

import argparse

from nemo_llm_feedback.commands import quiet_nemo

HELP = "score checkpoints on a labelled manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help=".nemo files; the first is the base")
    parser.add_argument("--manifest", required=True, help="NeMo manifest with text and, optionally, entities")
    parser.add_argument("--terms-file", help="terms whose false alarms are counted")
    parser.add_argument("--head", default="auto", choices=("auto", "ctc", "transducer"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--normalizer", default="basic", choices=("none", "lower", "basic"))
    parser.add_argument("--oracle", type=int, default=0, metavar="N", help="also the oracle of the N-best of the base")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    from nemo_llm_feedback.jobs.evaluate import evaluate

    quiet_nemo()
    print(
        evaluate(
            options.models,
            manifest=options.manifest,
            terms_file=options.terms_file,
            head=options.head,
            batch_size=options.batch_size,
            normalizer=options.normalizer,
            oracle=options.oracle,
            json_file=options.json,
        )
    )
    return 0
