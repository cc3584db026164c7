"""``runs``: what a folder's runs were and gave, from their files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_llm_feedback.cli.jobs.adapt import AveragedRuns, averaged_text
from nemo_llm_feedback.cli.jobs.runs import list_runs
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.run_folder import FolderLock


def make_run(folder: Path, *, lr: float, steps: int, started: str, result: dict[str, Any] | None = None) -> Path:
    """The files of a run as ``adapt`` writes them."""
    folder.mkdir(parents=True)
    settings = {
        "model": {"optim": {"lr": lr}, "train_ds": {"manifest_filepath": "pool.json"}},
        "trainer": {"max_steps": 10},
        "objective": {"name": "distill"},
        "exp_manager": {"exp_dir": str(folder)},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    (folder / "run.json").write_text(json.dumps({"attempts": [{"started": started, "from": None}]}))
    lines = [{"step": n, "lr": lr} for n in range(1, steps + 1)] + [{"step": steps, "held_out/gain": steps / 10}]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "other_tool").mkdir()
    (tmp_path / "other_tool" / "settings.yaml").write_text("!theirs {}")
    scores = {"before": {"dev": {"wer": 20.0, "cer": 5.0}}, "after": {"dev": {"wer": 15.5}}, "nemo": "a.nemo"}
    scores |= {"learning_rate": 3e-4, "alpha": 1.4, "gain": 0.7, "kept_step": 8}
    make_run(tmp_path / "b" / "version_0", lr=1e-4, steps=10, started="2026-01-02", result=scores)
    make_run(tmp_path / "a" / "version_1", lr=1e-3, steps=4, started="2026-01-03")
    return tmp_path


def test_runs_fit_a_terminal_and_show_what_they_took_and_gave(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    head, rule, first, second, *details, hint = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "objective", "rate", "alpha", "gain", "kept", "step", "state"]
    assert set(rule) == {"-", " "}
    assert first.split() == ["b/version_0", "distill", "0.0003", "1.4", "+0.70", "8/10", "finished"]
    assert second.split() == ["a/version_1", "distill", "0.001", "+0.40", "4/10", "interrupted"]
    assert details == [
        "b/version_0: dev wer 20.00 → 15.50, model.optim.lr=0.0001",
        "a/version_1: model.optim.lr=0.001",
    ]
    assert "command is given again" in hint
    make_run(runs / "c" / "v", lr=1e-3, steps=4, started="2026-01-04")
    assert main(["runs", str(runs)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "optim.lr" in line] == details[:1]
    make_run(runs / "a_very_long_name_of_a_folder" / "version_7", lr=1e-3, steps=4, started="2026-01-04")
    assert main(["runs", str(runs)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_mean_says_which_of_its_runs_gained_nothing(tmp_path: Path) -> None:
    folders = []
    for seed, kept in ((1, 0), (2, 8)):
        result = {"kept_step": kept, "before": {}, "after": {}}
        folders.append(make_run(tmp_path / f"s{seed}" / "v", lr=1e-4, steps=8, started=f"0{seed}", result=result))
    text = averaged_text(AveragedRuns(tmp_path / "mean.nemo", tuple(folders), {}, {}))
    assert "s1/v gained nothing and kept the start: 1 of 2 parts of the mean are the base's weights" in text
    assert "s2/v gained" not in text


def test_runs_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in found] == ["finished", "interrupted"]
    assert found[0]["after"] == {"dev": {"wer": 15.5}}
    assert found[1]["settings"] == {"model.optim.lr": 0.001}
    assert found[1]["steps"] == 4


def test_a_run_whose_process_lives_is_running(runs: Path) -> None:
    lock = FolderLock(runs / "a" / "version_1")
    assert [run.state for run in list_runs(runs)] == ["finished", "running"]
    lock.release()
    assert [run.state for run in list_runs(runs)] == ["finished", "interrupted"]


def test_files_of_an_earlier_attempt_are_no_run_of_their_own(runs: Path) -> None:
    folder = runs / "a" / "version_1"
    (folder / "run_0").mkdir()
    (folder / "run_0" / "settings.yaml").write_text((folder / "settings.yaml").read_text())
    assert len(list_runs(runs)) == 2


def test_a_folder_without_runs_is_a_typed_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        list_runs(tmp_path)
    assert main(["runs", str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_runs_needs_neither_torch_nor_nemo(runs: Path) -> None:
    code = (
        "import sys; from nemo_llm_feedback.cli.main import main; main(['runs', sys.argv[1]]); "
        "assert not {'torch', 'nemo', 'lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(runs)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
