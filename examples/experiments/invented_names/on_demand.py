"""What the experiments with invented names need and the repository does not hold: made where it is missing.

    python examples/experiments/invented_names/on_demand.py {terms,data,lm,base} … [--shared ../shared/data]

Speech (`data`, `base`) needs flite. `lm` takes 12 minutes of one core, `base` about an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[3] / "shared" / "data"
WORK = HERE / "work"
COMMANDS = "slurp_lm=0.4 nlu_ed_commands=0.35 snips_commands=0.1 taskmaster4_coffee_user=0.03 common_voice=0.12"
VOICES = "kal16 kal16 kal16 slt kal16 kal16 kal16 awb kal16 slt kal16 awb"
STILL = ["--no-augment", "--freeze-subsampling"]


def terms(shared: Path = SHARED) -> Path:
    """The term list of the hospital, one term a line; needs no flite."""
    target = HERE / "data" / "terms.txt"
    if not target.is_file():
        run("make_data.py", "--terms-only", shared=shared)
    return target


def data(shared: Path = SHARED) -> Path:
    """The folder of the spoken sets."""
    last = HERE / "data" / "general.json"
    if not last.is_file():
        run("make_data.py", shared=shared)
    return last.parent


def lm(shared: Path = SHARED) -> Path:
    """The folder of the LM that makes a listed term likely."""
    if not (HERE / "lm").is_dir():
        terms(shared)
        start, made = _checkpoint(shared, "lm"), WORK / "lm_made"
        run("train_lm.py", "--start", start, "--updates", 700, "--out", made, shared=shared)
        made.rename(HERE / "lm")
    return HERE / "lm"


def base(shared: Path = SHARED) -> Path:
    """The CTC checkpoint that knows everyday speech in the voices of the sets, made in three runs (README.md)."""
    target = HERE / "base.nemo"
    if not target.is_file():
        data(shared)
        stages = [_checkpoint(shared, "ctc.nemo"), WORK / "stage1.nemo", WORK / "stage2.nemo", WORK / "stage3.nemo"]
        first, second, third = WORK / "base", WORK / "base2", WORK / "base3"
        more = ["--seed", 8, "--sentences", 8000, "--shares", *COMMANDS.split(), "--voices", *VOICES.split()]
        more += ["--also", first / "train.json"]
        for number, options in enumerate(
            (
                ["--work", first, "--steps", 600],
                ["--work", second, "--steps", 800, "--lr", 6e-4, *STILL],
                ["--work", third, "--steps", 1200, *STILL, *more],
            )
        ):
            if not stages[number + 1].is_file():
                made = WORK / "unfinished.nemo"
                run("finetune_base.py", "--base", stages[number], "--out", made, *options, shared=shared)
                made.rename(stages[number + 1])
        stages[-1].rename(target)
    return target


def run(script: str, *arguments: object, shared: Path) -> None:
    """Runs a script of this folder.

    Args:
        script: its file name.
        arguments: of its command line.
        shared: folder with `text/` and `source/`.

    Raises:
        SystemExit: the folder is missing, or the script failed and has said why.
    """
    if not (shared / "text").is_dir():
        raise SystemExit(f"{shared} has no text/: give the project's ../shared/data; another LLM is named by --llm")
    command = [sys.executable, HERE / script, *arguments, "--shared", shared]
    if subprocess.run([str(part) for part in command]).returncode:
        raise SystemExit(f"{script} failed, see above")


def _checkpoint(shared: Path, name: str) -> Path:
    path = shared.parent / "checkpoints" / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: training starts from it")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what is named and prints where it lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {make.__name__: make for make in (terms, data, lm, base)}
    parser.add_argument("names", nargs="+", choices=makers)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with text/ and source/")
    options = parser.parse_args(arguments)
    for name in options.names:
        print(makers[name](options.shared))


if __name__ == "__main__":
    main()
