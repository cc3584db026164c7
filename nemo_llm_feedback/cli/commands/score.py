"""``nemo-llm-feedback score``: look at what the reward says of N-best lists, before training on it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_llm_feedback.cli.commands import quiet_nemo

if TYPE_CHECKING:
    from nemo_llm_feedback.cli.jobs.nbest_probe import LookOptions

HELP = "look at N-best lists with their rewards, before training on them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_look_arguments(parser, utterances=10)
    parser.add_argument("--show", type=int, metavar="N", help="utterances printed in full; default: all looked at")
    parser.add_argument("--members", type=int, default=8, help="members printed of each, best first (default: 8)")
    parser.add_argument("--json", metavar="FILE", help="write everything here too")


def add_look_arguments(parser: argparse.ArgumentParser, *, utterances: int) -> None:
    """Adds the flags that ``score``, ``calibrate`` and ``tune`` share."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".nemo file or pretrained name")
    parser.add_argument("--manifest", required=True, help="NeMo manifest, with text or without")
    parser.add_argument("--llm", metavar="FOLDER", help="folder or hub id of the causal LM")
    parser.add_argument("--description", help="completes 'a transcript of …', e.g. 'an order at a coffee shop'")
    parser.add_argument("--terms-file", help="terms that may occur: one a line, or JSON")
    parser.add_argument(
        "--utterances",
        type=int,
        default=utterances,
        metavar="K",
        help=f"rows looked at, spread evenly over the manifest; 0 = all (default: {utterances})",
    )
    parser.add_argument("--alpha", type=float, help="weight of the LLM (reward.alpha)")
    parser.add_argument("--beta", type=float, help="bonus a word (reward.beta)")
    parser.add_argument("--head", choices=("auto", "ctc", "transducer"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--cache", metavar="FILE", help="LLM scores of earlier runs to read, and to add to")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="any setting of `adapt`"
    )


def look_options(options: argparse.Namespace) -> LookOptions:
    """The shared flags as the jobs take them."""
    from nemo_llm_feedback.cli.jobs.nbest_probe import LookOptions

    return LookOptions(
        checkpoint=options.checkpoint,
        manifest=options.manifest,
        utterances=options.utterances,
        llm=options.llm,
        description=options.description,
        terms_file=options.terms_file,
        alpha=options.alpha,
        beta=options.beta,
        head=options.head,
        batch_size=options.batch_size,
        cache=options.cache,
        overrides=tuple(options.set),
    )


def run(options: argparse.Namespace) -> int:
    """Prints N-best lists and statistics."""
    from nemo_llm_feedback.cli.jobs.score import report_json, report_text, score

    quiet_nemo()
    report = score(look_options(options))
    show = len(report.groups) if options.show is None else options.show
    print(report_text(report, show=show, members=options.members))
    if options.json:
        Path(options.json).write_text(json.dumps(report_json(report), indent=1) + "\n", encoding="utf-8")
    return 0
