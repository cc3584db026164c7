"""``nemo-llm-feedback runs``: the runs of a folder with their settings and results."""

from __future__ import annotations

import argparse

HELP = "list the runs of a folder with their settings and results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("folder", metavar="DIR", help="exp_manager.exp_dir of the runs, or a folder above")
    parser.add_argument("--json", action="store_true", help="as a JSON list")


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    from nemo_llm_feedback.cli.jobs.runs import list_runs, runs_json, runs_table

    runs = list_runs(options.folder)
    print(runs_json(runs) if options.json else runs_table(runs))
    return 0
