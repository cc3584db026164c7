"""``nemo-llm-feedback report``: write the report of a run again."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from cyclopts import Parameter

from nemo_llm_feedback.cli.options import NoAudio


@Parameter(name="*")
@dataclass(frozen=True)
class ReportOptions:
    """The flags of the command.

    Attributes:
        run_dir: folder of an adapt run; of one that goes on, its curves are shown
        output: the page to write; default: report.html in the folder
    """

    run_dir: str
    _: KW_ONLY
    output: str | None = None
    no_audio: NoAudio = False


def run(options: ReportOptions) -> int:
    """Writes the report of a run again."""
    from nemo_llm_feedback.cli.jobs.report import report

    print(report(options.run_dir, output=options.output, audio=not options.no_audio))
    return 0
