"""``nemo-llm-feedback tune``: pick reward.alpha and reward.beta, with transcripts or without."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from nemo_llm_feedback.cli.commands import quiet_nemo
from nemo_llm_feedback.cli.options import JsonFile, ProbeOptions


@Parameter(name="*")
@dataclass(frozen=True)
class TuneFlags(ProbeOptions):
    """The flags of the command; those left out keep the job's defaults.

    Attributes:
        alphas: grid of α
        betas: grid of β
        metric: what to lower (default: wer)
        folds: of the cross-validation (default: 5)
        factor: without transcripts: the LLM's share ÷ the recogniser's (default: 2)
        no_text: do not use the manifest's transcripts
        plot: .html, .svg, .png or .pdf
    """

    _: KW_ONLY
    utterances: int = 0
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    metric: Literal["wer", "ewer"] | None = None
    folds: int | None = None
    factor: float | None = None
    no_text: bool = False
    plot: str = "tune.html"
    json: JsonFile = None


def run(options: TuneFlags) -> int:
    """Picks reward.alpha and reward.beta, with transcripts or without."""
    from nemo_llm_feedback.cli.jobs.score import finite
    from nemo_llm_feedback.cli.jobs.tune import TuneOptions, tune, tuned_json, tuned_text
    from nemo_llm_feedback.cli.jobs.tune_plot import check_plot_path, write_plot

    quiet_nemo()
    check_plot_path(options.plot)
    given = {name: getattr(options, name) for name in ("metric", "folds", "factor")}
    given |= {name: values for name in ("alphas", "betas") if (values := getattr(options, name))}
    choice = TuneOptions(**{k: v for k, v in given.items() if v is not None}, use_text=not options.no_text)
    found = tune(options, choice)
    if found.grid is not None:
        write_plot(found, options.plot)
        print(f"plot: {options.plot}")
    print(tuned_text(found))
    if options.json:
        Path(options.json).write_text(json.dumps(finite(tuned_json(found)), indent=1) + "\n", encoding="utf-8")
    return 0
