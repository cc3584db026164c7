"""The report: one self-contained HTML file that shows what changed, with intervals, curves, diffs and audio."""

from nemo_llm_feedback.evaluation.report.collect import adaptation_report, evaluation_report, unfinished_report
from nemo_llm_feedback.evaluation.report.data import Change, ReportData, load_report, save_report
from nemo_llm_feedback.evaluation.report.page import write_report

__all__ = [
    "Change",
    "ReportData",
    "adaptation_report",
    "evaluation_report",
    "load_report",
    "save_report",
    "unfinished_report",
    "write_report",
]
