"""The installation that README describes: pip resolves it, and the pinned versions are those that were tested."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = re.findall(r"^pip (install .+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def resolved(line: str, *options: str) -> dict[str, str]:
    """Name → version of what pip would install by a line of README; metadata only, no wheel is downloaded whole."""
    given = ["--dry-run", "--quiet", "--use-feature=fast-deps", "--report", "-", *options]
    run = subprocess.run(
        [sys.executable, "-m", "pip", *shlex.split(line), *given], cwd=ROOT, capture_output=True, text=True
    )
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError", run.stderr):
        pytest.skip(f"no package index answers, so README's line is not resolved: pip {line}")
    assert run.returncode == 0, run.stderr[-2000:]
    found = [item["metadata"] for item in json.loads(run.stdout)["install"]]
    return {re.sub("[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}


def test_the_gpu_constraints_pin_all_that_was_tested_on_a_cpu() -> None:
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert cuda == cpu | {"torch": cuda["torch"], "numba-cuda": cuda["numba-cuda"]}


@pytest.mark.slow
def test_the_gpu_line_resolves_from_the_package_index_alone() -> None:
    (line,) = (line for line in LINES if "constraints-cuda.txt" in line)
    assert "index" not in line
    found, pinned = resolved(line, "--ignore-installed"), pins("constraints-cuda.txt")
    assert found["torch"] == pinned["torch"]
    assert {"nvidia-cublas", "nvidia-nvvm", "numba-cuda", "cuda-python", "triton"} <= found.keys()
    assert found["cuda-python"].startswith("13.")
    assert found["cuda-toolkit"].startswith("13.")


@pytest.mark.slow
def test_the_cpu_line_leaves_the_cpu_build_of_torch_and_fetches_no_cuda() -> None:
    torch, package = (line for line in LINES if "constraints-cuda.txt" not in line)
    assert torch.endswith(f"/cpu torch=={pins('constraints.txt')['torch']}")
    found = resolved(package)  # here the build for CPUs is installed, as after the first line
    assert not {name for name in found if name == "torch" or name.startswith(("nvidia-", "triton", "numba-cuda"))}
