"""``nemo-llm-feedback calibrate``: compare the 4-bit LLM with the full one on the same hypotheses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_llm_feedback.cli.commands import quiet_nemo
from nemo_llm_feedback.cli.commands.score import add_look_arguments, look_options

HELP = "compare the 4-bit LLM with the full one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_look_arguments(parser, utterances=50)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the full LLM"
    )
    parser.add_argument("--show", type=int, default=5, metavar="N", help="changed choices printed (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write everything here too")


def run(options: argparse.Namespace) -> int:
    """Prints the comparison."""
    from nemo_llm_feedback.cli.jobs.calibrate import calibrate, calibration_json, calibration_text
    from nemo_llm_feedback.cli.jobs.score import finite

    quiet_nemo()
    found = calibrate(look_options(options), dtype=options.dtype)
    print(calibration_text(found, show=options.show))
    if options.json:
        Path(options.json).write_text(json.dumps(finite(calibration_json(found)), indent=1) + "\n", encoding="utf-8")
    return 0
