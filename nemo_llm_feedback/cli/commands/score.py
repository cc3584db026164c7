"""``nemo-llm-feedback score``: N-best lists with their rewards, before training on them."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from cyclopts import Parameter

from nemo_llm_feedback.cli.commands import quiet_nemo
from nemo_llm_feedback.cli.options import JsonFile, ProbeOptions


@Parameter(name="*")
@dataclass(frozen=True)
class ScoreOptions(ProbeOptions):
    """The flags of the command.

    Attributes:
        show: utterances printed in full; default: all that are scored
        members: members printed per utterance, best first
    """

    _: KW_ONLY
    show: int | None = None
    members: int = 8
    json: JsonFile = None


def run(options: ScoreOptions) -> int:
    """Shows N-best lists with their rewards, before training on them."""
    from nemo_llm_feedback.cli.jobs.score import report_json, report_text, score

    quiet_nemo()
    report = score(options)
    show = len(report.groups) if options.show is None else options.show
    print(report_text(report, show=show, members=options.members))
    if options.json:
        Path(options.json).write_text(json.dumps(report_json(report), indent=1) + "\n", encoding="utf-8")
    return 0
