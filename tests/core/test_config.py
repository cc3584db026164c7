"""Settings: one place of defaults, unknown keys refused by name, all faults at once."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_llm_feedback.core.config import OBJECTIVE_NAMES, SECTIONS, RewardConfig, parse_run_config, read_terms
from nemo_llm_feedback.core.config.compose import compose_config, conf_dir
from nemo_llm_feedback.core.config.faults import keys_of
from nemo_llm_feedback.core.config.nemo_sections import NEMO_SECTIONS, TopLevel
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.training.objectives import OBJECTIVES, hyperparameters

NEEDED = ["llm.model=a/b", "context.description=an order", "model.train_ds.manifest_filepath=a.json"]
ONLY_SAMPLES = {"beam": 0, "boosted": 0, "term_swap": 0, "samples": 8}
GOOD: dict[str, Any] = {"llm": {"model": "some/llm"}, "context": {"description": "an order"}}


def _defaults(cls: type) -> dict[str, Any]:
    out = {}
    for f in dataclasses.fields(cls):
        value = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            value = f.default_factory()
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def test_yaml_and_dataclasses_agree_on_every_default() -> None:
    shown = yaml.safe_load((conf_dir() / "adapt.yaml").read_text())
    for section in ("feedback", "proposals", "context", "parameters", "guards"):
        assert shown[section] == _defaults(SECTIONS[section]), section
    for section in ("objective", "reward", "llm"):
        defaults = _defaults(SECTIONS[section])
        for file in (conf_dir() / section).glob("*.yaml"):
            values = yaml.safe_load(file.read_text())
            # What a file is there to choose; distill leaks probability from the group without the mass anchor.
            fixed = {"name", "quantization", "settings", *(["mass_weight"] if file.stem == "distill" else [])}
            if section == "reward" and "alpha" in values and values["alpha"] is not None:
                # Written out where the pool does not set it.
                own = RewardConfig(name=values["name"])
                assert (values.pop("alpha"), values.pop("beta")) == own.weights
                assert not own.scaled_by_pool
            assert {k: v for k, v in values.items() if k not in fixed} == {
                k: defaults[k] for k in values if k not in fixed
            }, file


def test_every_objective_has_its_hyperparameters_in_the_dataclass_and_in_its_yaml() -> None:
    assert set(OBJECTIVES) == set(OBJECTIVE_NAMES)
    known = {f.name for f in dataclasses.fields(SECTIONS["objective"])}
    for name in OBJECTIVES:
        assert set(hyperparameters(name)) <= known
        shown = set(yaml.safe_load((conf_dir() / "objective" / f"{name}.yaml").read_text()))
        assert set(hyperparameters(name)) <= shown


def test_unknown_keys_are_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError) as error:
        parse_run_config({**GOOD, "feedback": {"wieght": 1.0}, "objective": {"temprature": 2.0}})
    assert "did you mean feedback.weight" in str(error.value)
    assert "did you mean objective.temperature" in str(error.value)
    with pytest.raises(ConfigError, match=r"did you mean proposals\.boosted"):
        compose_config(["proposals.boostd=3"])


def test_old_names_are_refused_with_the_new_ones() -> None:
    for old, new in {
        "feedback.replay": "feedback.labelled",
        "feedback.survey_utterances": "feedback.pool_utterances",
        "guards.mix": "guards.interpolation",
        "llm.restore": "llm.truecasing",
        "objective.kl_anchor_weight": "objective.reference_kl_weight",
    }.items():
        section, key = old.split(".")
        with pytest.raises(ConfigError, match=rf"{re.escape(old)} is now {re.escape(new)}"):
            parse_run_config({**GOOD, section: {**GOOD.get(section, {}), key: "x"}})
        with pytest.raises(ConfigError, match=re.escape(new)):
            compose_config([f"{old}=x"])
    with pytest.raises(ConfigError, match=r"is now objective\.correction=kl_optimum"):
        parse_run_config({**GOOD, "objective": {"name": "mwer", "correction": "anchored"}})


def test_all_faults_come_in_one_error() -> None:
    tree = {
        **GOOD,
        "feedback": {"weight": -1.0, "heads": "decoder"},
        "proposals": {"beam": 1, "boosted": 0},
        "objective": {"name": "ppo"},
    }
    with pytest.raises(ConfigError) as error:
        parse_run_config(tree)
    for words in ("feedback.weight must be", "feedback.heads must be", "at least 2", "objective.name must be one of"):
        assert words in str(error.value)


def test_contradictions_of_all_sections_come_in_one_error_beside_typos_and_types() -> None:
    tree = {
        "feedback": {"weight": 0, "supervised_weight": 0},
        "objective": {"name": "reinforce"},
        "proposals": {"beam": 1, "boosted": 0, "term_swap": 0},
        "reward": {"alpha": 0, "asr_weight": 0, "beta": 0},
        "parameters": {"lora_rank": 4, "freeze_encoder": True},
    }
    wanted = [
        "nothing would be learned",
        "unbiased only for samples",
        "a group of one",
        "every text would be worth the same",
        "both are about the encoder",
        "llm.model is missing",
        "no context",
    ]
    with pytest.raises(ConfigError) as error:
        parse_run_config(tree)
    assert str(error.value).startswith(f"the configuration has {len(wanted)} faults:"), str(error.value)
    for words in wanted:
        assert words in str(error.value)
    with pytest.raises(ConfigError) as error:
        parse_run_config({**tree, "guards": {"every": "often", "pateince": 3}})
    for words in ("did you mean guards.patience", "guards.every must be int", "a group of one", "worth the same"):
        assert words in str(error.value)


def test_whole_numbers_are_numbers_and_lists_of_yaml_are_read() -> None:
    config = parse_run_config({**GOOD, "feedback": {"weight": 2}, "proposals": {"boosting_weights": [1, 2]}})
    assert config.feedback.weight == 2.0
    assert config.proposals.boosting_weights == (1.0, 2.0)


def test_the_proposal_correction_works_on_samples() -> None:
    objective = {"name": "mwer", "correction": "proposal"}
    config = parse_run_config({**GOOD, "objective": objective, "proposals": ONLY_SAMPLES})
    assert config.objective.correction == "proposal"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"context": {"description": "x"}}, "llm.model is missing"),
        ({"llm": {"model": "a/b"}}, "no context"),
        ({**GOOD, "objective": {"name": "reinforce"}}, "unbiased only for samples"),
        ({**GOOD, "objective": {"name": "mwer", "correction": "proposal"}}, "correction=proposal is unbiased only"),
        ({**GOOD, "feedback": {"weight": 0, "supervised_weight": 0}}, "both 0"),
        ({**GOOD, "feedback": {"augment": True}, "objective": {"name": "self_training"}}, "is not for"),
        ({**GOOD, "proposals": ONLY_SAMPLES, "objective": {"name": "gspo"}}, "set objective.correction=proposal"),
        ({**GOOD, "objective": {"name": "grpo", "correction": "proposal"}}, "unbiased only for samples"),
        (
            {**GOOD, "proposals": ONLY_SAMPLES, "objective": {"name": "reinforce", "mass_weight": 1.0}},
            "for distinct members",
        ),
        ({**GOOD, "feedback": {"refresh_every": "often"}}, "must be int"),
        ({**GOOD, "reward": "llm"}, "section of keys"),
        ({**GOOD, "feedback": {"refresh_every": True}}, r"refresh_every must be int, got True"),
        ({**GOOD, "feedback": {"use_text": "no"}}, r"use_text must be bool, got 'no'"),
        ({**GOOD, "feedback": {"weight": "1.0"}}, r"feedback\.weight must be float, got '1\.0'"),
        ({**GOOD, "feedback": {"weight": float("nan")}}, r"weight must be a finite number, got nan"),
        ({**GOOD, "parameters": {"lr_candidates": [1e-5, 0]}}, r"parameters\.lr_candidates\[1\] must be > 0, got 0"),
        ({**GOOD, "parameters": {"lr_candidates": 1e-5}}, r"lr_candidates must be a list, got 1e-05"),
        ({**GOOD, "reward": {"settings": None}}, r"reward\.settings must be a section of keys, got None"),
        ({"llm": {"model": "a/b", "device": "gpu"}}, r"llm\.device must be one of auto, cpu, cuda, cuda:<number>"),
        ({**GOOD, "context": {"terms_file": "/absent/file"}}, "cannot be read"),
    ],
)
def test_faults_name_the_fix(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_run_config(tree)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.max_step=10"], r"unknown key trainer\.max_step; did you mean trainer\.max_steps\?"),
        (["objectve=mwer"], r"unknown key objectve; did you mean objective\?"),
        (["+objectve=mwer"], r"unknown key objectve; did you mean objective\?"),
        (["+colour=red"], r"unknown key colour; there are name, init_from"),
        (["model.optm.lr=1"], r"did you mean model\.optim\?"),
        (["model.train_ds.batchsize=4"], r"did you mean model\.train_ds\.batch_size\?"),
        (["model.encoder.dropout=0.1"], r"model\.encoder: a run reads train_ds, validation_ds, optim"),
        (["trainer.max_steps=-5"], r"trainer\.max_steps must be at least 1, or -1 for no limit, got -5"),
        (["trainer.max_steps=-1"], r"needs trainer\.max_epochs"),
        (["trainer.max_steps=abc"], r"trainer\.max_steps must be int, got 'abc'"),
        (["trainer.gradient_clip_val=nan"], "a finite number"),
        (["model.optim.lr=-1"], r"model\.optim\.lr must be > 0, got -1"),
        (["model.optim.lr=nan"], r"model\.optim\.lr must be a finite number"),
        (["model.optim.betas=[0.9,nan]"], r"model\.optim\.betas\[1\] must be a finite number, got nan"),
        (["model.train_ds.own_key=inf"], r"model\.train_ds\.own_key must be a finite number"),
        (["model.optim.lr=true"], r"model\.optim\.lr must be float, got True"),
        (["model.optim.sched.warmup_steps=-1"], r"warmup_steps must be ≥ 0"),
        (["model.train_ds.batch_size=0"], r"model\.train_ds\.batch_size must be > 0, got 0"),
        (["~model.optim"], r"model\.optim is missing"),
        (["model=null"], "model must be a section of keys"),
        (["model=1"], "model must be a section of keys"),
        (["~model.validation_ds"], r"model\.validation_ds is missing"),
        (["model.train_ds.manifest_filepath=3"], r"manifest_filepath must be a path or a list of paths, got 3"),
        (["model.validation_ds.manifest_filepath=[3]"], "must be a path or a list of paths"),
        (["model.train_ds.batch_size=null"], r"model\.train_ds\.batch_size must be set; only Lhotse"),
        (["model.optim_param_groups={encoder:{lr:-1}}"], r"optim_param_groups\.encoder\.lr must be ≥ 0, got -1"),
        (["model.optim_param_groups={encoder:3}"], r"optim_param_groups\.encoder must be a section of keys"),
        (["trainer.overfit_batches=1"], r"trainer\.overfit_batches must be ≤ 0"),
        (["trainer.limit_train_batches=0"], r"limit_train_batches must be > 0"),
        (["exp_manager.create_early_stopping_callback=true"], "create_early_stopping_callback must be one of False"),
        (["exp_manager.checkpoint_callback_params=null"], r"checkpoint_callback_params must be a section of keys"),
        (["proposals.beam=100000"], r"proposals\.beam must be ≤ 1000"),
        (["~report_audio"], "report_audio must not be taken away"),
        (["report_audio=no"], r"report_audio must be bool, got 'no'"),
        (["seed=x"], "seed must be int, got 'x'"),
        (["seed=-1"], "seed must be ≥ 0, got -1"),
        (["evaluate_batch_size=-1"], "evaluate_batch_size must be > 0, got -1"),
        (["resume=perhaps"], "resume must be one of auto, never, got 'perhaps'"),
        (["output=3"], "output must be str, got 3"),
        (["output=${nope}"], "Interpolation key 'nope' not found"),
        (["context.terms=latte"], r"context\.terms must be a list, got 'latte'"),
        (["llm.quantization=nf5"], r"llm\.quantization must be one of nf4, int8, none"),
        (["reward.beta=inf"], r"reward\.beta must be a finite number"),
        (["objective=[mwer,grpo]"], "give one name, as in objective=mwer"),
        (["trainer=3"], "give one name, as in trainer=gpu"),
    ],
)
def test_slips_and_nonsense_in_any_section_are_refused_with_the_fix(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_run_config(compose_config([*NEEDED, *overrides]))


def test_every_argument_of_lightnings_trainer_is_known() -> None:
    import inspect

    import lightning.pytorch as pl

    known = set(keys_of(NEMO_SECTIONS["trainer"]))
    assert set(inspect.signature(pl.Trainer).parameters) - {"model_registry"} == known


def test_the_yaml_shows_every_key_of_the_top_level() -> None:
    shown = yaml.safe_load((conf_dir() / "adapt.yaml").read_text())
    assert {key: shown[key] for key in keys_of(TopLevel)} == _defaults(TopLevel)


def test_a_key_of_the_users_own_may_stand_at_the_top_where_it_is_used() -> None:
    cfg = compose_config([*NEEDED, "+place=here", "output='${place}/a.nemo'"])
    assert cfg.output == "here/a.nemo"


def test_self_training_needs_neither_llm_nor_context() -> None:
    assert parse_run_config({"objective": {"name": "self_training"}}).needs_reward is False
    with pytest.raises(ConfigError, match=r"llm\.model is missing"):
        parse_run_config({"objective": {"name": "self_training", "label": "reward"}})


def test_terms_files_of_all_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("latte\n\nsoy milk\nlatte\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(["latte", "soy milk"]), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps({"drink": ["latte"], "milk": ["soy milk"]}), encoding="utf-8")
    for name in ("a.txt", "b.json", "c.json"):
        assert read_terms(tmp_path / name) == ["latte", "soy milk"]
    for name, text in {"d.json": "{", "e.json": '{"a": 3}', "f.txt": "\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="terms_file"):
            read_terms(tmp_path / name)


def test_composition_opens_nemos_sections_and_reports_hydras_errors() -> None:
    cfg = compose_config(["model.train_ds.use_lhotse=true", "objective=mwer", "trainer=cpu", "llm.model=a/b"])
    assert cfg.model.train_ds.use_lhotse is True
    assert cfg.objective.name == "mwer"
    assert cfg.trainer.accelerator == "cpu"
    with pytest.raises(ConfigError, match="objective"):
        compose_config(["objective=ppo"])
    with pytest.raises(ConfigError):
        compose_config(["nonsense=1"])


def test_a_composed_configuration_is_taken_as_it_is() -> None:
    from nemo_llm_feedback.core.config.compose import compose_config

    config = parse_run_config(compose_config(["context.terms=[latte,mocha]", "reward=rules"]))
    assert config.context.load().terms == ("latte", "mocha")
