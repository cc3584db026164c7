"""``nemo-llm-feedback export``: turn a training checkpoint, or the average of several, into a plain .nemo."""

from __future__ import annotations

import argparse

from nemo_llm_feedback.cli.commands import quiet_nemo

HELP = "turn a training checkpoint, or the average of several, into a plain .nemo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="a Lightning .ckpt of a run, or a .nemo; several, of runs from one base: the mean of their weights",
    )
    parser.add_argument("--base", help=".nemo that the run started from; of a .ckpt, if it has moved since")
    parser.add_argument(
        "--base-share", type=float, default=0.0, help="how far the weights go back towards the base's: 0 to below 1"
    )
    parser.add_argument("--output", help="where to write; default: beside the checkpoint; needed for several")
    parser.add_argument(
        "--manifest", help="labelled rows: before/after for the model card, which is written beside it"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the path written."""
    from nemo_llm_feedback.cli.jobs.export import export

    quiet_nemo()
    files = {"base": options.base, "output": options.output, "manifest": options.manifest}
    print(export(options.checkpoint, base_share=options.base_share, **files))
    return 0
