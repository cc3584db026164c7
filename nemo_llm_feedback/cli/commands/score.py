"""``nemo-llm-feedback score``: N-best lists with their rewards, before training on them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

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
        compare_quantization: also judge by the LLM in this quantisation, and compare
        tune: pick reward.alpha and reward.beta: by WER where rows have text, else by the spread as adapt does
    """

    _: KW_ONLY
    show: int | None = None
    members: int = 8
    compare_quantization: Literal["nf4", "int8", "none"] | None = None
    tune: bool = False
    json: JsonFile = None


def run(options: ScoreOptions) -> int:
    """Shows N-best lists with their rewards; picks weights, compares quantisations."""
    from nemo_llm_feedback.cli.jobs.score import report_record, report_text, score
    from nemo_llm_feedback.evaluation.records import write_record

    quiet_nemo()
    report = score(options, compare_quantization_with=options.compare_quantization, tune=options.tune)
    show = len(report.rows) if options.show is None else options.show
    print(report_text(report, show=show, members=options.members))
    if options.json:
        write_record(options.json, report_record(report))
    return 0
