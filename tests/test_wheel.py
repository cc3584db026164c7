"""The wheel, installed into an environment of its own, has all that the command needs.

NeMo, torch and what else is heavy are not installed a second time: a ``.pth`` file lends the environment those of the
running one. The package itself comes from the wheel, since ``.pth`` files inside a lent folder are not read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny import write_manifest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "conf", "nemo_llm_feedback")
QUICK = ["trainer=cpu", "model.optim.lr=1e-4", "proposals.max_symbols=3", "guards.everyday=none"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = (source / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that has the wheel, and the heavy packages of this one."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def run(environment: Path, *words: str, cwd: Path) -> str:
    """The output of a command in the environment, without this checkout on its path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [environment / words[0], *words[1:]],
        cwd=cwd,
        env=variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_configurations_sentences_templates_and_says_who_made_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    shipped = [path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")]
    data = [
        path for folder in ("everyday", "templates") for path in (ROOT / "nemo_llm_feedback").rglob(f"{folder}/**/*")
    ]
    shipped_data = [path.relative_to(ROOT).as_posix() for path in data if path.is_file()]
    assert len(shipped) > 10
    assert len(shipped_data) > 60
    assert {f"nemo_llm_feedback/{name}" for name in shipped} | {*shipped_data, "nemo_llm_feedback/py.typed"} <= names
    assert "Author: nemo_llm_feedback developers" in metadata
    assert "License: Apache-2.0" in metadata
    assert "Keywords: speech recognition" in metadata


@pytest.mark.slow
def test_the_wheel_runs_help_and_adapts_where_there_is_no_checkout(
    environment: Path, nemo_file: Callable[[str], Path], tiny_llm: Path, tmp_path: Path
) -> None:
    place = run(
        environment, "python", "-c", "import nemo_llm_feedback; print(nemo_llm_feedback.__file__)", cwd=tmp_path
    )
    assert Path(place.strip()).is_relative_to(environment.parent)
    assert "adapt" in run(environment, "nemo-llm-feedback", "--help", cwd=tmp_path)
    write_manifest(tmp_path / "calls.json", [None] * 8)
    given = {"--base": nemo_file("ctc_bpe"), "--manifest": "calls.json", "--llm": tiny_llm, "--terms": "latte"}
    flags = [str(word) for pair in given.items() for word in pair]
    run(
        environment,
        "nemo-llm-feedback",
        "adapt",
        *QUICK,
        *flags,
        "--output",
        "out.nemo",
        "--max-steps",
        "2",
        cwd=tmp_path,
    )
    assert (tmp_path / "out.nemo").stat().st_size > 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text(encoding="utf-8"))["steps"] == 2
