"""``make gpu-check`` on a CPU, and the list of wheels for a machine without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card: make gpu-check")
def test_the_check_runs_on_a_cpu_and_writes_its_numbers(tmp_path: Path) -> None:
    command = [
        sys.executable,
        SCRIPTS / "gpu_check.py",
        "--out",
        tmp_path,
        "--skip",
        "tests",
    ]  # these run by themselves
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["failures"] == []
    assert {len(curve) for curves in found["curve"]["curves"].values() for curve in curves.values()} == {30}
    names = ["RNN-T of 110 M", "RNN-T of 110 M, CUDA graphs", "RNN-T of 110 M, score_ahead", "TDT of 0.6 B"]
    assert list(found["profile"]) == names
    # There the next batch is proposed in the kept step; the whole remains.
    ahead, inline = (
        sum(steps["launches"] for steps in found["profile"][name].values()) for name in (names[2], names[0])
    )
    assert 0.9 * inline < ahead < 1.1 * inline
    for name in (names[0], names[1], names[3]):
        refresh, kept = found["profile"][name]["refresh"], found["profile"][name]["kept"]
        assert refresh["seconds"] > kept["seconds"] > 0
        assert refresh["launches"] > 2 * kept["launches"] > 0
        assert refresh["syncs"] > kept["syncs"] > 0
        assert min(kept["peak_mb"], kept["real_time_factor"]) > 0
        assert kept["members"] > 4  # the random model writes something
    assert "| TDT of 0.6 B | kept |" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.slow
def test_of_the_tools_for_tests_the_cuda_tests_need_pytest_alone() -> None:
    """`pip install '.[cuda]'` brings none of them, `make gpu-check` brings pytest."""
    ours = ("hypothesis", "nbclient", "nbformat", "pytest_cov", "xdist")
    code = f"import sys; sys.modules.update(dict.fromkeys({ours})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--collect-only", "-p", "no:cacheprovider", "tests/asr/test_cuda.py"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_a_failure_ends_with_1_and_is_written_down(tmp_path: Path) -> None:
    broken = "import sys, gpu_check; gpu_check.TOLERANCE = gpu_check.LIMIT = -1; sys.exit(gpu_check.main())"
    command = [sys.executable, "-c", broken, "--out", tmp_path, "--skip", "tests", "profile"]
    run = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True)
    assert run.returncode == 1
    differ, late = json.loads((tmp_path / "gpu_check.json").read_text())["failures"]
    assert "the curves differ" in differ
    assert "more than -1 s" in late


def test_of_bitsandbytes_the_library_for_that_cuda_is_carried_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from offline_wheels import keep_cuda

    wheel, facts = tmp_path / "bitsandbytes-1.0-py3-none-any.whl", "bitsandbytes-1.0.dist-info"
    libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda126", "cuda130", "rocm70")]
    files = dict.fromkeys(libraries, "code") | {"bitsandbytes/__init__.py": "found = 1\n"}
    files |= {f"{facts}/METADATA": "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\n"}
    files |= {f"{facts}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = "".join(f"{name},,\n" for name in [*files, f"{facts}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (files | {f"{facts}/RECORD": record}).items():
            archive.writestr(name, content)
    with pytest.raises(SystemExit, match="no library for --cuda 118, only cpu, cuda126, cuda130, rocm70"):
        keep_cuda(wheel, "118")
    keep_cuda(wheel, "130")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(command, check=True, capture_output=True)
    found = sorted(path.name for path in (tmp_path / "site" / "bitsandbytes").glob("*.so"))
    assert found == ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"]


def test_wheels_are_those_that_the_other_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from offline_wheels import needed

    metadata = {
        "": {"requires_dist": ["a[x]>=1", "torch", "b>=2", "c; python_version < '3'"]},
        "a": {"version": "1.5", "requires_dist": ["d", "e; extra == 'x'", "f; extra == 'y'", "wandb"]},
        "b": {"version": "2.1"},
        **{name: {"version": "3"} for name in ("c", "d", "e", "f", "torch", "wandb")},
    }
    assert set(needed(metadata, {})) == {"a==1.5", "b==2.1", "d==3", "e==3"}
    assert set(needed(metadata, {"b": "1.9", "d": "0.1"})) == {"a==1.5", "b==2.1", "e==3"}  # b is too old there
