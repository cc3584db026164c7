"""Fuzz of the settings: 1,000 overrides end in a configuration that makes sense, or in a ConfigError."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_llm_feedback.core.config import SECTIONS, RunConfig, parse_run_config
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.config.faults import keys_of
from nemo_llm_feedback.core.config.nemo_sections import NEMO_SECTIONS, TopLevel
from nemo_llm_feedback.core.errors import ConfigError

NEEDED = ["llm.model=a/b", "context.description=x", "init_from_nemo_model=a.nemo"]
NEEDED += ["model.train_ds.manifest_filepath=a.json"]
KEYS = [
    *keys_of(TopLevel),
    *(f"{path}.{key}" for path, cls in {**SECTIONS, **NEMO_SECTIONS}.items() for key in keys_of(cls)),
    *SECTIONS,
    *("model", "trainer", "exp_manager", "objectve", "hydra", "a.b", "trainer.max_step", "model.encoder.dropout", ""),
]
WORDS = """true false null abc [] [a,b] [1,-1] {} {a:1} {x:[1,2]} '' -1 0 nan inf -inf 1e400 1_000 ${seed} ${nope}
    ${oc.env:NOPE} nf4 nf5 int8 cuda:-1 cpu mwer llm adamw none auto never ??? 1,2 [ } ~ *"""
VALUES = st.one_of(
    st.integers(-3, 5).map(str),
    st.floats(allow_nan=True, allow_infinity=True).map(str),
    st.sampled_from(WORDS.split()),
    st.text(max_size=8),
)
OVERRIDES = st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), st.sampled_from(KEYS), VALUES)
# What must hold of every number that a run takes, by the last part of its key.
POSITIVE = ("batch_size", "lr", "refresh_every", "evaluate_batch_size", "accumulate_grad_batches", "temperature")


def _overridden(parts: tuple[str, str, str]) -> list[str]:
    sign, key, value = parts
    return [*NEEDED, f"{sign}{key}" if sign == "~" else f"{sign}{key}={value}"]


def _numbers(node: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _numbers(value, f"{path}.{key}")]
    return [(path, float(node))] if isinstance(node, (int, float)) and not isinstance(node, bool) else []


def check(overrides: list[str]) -> None:
    """Composes and checks; an accepted configuration holds no nonsense."""
    try:
        cfg = compose_config(overrides)
        run = parse_run_config(cfg)
    except ConfigError:
        return
    assert isinstance(run, RunConfig)
    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    for path, value in _numbers(tree):
        if path.startswith((".reward.settings", ".llm.chat_template_kwargs", ".hydra")):
            continue
        assert math.isfinite(value), path
        if path.rpartition(".")[2] in POSITIVE:
            assert value > 0, path
    assert tree["trainer"].get("max_steps", -1) >= 1 or tree["trainer"]["max_epochs"] >= 1
    assert tree["llm"].get("quantization", "nf4") in ("nf4", "int8", "none")
    proposals = run.proposals
    assert proposals.beam + proposals.boosted + proposals.samples >= 2
    assert type(tree["report_audio"]) is bool


@settings(max_examples=20, deadline=None)
@given(OVERRIDES)
def test_some_overrides_end_in_sense_or_in_a_typed_error(parts: tuple[str, str, str]) -> None:
    check(_overridden(parts))


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_a_thousand_overrides_end_in_sense_or_in_a_typed_error(several: list[tuple[str, str, str]]) -> None:
    check([*NEEDED, *(_overridden(parts)[-1] for parts in several)])


@pytest.mark.parametrize("key", ["model.train_ds", "trainer", "exp_manager", "model"])
def test_a_section_that_is_no_mapping_is_a_typed_error(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_run_config(compose_config([*NEEDED[:-1], f"{key}=1"]))
