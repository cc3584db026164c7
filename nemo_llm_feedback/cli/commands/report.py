"""``nemo-llm-feedback report``: write the report of a run again."""

from __future__ import annotations

import argparse

HELP = "write the report of a run again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of an adapt run; one that goes on shows its curves")
    parser.add_argument("--output", metavar="FILE.html", help="default: report.html in the folder")
    parser.add_argument("--no-audio", action="store_true", help="no audio in the page, for private data")


def run(options: argparse.Namespace) -> int:
    """Prints the path written."""
    from nemo_llm_feedback.cli.jobs.report import report

    print(report(options.run_dir, output=options.output, audio=not options.no_audio))
    return 0
