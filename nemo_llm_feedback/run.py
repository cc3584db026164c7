"""Runs a script of NeMo's, or of yours, in which every restored ASR model rescores with an LLM:

    python -m nemo_llm_feedback.run --rescoring rescoring.yaml transcribe_speech.py model_path=… audio_dir=…

The script sees its own arguments and stays as it is. ``conf/rescoring.yaml`` shows the settings. The settings are
yours, so a dotted path as ``reward.name`` is imported; a checkpoint can name none.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_llm_feedback.errors import ConfigError, FeedbackError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script.

    Args:
        argv: arguments without the program's name; the process's own if None.

    Returns:
        0, or 1 after an error of the user's input; what the script itself raises passes through.
    """
    parser = argparse.ArgumentParser(prog="python -m nemo_llm_feedback.run", description=__doc__.splitlines()[0])
    parser.add_argument("--rescoring", required=True, metavar="FILE", help="settings (conf/rescoring.yaml)")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="of the script")
    options = parser.parse_args(argv)
    try:
        from nemo_llm_feedback.config.rescoring import read_rescoring_config

        settings = read_rescoring_config(options.rescoring)
        if not Path(options.script).is_file():
            raise ConfigError(f"{options.script}: no such script.")
        from nemo_llm_feedback.rescoring import install, uninstall
    except FeedbackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    install(settings)
    before, path = sys.argv, list(sys.path)
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, str(Path(options.script).absolute().parent))
    try:
        runpy.run_path(options.script, run_name="__main__")
    except FeedbackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        sys.argv, sys.path[:] = before, path
        uninstall()
    return 0


if __name__ == "__main__":
    sys.exit(main())
