"""``adapt runs=3``: several seeds, each a run of its own that is kept, and the mean of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import arguments, weights
from helpers.tiny import write_manifest
from omegaconf import OmegaConf

from nemo_llm_feedback.cli.jobs import adapt as job
from nemo_llm_feedback.cli.jobs.devices import one_device
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ConfigError


@pytest.mark.slow
def test_the_mean_of_two_seeds_is_exported_and_finished_runs_are_taken_as_they_are(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest(tmp_path / "pool.json", [None] * 6)
    dev = write_manifest(tmp_path / "dev.json", ["a latte", "mocha"], entities=[["latte"], ["mocha"]])
    more = ("trainer.max_steps=1", "runs=2", "seed=5", f"model.validation_ds.manifest_filepath={dev}")
    command = arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", *more)
    trained = []
    adapt = job.adapt

    def stops_before_the_second(cfg: Any, **judge: Any) -> Any:
        if cfg.seed == 6 and not trained:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(cfg.seed) if trained else None
        return adapt(cfg, **judge)

    monkeypatch.setattr(job, "adapt", stops_before_the_second)
    with pytest.raises(SystemExit, match="130"):
        main(["adapt", *command])
    assert main(["adapt", *command]) == 0
    assert trained == ["stopped", 6]  # the first run was finished

    mean = tmp_path / "runs" / "adapted_mean.nemo"
    each = [next((tmp_path / "runs" / f"adapted_seed{seed}").rglob("*.nemo")) for seed in (5, 6)]
    first, second, got = weights(each[0]), weights(each[1]), weights(mean)
    assert any(not torch.equal(first[name], second[name]) for name in got)
    for name, value in got.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    text = capsys.readouterr().out
    assert "adapted_seed5/version_0" in text
    assert "adapted_seed6/version_0" in text
    assert "dev (2 utterances):" in text
    assert f"mean of 2 runs: {mean}" in text
    card = mean.with_suffix(".md").read_text()
    assert "dev" in card


def test_several_runs_are_refused_where_they_cannot_work(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    needed = [f"init_from_nemo_model={nemo_file('ctc_bpe')}", "llm.model=a/b", "context.description=x", "runs=3"]
    needed += ["model.train_ds.manifest_filepath=m.json"]
    with pytest.raises(ConfigError, match=r"runs=3 trains on one device"):
        job.adapt_runs(compose_config([*needed, "trainer.devices=2"]))
    base = tmp_path / "adapted_mean.nemo"
    base.write_bytes(Path(nemo_file("ctc_bpe")).read_bytes())
    manifest = write_manifest(tmp_path / "pool.json", [None] * 3)
    again = arguments(base, manifest, tiny_llm, tmp_path, "runs=3")
    for more, what in ((), "the base checkpoint"), ((f"output={manifest}",), str(manifest)):
        with pytest.raises(ConfigError, match=f"is {what}, which would be lost"):
            job.adapt_runs(compose_config([*again, *more]))
    assert all(map(one_device, (1, "1", [2], OmegaConf.create([2]))))
    assert not any(map(one_device, (2, -1, "auto", [0, 1], OmegaConf.create([0, 1]))))
    with pytest.raises(ConfigError, match=r"is a folder: name the file"):  # one run: tests/cli/test_run_folder.py
        job.adapt_runs(compose_config([*needed, f"output={tmp_path}", f"exp_manager.exp_dir={tmp_path / 'runs'}"]))
