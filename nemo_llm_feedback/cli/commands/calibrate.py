"""``nemo-llm-feedback calibrate``: compare the 4-bit LLM with the full one on the same hypotheses."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from cyclopts import Parameter

from nemo_llm_feedback.cli.commands import quiet_nemo
from nemo_llm_feedback.cli.options import JsonFile, ProbeOptions
from nemo_llm_feedback.core.config.sections import ComputeDtype


@Parameter(name="*")
@dataclass(frozen=True)
class CalibrateOptions(ProbeOptions):
    """The flags of the command.

    Attributes:
        dtype: of the full LLM
        show: changed choices printed
    """

    _: KW_ONLY
    utterances: int = 50
    dtype: ComputeDtype = "auto"
    show: int = 5
    json: JsonFile = None


def run(options: CalibrateOptions) -> int:
    """Compares the 4-bit LLM with the full one."""
    from nemo_llm_feedback.cli.jobs.calibrate import calibrate, calibration_json, calibration_text
    from nemo_llm_feedback.cli.jobs.score import finite

    quiet_nemo()
    found = calibrate(options, dtype=options.dtype)
    print(calibration_text(found, show=options.show))
    if options.json:
        Path(options.json).write_text(json.dumps(finite(calibration_json(found)), indent=1) + "\n", encoding="utf-8")
    return 0
