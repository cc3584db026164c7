"""``nemo-llm-feedback tune``: pick reward.alpha and reward.beta, with transcripts or without."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_llm_feedback.cli.commands import quiet_nemo
from nemo_llm_feedback.cli.commands.score import add_look_arguments, look_options

HELP = "pick reward.alpha and reward.beta, with transcripts or without"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags; those left out keep the job's defaults."""
    add_look_arguments(parser, utterances=0)
    parser.add_argument("--alphas", type=float, nargs="+", metavar="A", help="grid of α")
    parser.add_argument("--betas", type=float, nargs="+", metavar="B", help="grid of β")
    parser.add_argument("--metric", choices=("wer", "ewer"), help="what to lower (default: wer)")
    parser.add_argument("--folds", type=int, metavar="K", help="of the cross-validation (default: 5)")
    parser.add_argument(
        "--factor", type=float, help="without transcripts: the LLM's say ÷ the recogniser's (default: 2)"
    )
    parser.add_argument("--no-text", action="store_true", help="do not use the manifest's transcripts")
    parser.add_argument(
        "--plot", default="tune.html", metavar="FILE", help=".html, .svg, .png or .pdf (default: tune.html)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything here too")


def run(options: argparse.Namespace) -> int:
    """Prints the grid and, last, the line to paste."""
    from nemo_llm_feedback.cli.jobs.score import finite
    from nemo_llm_feedback.cli.jobs.tune import TuneOptions, tune, tuned_json, tuned_text
    from nemo_llm_feedback.cli.jobs.tune_plot import check_plot_path, write_plot

    quiet_nemo()
    check_plot_path(options.plot)
    given = {name: getattr(options, name) for name in ("metric", "folds", "factor")}
    given |= {name: tuple(values) for name in ("alphas", "betas") if (values := getattr(options, name))}
    choice = TuneOptions(**{k: v for k, v in given.items() if v is not None}, use_text=not options.no_text)
    found = tune(look_options(options), choice)
    if found.grid is not None:
        write_plot(found, options.plot)
        print(f"plot: {options.plot}")
    print(tuned_text(found))
    if options.json:
        Path(options.json).write_text(json.dumps(finite(tuned_json(found)), indent=1) + "\n", encoding="utf-8")
    return 0
