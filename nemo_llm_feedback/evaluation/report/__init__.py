"""The report: one self-contained HTML file that shows what changed, with intervals, curves, diffs and audio."""

# ruff: noqa: F401  (what the other rooms import from here)

from nemo_llm_feedback.evaluation.report.data import (
    Change,
    ReportData,
    adaptation_report,
    evaluation_report,
    load_report,
    save_report,
    unfinished_report,
)
from nemo_llm_feedback.evaluation.report.page import write_report
