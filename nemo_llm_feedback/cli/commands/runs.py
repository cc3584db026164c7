"""``nemo-llm-feedback runs``: the runs of a folder with their settings and results."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True)
class RunsOptions:
    """The flags of the command.

    Attributes:
        folder: exp_manager.exp_dir of the runs, or a folder above
        json: as a JSON list
    """

    folder: str
    _: KW_ONLY
    json: bool = False


def run(options: RunsOptions) -> int:
    """Lists the runs of a folder with their settings and results."""
    from nemo_llm_feedback.cli.jobs.runs import list_runs, runs_text
    from nemo_llm_feedback.evaluation.records import to_json

    runs = list_runs(options.folder)
    print(to_json(runs) if options.json else runs_text(runs))
    return 0
