"""``nemo-llm-feedback prepare``: long recordings become an unlabeled manifest by voice activity."""

from __future__ import annotations

import argparse

HELP = "long recordings become an unlabeled manifest by voice activity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="folder of recordings, searched with its sub-folders, or one file")
    add("--out", required=True, metavar="MANIFEST", help="the manifest to write")
    add("--min-duration", type=float, default=1.0, metavar="S", help="shorter segments are left out (default: 1)")
    add("--max-duration", type=float, default=20.0, metavar="S", help="longer ones are split (default: 20)")
    add("--merge-gap", type=float, default=0.5, metavar="S", help="closer segments are joined (default: 0.5)")
    add("--padding", type=float, default=0.2, metavar="S", help="audio kept around speech (default: 0.2)")
    add("--threshold", type=float, default=0.5, help="speech probability, 0 to 1 (default: 0.5)")
    add("--preview", type=int, default=5, metavar="N", help="segments to show (default: 5)")


def run(options: argparse.Namespace) -> int:
    """Prints the totals and a preview."""
    from nemo_llm_feedback.cli.jobs.prepare import Segmenting, prepare, summary

    settings = Segmenting(
        min_duration=options.min_duration,
        max_duration=options.max_duration,
        merge_gap=options.merge_gap,
        padding=options.padding,
        threshold=options.threshold,
    )
    print(summary(prepare(options.folder, out=options.out, settings=settings), preview=options.preview))
    return 0
