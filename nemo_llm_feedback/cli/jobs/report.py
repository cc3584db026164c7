"""The report job: writes the page of a run again from its run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.run_folder import RUN_FILE, SETTINGS_FILE, STEPS_FILE
from nemo_llm_feedback.evaluation.records import check_writable
from nemo_llm_feedback.evaluation.report import load_report, unfinished_report, write_report
from nemo_llm_feedback.evaluation.report.data import DATA_NAME


def report(run_dir: str | Path, *, output: str | Path | None = None, audio: bool = True) -> Path:
    """Writes ``report.html`` of a run folder; of a run that goes on, its curves so far.

    Args:
        run_dir: folder of an ``adapt`` run.
        output: where to write; ``report.html`` in that folder if None.
        audio: put audio into the page, unless the run had ``report_audio=false``.

    Returns:
        The path written.

    Raises:
        ManifestError: no such folder, or none of a run.
        ConfigError: ``output`` cannot be written, or is a file of the run that the page is made of.
    """
    folder = Path(run_dir).expanduser()
    if not folder.is_dir():
        raise ManifestError(f"{run_dir}: no such folder; give the folder of an `adapt` run.")
    read = (DATA_NAME, SETTINGS_FILE, STEPS_FILE, RUN_FILE)
    target = check_writable(output or folder / "report.html", inputs=[folder / name for name in read])
    if (folder / SETTINGS_FILE).is_file():  # a run that was to hold no recordings has none in a later page, too
        settings = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        audio = audio and bool(settings.get("report_audio", True))
    if (folder / DATA_NAME).is_file():
        # A run folder may have moved since.
        data = dataclasses.replace(load_report(folder), steps_file=str(folder / STEPS_FILE))
    else:
        data = unfinished_report(folder)
    return write_report(data, target, audio=audio)
