"""The command ``nemo-llm-feedback``. Neither it nor ``commands`` imports NeMo, so that ``--help`` takes 0.2 s."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from nemo_llm_feedback.cli.commands import COMMANDS
from nemo_llm_feedback.cli.options import KEYS, NEMO_NAMES, in_flags
from nemo_llm_feedback.core.console import be_verbose
from nemo_llm_feedback.core.errors import ConfigError, FeedbackError
from nemo_llm_feedback.core.version import __version__

_SETTING = re.compile(r"[+~]{0,2}[A-Za-z_][\w.@/]*=|~[A-Za-z_]")
# Hydra's flags that stand for one of ours.
_HYDRA = {"-cn": "--config-name", "-cd": "--config-dir", "-cp": "--config-dir", "--config-path": "--config-dir"}
_MULTIRUN = (
    "Hydra's multirun is not here: runs=3 trains with three seeds and exports the mean of their weights; for another "
    "sweep write a loop in the shell, as each value is a run of its own that goes on when it is interrupted."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        0; 1 after an error of the user's input, which is printed without a traceback; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # of streams of a caller's own
                stream.reconfigure(errors="replace")  # a sign that a locale lacks must not end hours of work
    if "--verbose" in given:
        given.remove("--verbose")
        be_verbose()
    command = given[0] if given else ""
    try:
        words = [command, *_adapt_words(given[1:])] if command == "adapt" else _flag_words(given)
        status = int(_app()(words, exit_on_error=False, print_error=False, result_action="return_value") or 0)
        print(end="", flush=True)  # here, as an error when the process ends could not be caught
        return status
    except CycloptsError as error:
        from nemo_llm_feedback.core.config.renames import renamed

        renames = [now for word in given if (now := renamed(word.partition("=")[0]))]
        print(f"error: {' '.join(renames) or error}", file=sys.stderr)
    except FeedbackError as error:
        flags = {key: f"--{name.replace('_', '-')}" for name, key in KEYS.items()}
        flags |= {"context.required=false": "--no-context"} if command == "transcribe" else {}
        if command == "adapt":  # it takes keys, too: flags are named where they were given
            flags = {key: flag for key, flag in flags.items() if any(word.split("=")[0] == flag for word in given)}
        print(f"error: {in_flags(str(error), flags)}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_has_left():
            raise  # of another pipe, such as a worker's
        # `| head` has seen enough; what was asked for in files is written
    return 1


def _reader_has_left() -> bool:
    """Whether nobody reads the standard output any more, which only a write shows; what is left of it goes nowhere."""
    stream = sys.stdout or io.StringIO()  # None of a process without one
    try:
        stream.write("\n")
        stream.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # of a stream of a caller's own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _app() -> App:
    app = App(
        name="nemo-llm-feedback",
        help="Adapts NeMo ASR checkpoints to unlabeled audio with an LLM's feedback. "
        "Every command takes --verbose: it shows the lines of NeMo, Lightning and transformers, too.",
        version=f"nemo-llm-feedback {__version__}",
        help_format="plaintext",
        default_parameter=Parameter(consume_multiple=True, negative=(), show_default=_shown),
    )
    for command in COMMANDS:
        usage = "Usage: nemo-llm-feedback adapt KEY=VALUE … [OPTIONS]" if command.__name__ == "adapt" else None
        app.command(command, name=command.__name__, usage=usage, help_epilogue=examples_text(command))
    return app


def examples_text(command: Callable[..., int]) -> str:
    """The examples that a command's docstring ends with, for the end of its help."""
    return "Examples:" + inspect.getdoc(command).partition("\nExamples:")[2]  # type: ignore[union-attr]


def _shown(default: object) -> Any:
    """A default as the help shows it; None, empty values and flags that are off are not shown."""
    return None if default is None or default is False or default in ((), "") else str(default)


def _adapt_words(words: Sequence[str]) -> list[str]:
    """The arguments of ``adapt``: settings first, which flags with several values would take; Hydra's flags as ours.

    Raises:
        ConfigError: a flag of Hydra's that has no counterpart.
    """
    if not words:
        return ["--help"]
    if "-m" in words or "--multirun" in words:
        raise ConfigError(_MULTIRUN)
    settings: list[str] = []
    flags: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before in ("-c", "--cfg"):
            if word != "job":
                raise ConfigError(f"{before} {word}: Hydra's settings play no part; --cfg job, or --show-config.")
            flags[-1] = "--show-config"
        elif _SETTING.match(word) and (not before.startswith("-") or before == "--show-config"):
            settings.append(word)
        else:
            flags.append(_HYDRA.get(word, word))
    return [*settings, *flags]


def _flag_words(words: Sequence[str]) -> list[str]:
    """The arguments of another command, with NeMo's ``model_path=FILE`` as ``--model-path=FILE``."""
    found: list[str] = []
    flag = ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("-") else flag
        name, equals, value = word.partition("=")
        known = equals and name in NEMO_NAMES and flag != "--set"
        found.append(f"--{name.replace('_', '-')}={value}" if known else word)
    return found


if __name__ == "__main__":
    sys.exit(main())
