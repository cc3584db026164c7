"""The faces of the commands: flags and the call of the job. Nothing heavy is imported before a job runs.

Every module here but this one is a command: ``HELP`` is its line in the list, ``add_arguments`` its flags, ``run`` the
call, which returns the exit status.
"""

from __future__ import annotations

# In the order in which a user meets them.
NAMES = ("prepare", "score", "calibrate", "tune", "transcribe", "evaluate", "report", "runs", "export")


def quiet_nemo() -> None:
    """Short commands show their result, not NeMo's notes on restoring a model."""
    from nemo.utils import logging

    logging.setLevel(logging.ERROR)
