"""Applies one mutant at a time to a copy of the package and requires its test to fail; prints a table.

    python tests/mutants/run.py                      # all; minutes
    python tests/mutants/run.py --only patience CTC  # those whose description holds one of these words
    python tests/mutants/run.py --jobs 4             # so many at a time

First the named tests must pass as they are. The exit status is 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("nemo_llm_feedback", "conf", "tests", "pyproject.toml", "setup.py")
_TOO_LONG = 600  # seconds; a mutant that hangs is noticed, too


def copy_of_the_code(folder: Path) -> Path:
    """What the named tests need, without what Python made of it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def failing(folder: Path, tests: Sequence[str]) -> bool:
    """Whether a test fails in this copy.

    Raises:
        RuntimeError: pytest could not run them.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts="]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        found = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TOO_LONG * len(tests),
        )
    except subprocess.TimeoutExpired:
        return True
    if found.returncode > 1:
        raise RuntimeError(
            f"pytest ended with status {found.returncode}:\n{found.stdout[-3000:]}{found.stderr[-2000:]}"
        )
    if found.returncode and len(tests) > 1:
        print(found.stdout[-3000:])
    return found.returncode == 1


def outcome(mutant: Mutant) -> str:
    """``killed`` or ``SURVIVED``, with the seconds that it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant_") as name:
        folder = copy_of_the_code(Path(name))
        path = folder / "nemo_llm_feedback" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise RuntimeError(
                f"{mutant.file} holds the text {mutant.old!r} {text.count(mutant.old)} times, not once."
            )
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        killed = failing(folder, [mutant.test])
    return f"{'killed' if killed else 'SURVIVED':9} {time.monotonic() - start:4.0f} s"


def main() -> int:
    """Runs the mutants that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of the descriptions")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if any(word in mutant.what for word in options.only)]
    tests = list(dict.fromkeys(mutant.test for mutant in chosen))
    print(f"{len(chosen)} mutants; first their {len(tests)} tests as they are …", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutant_") as name:
        if failing(copy_of_the_code(Path(name)), tests):
            raise SystemExit("a named test fails without a mutant: mend that first.")
    survived = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, found in zip(chosen, pool.map(outcome, chosen), strict=True):
            survived += "SURVIVED" in found
            print(f"{found}  {mutant.what}  ({mutant.test})", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} killed.")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
