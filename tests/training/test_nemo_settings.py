"""What NeMo, torch and Lightning refuse of their sections is a ConfigError before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.training.inputs import nemo_faults

NEEDED = ["llm.model=a/b", "context.description=x", "model.train_ds.manifest_filepath=a.json"]


def _tree(*overrides: str) -> Any:
    cfg = compose_config([*NEEDED, *overrides])
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)


def test_the_defaults_and_the_schedules_of_nemo_are_taken() -> None:
    assert nemo_faults(_tree()) == []
    assert nemo_faults(_tree("model.optim.sched=null")) == []
    assert nemo_faults(_tree("model.optim.name=sgd", "~model.optim.betas", "model.optim.lr=0.1")) == []
    for name in ("NoamAnnealing", "WarmupAnnealing", "InverseSquareRootAnnealing", "PolynomialDecayAnnealing"):
        more = ["model.optim.sched.d_model=16"] if name == "NoamAnnealing" else []
        assert nemo_faults(_tree(f"model.optim.sched.name={name}", *more)) == [], name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.optim.name=adamx", "model.optim.name=adamx is not known to NeMo; it knows sgd"),
        ("model.optim.name=sgd", "unexpected keyword argument 'betas'"),
        ("model.optim.betas=[1.5,0.9]", "Invalid beta parameter"),
        ("model.optim.betas=[0.9]", "model.optim cannot be used"),
        ("model.optim.colour=red", "unexpected keyword argument 'colour'"),
        ("model.optim.sched.name=Cosine", "model.optim.sched.name=Cosine is not known to NeMo"),
        ("model.optim.sched.colour=red", "model.optim.sched cannot be used"),
        ("exp_manager.colour=red", "exp_manager cannot be used: Key 'colour' not in 'ExpManagerConfig'"),
    ],
)
def test_what_they_refuse_is_a_sentence(override: str, words: str) -> None:
    (fault,) = nemo_faults(_tree(override))
    assert words in fault


def test_what_lightning_refuses_is_a_typed_error() -> None:
    from nemo_llm_feedback.cli.jobs.start import make_trainer

    for override in ("trainer.precision=7", "trainer.accelerator=abacus", "trainer.devices=-3", "trainer.strategy=x"):
        with pytest.raises(ConfigError, match="Lightning refuses the section trainer"):
            make_trainer(compose_config([*NEEDED, override]))


@pytest.mark.parametrize(
    "override",
    [
        "trainer.logger=true",
        "trainer.enable_checkpointing=true",
        "trainer.fast_dev_run=true",
        "exp_manager.checkpoint_callback_params.mode=upwards",
        "exp_manager.max_time_per_run=abc",
        "exp_manager.create_wandb_logger=true",
        "exp_manager.files_to_copy=[/absent]",
    ],
)
def test_what_the_experiment_manager_refuses_is_a_typed_error(override: str, tmp_path: Path) -> None:
    from nemo_llm_feedback.cli.jobs.start import make_folder, make_trainer

    cfg = compose_config([*NEEDED, "trainer=cpu", f"exp_manager.exp_dir={tmp_path}", override])
    with pytest.raises(ConfigError, match="NeMo refuses the section exp_manager"):
        make_folder(make_trainer(cfg), cfg.exp_manager)
