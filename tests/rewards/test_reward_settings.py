"""The section ``reward``: what it needs, its faults, paths to code in it, its YAML files and its documentation."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_llm_feedback.core.config import RewardConfig, RunConfig, parse_run_config
from nemo_llm_feedback.core.config.compose import compose_config, conf_dir
from nemo_llm_feedback.core.errors import ConfigError, RewardError
from nemo_llm_feedback.core.types import Hypothesis, HypothesisGroup
from nemo_llm_feedback.rewards import build_reward, reward_faults, reward_from_config
from nemo_llm_feedback.rewards.base import find_factory

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


def run_config(reward: dict[str, Any], **sections: Any) -> RunConfig:
    llm = {"llm": {"model": "some/llm"}, "context": {"description": "a test"}}
    return parse_run_config({"reward": reward, **llm, **sections})


def test_which_rewards_need_the_llm_and_a_context():
    composite = {"name": "composite", "settings": {"components": [{"name": "rules"}, {"name": "entity"}]}}
    assert run_config(composite).needs_llm
    assert run_config({"name": "judge"}).needs_context
    rules = parse_run_config({"reward": {"name": "rules"}})
    assert (rules.needs_llm, rules.needs_context) == (False, False)
    quiet = {"objective": {"name": "self_training"}}
    assert not run_config({"name": "judge"}, **quiet).needs_llm
    assert run_config({"name": "judge"}, proposals={"llm_correction": 1}, **quiet).needs_llm
    for reward in ({"name": "judge"}, composite):
        with pytest.raises(ConfigError, match=r"llm\.model is missing"):
            parse_run_config({"reward": reward, "context": {"description": "x"}})
        with pytest.raises(ConfigError, match="no context"):
            parse_run_config({"reward": reward, "llm": {"model": "a/b"}})
    with pytest.raises(ConfigError, match="llm_correction=0"):
        run_config({"name": "llm"}, objective={"name": "reinforce"}, proposals={"beam": 0, "boosted": 0,
                   "term_swap": 0, "samples": 8, "llm_correction": 1})  # fmt: skip
    with pytest.raises(ConfigError, match="llm_correction must be ≤ 1"):
        run_config({"name": "llm"}, proposals={"llm_correction": 2})


def test_faults_of_a_composite_come_all_at_once():
    items = [{"name": "llm", "wieght": 2.0}, {"name": "asr", "normalize": "std"}, {"weight": 1.0}, "length",
             {"name": "length", "weight": "two"}, {"name": "composite"}]  # fmt: skip
    with pytest.raises(ConfigError) as error:
        run_config({"name": "composite", "settings": {"components": items}})
    for words in (
        "[0].weight?",
        "normalize must be one of none",
        "components[2].name is missing",
        "components[3] must be a section of keys, got 'length'",
        "weight must be float",
        "itself",
    ):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="weight 0 all"):
        run_config({"name": "composite", "settings": {"components": [{"name": "llm", "weight": 0}]}})
    with pytest.raises(ConfigError, match="must be a list"):
        run_config({"name": "composite"})


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"name": "lenght"}, "Did you mean 'length'"),
        (
            {"name": "judge", "settings": {"mode": "stars"}},
            "settings.mode must be one of yes_no, log_odds, rating, got 'stars'",
        ),
        ({"name": "judge", "settings": {"modes": "yes_no"}}, "did you mean reward.settings.mode"),
        ({"name": "judge", "settings": {"template": "/absent/file"}}, "settings.template"),
        ({"name": "entity", "settings": {"scorer": 1}}, "unknown key reward.settings.scorer"),
        ({"name": "llm", "settings": {"normalize": "pmi"}}, "there is none"),
        ({"name": "entity", "settings": {"weight": "two", "relativ": False}}, "weight must be float, got 'two'"),
        ({"name": "entity", "settings": {"weight": "two", "relativ": False}}, "did you mean reward.settings.relative"),
        ({"name": "judge", "settings": {"mode": "rating", "answers": [1, 2, 3]}}, ""),
        ({"name": "callable"}, "function is missing"),
        ({"name": "callable", "settings": {"function": "no_such_module_here:f"}}, "cannot be imported"),
        ({"name": "callable", "settings": {"function": "math:sqrt"}}, ""),
        ({"name": "composite", "settings": {"components": [{"name": "rulez"}]}}, "Did you mean 'rules'"),
        (
            {"name": "composite", "settings": {"components": [{"name": "llm", "settings": {"normalise": "pmi"}}]}},
            r"components[0].settings.normalise",
        ),
    ],
)
def test_faults_of_settings_are_found_without_an_llm(reward, words):
    faults = reward_faults(run_config(reward))
    assert (words in " ".join(faults)) if words else faults == []


def test_functions_come_from_the_users_settings_only():
    reward = reward_from_config(run_config({"name": "callable", "settings": {"function": "builtins:len"}}), None)
    with pytest.raises(RewardError, match="len failed"):  # it is called on the list of texts
        reward([HypothesisGroup("u", (Hypothesis("a", (1,)),))])
    with pytest.raises(RewardError, match="needs a function"):
        build_reward("callable", function="builtins:len", allow_dotted=True)


def test_every_yaml_of_a_reward_composes_and_shows_its_functions_defaults():
    docs = DOCS.read_text(encoding="utf-8")
    for file in sorted((conf_dir() / "reward").glob("*.yaml")):
        name = file.stem
        assert f"`{name}`" in docs
        extra = ["reward.settings.function=builtins:len"] if name == "callable" else []
        extra += ["reward.settings.base_url=http://localhost:1", "reward.settings.model=a/b"] * (name == "remote")
        cfg = compose_config([f"reward={name}", "llm.model=a/b", "context.description=x", *extra])
        assert cfg.reward.name == name
        shown = yaml.safe_load(file.read_text(encoding="utf-8"))["settings"]
        parameters = inspect.signature(find_factory(name)).parameters
        for key, value in shown.items() if name in ("judge", "entity", "rules") else ():
            assert parameters[key].default == value, f"{name}: {key}"
    cfg = compose_config(["reward=composite", "reward.settings.components=[{name: llm, weight: 0.5}, {name: asr}]"])
    assert cfg.reward.settings.components[0].weight == 0.5


def test_every_form_is_documented_with_when_to_use_it_and_how_it_is_hacked():
    sections = DOCS.read_text(encoding="utf-8").split("\n## ")
    for name in ("llm", "entity", "judge", "correction", "rules", "composite", "callable"):
        (section,) = (text for text in sections if text.startswith(f"`{name}`"))
        assert "Use it" in section, name
        assert "hacked" in section.lower(), name


def test_a_length_bonus_stands_only_beside_log_probabilities_which_fall_with_every_word():
    """Beside the others it paid more for an inserted word than a wrong word costs."""
    assert RewardConfig(alpha=1.5).weights == (1.5, 3.0)
    assert RewardConfig(name="entity").weights == (1.0, 2.0)
    assert RewardConfig(normalize="token").weights == (1.0, 0.0)
    for name in ("judge", "correction", "rules"):
        assert RewardConfig(name=name, alpha=10.0).weights == (10.0, 0.0)
        assert RewardConfig(name=name, beta=0.5).weights == (1.0, 0.5)
