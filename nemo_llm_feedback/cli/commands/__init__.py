"""The faces of the commands: flags and the call of the job. Nothing heavy is imported before a job runs.

Every module here but this one is a command: a dataclass of its flags (shared ones stand in ``cli.options``), and
``run``, which takes it and returns the exit status; the first line of ``run``'s docstring is the command's help.
"""

from __future__ import annotations

from nemo_llm_feedback.core.errors import ConfigError

# In the order in which a user meets them.
NAMES = ("prepare", "score", "transcribe", "evaluate", "report", "runs", "export")


def quiet_nemo() -> None:
    """Short commands show their result, not NeMo's notes on restoring a model."""
    from nemo.utils import logging

    logging.setLevel(logging.ERROR)


def chosen_device(number: int | None) -> str:
    """The device of the flag ``--cuda``: a GPU by its number, −1 the CPU, None GPU 0 if there is one.

    Raises:
        ConfigError: there is no such GPU.
    """
    import torch

    count = torch.cuda.device_count()
    if number is None:
        number = 0 if count else -1
    if number >= count:
        raise ConfigError(f"--cuda {number}: {count} GPU(s) here; give a smaller number, or -1 for the CPU.")
    return f"cuda:{number}" if number >= 0 else "cpu"
