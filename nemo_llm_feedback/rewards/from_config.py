"""Builds the reward that the section ``reward`` of the settings describes, and lists the faults of that section.

``llm`` and ``remote`` contain the ASR and the length term. ``judge``, ``correction``, ``entity`` and ``rules`` get
these terms here: R(h) = alpha·(their value) + asr_weight·log p_ref(h | audio) + beta·length(h). ``wer``, single rules,
Python functions and rewards by path are taken as they are; so is ``composite``, whose components are the whole reward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, create_model

from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.config.faults import STRICT, build
from nemo_llm_feedback.core.config.reward import ASR_WEIGHTED_REWARDS
from nemo_llm_feedback.core.errors import ConfigError, LLMError, RewardError
from nemo_llm_feedback.llm.generation import Corrector
from nemo_llm_feedback.llm.prompts import read_template
from nemo_llm_feedback.llm.view import LLMView
from nemo_llm_feedback.rewards.asking import open_cache
from nemo_llm_feedback.rewards.base import Reward, build_reward, find_factory, import_object
from nemo_llm_feedback.rewards.composite import Component, CompositeReward
from nemo_llm_feedback.rewards.remote.config import parse_remote

# Arguments that come from other settings, so that reward.settings may not name them.
_ASKING = ("cache", "allow_no_context")
_WEIGHTS = ("alpha", "beta", "asr_weight")
_GIVEN = {
    "llm": ("scorer", "view", *_ASKING, *_WEIGHTS),
    "remote": (*_ASKING, *_WEIGHTS),
    "judge": ("scorer", "view", *_ASKING),
    "entity": ("scorer", "view", *_ASKING),
    "correction": ("corrector", "normalizer", *_ASKING),
    "wer": ("normalizer",),
}


def reward_from_config(config: RunConfig, scorer: Any) -> Reward:
    """Makes the reward that a configuration names.

    Args:
        config: the run's settings.
        scorer: the LLM; None where none is needed.

    Raises:
        RewardError, LLMError, ConfigError: the settings do not fit the reward or the LLM.
    """
    settings = config.reward
    alpha, beta = settings.weights
    given = {
        "scorer": scorer,
        "corrector": corrector_from_config(config, scorer) if "correction" in settings.names else None,
        "view": LLMView.of(config.llm) if config.llm is not None else None,
        "cache": open_cache(settings.cache),
        "allow_no_context": not config.context.required,
        "normalizer": config.feedback.normalizer,
        **dict.fromkeys(_WEIGHTS, 0.0),
        "alpha": 1.0,
    }
    if settings.name in ("llm", "remote"):
        given |= {"alpha": alpha, "beta": beta, "asr_weight": settings.asr_weight}
        return _build(settings.name, {**settings.settings, "normalize": settings.normalize}, given)
    if settings.name == "composite":
        components = []
        for item in settings.settings["components"]:
            part = _build(item["name"], item.get("settings") or {}, given)
            components.append(Component(part, float(item.get("weight", 1.0)), item.get("normalize", "none")))
        return CompositeReward(components)
    reward = _build(settings.name, settings.settings, given)
    if settings.name not in ASR_WEIGHTED_REWARDS:
        return reward
    components = [Component(reward, alpha), Component(build_reward("length"), beta)]
    if settings.asr_weight:
        components.append(Component(build_reward("asr"), settings.asr_weight))
    return CompositeReward(components, name=settings.name)


def corrector_from_config(config: RunConfig, scorer: Any) -> Corrector:
    """The corrector that the settings describe.

    Raises:
        LLMError: ``llm.correction_template`` is faulty.
    """
    assert config.llm is not None
    path, chat = config.llm.correction_template, scorer.encoder.chat
    template = read_template(path, chat=chat, use="correction", key="llm.correction_template")
    return Corrector(scorer, template=template, view=LLMView.of(config.llm))


def reward_faults(config: RunConfig) -> list[str]:
    """Returns every fault of the reward that shows without loading an LLM, as sentences."""
    settings = config.reward
    items = [(settings.name, settings.settings, "reward.settings")]
    if settings.name == "composite":
        items = [
            (item["name"], item.get("settings") or {}, f"reward.settings.components[{n}].settings")
            for n, item in enumerate(settings.settings["components"])
        ]
    faults = [fault for item in items for fault in _faults_of(*item)]
    if config.llm is not None and config.llm.correction_template:
        try:
            read_template(config.llm.correction_template, chat=True, use="correction", key="llm.correction_template")
        except LLMError as error:
            faults.append(str(error))
    return faults


def _build(name: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> Reward:
    """A reward with what it takes of the run."""
    if name == "remote":
        settings = {"settings": _server(settings), "normalize": settings.get("normalize", "sum")}
    elif name == "callable":
        settings = _with_function(settings)
    shared = {key: given[key] for key in _GIVEN.get(name, ())}
    return build_reward(name, allow_dotted=True, **shared, **settings)


def _server(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``remote`` without those of the reward."""
    return {key: value for key, value in settings.items() if key != "normalize"}


def _with_function(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``callable`` with its function imported; a configuration has ``package.module:function``."""
    return {**settings, "function": import_object(str(settings["function"]))}


def _faults_of(name: str, settings: Mapping[str, Any], where: str) -> list[str]:
    """Settings that a reward does not take, those that it lacks, and values of another type or use."""
    try:
        factory = find_factory(name, allow_dotted=True)
        if name == "remote":
            parse_remote(_server(settings))
            return []
        if name == "judge":
            use = "rating" if settings.get("mode") == "rating" else "yes_no"
            read_template(settings.get("template"), chat=True, use=use, key=f"{where}.template")
        if name == "callable" and "function" in settings:
            settings = _with_function(settings)
            build_reward(name, **settings)
    except (RewardError, LLMError, ConfigError) as error:
        return [str(error)]
    given = _GIVEN.get(name, ())
    if name == "llm" and where == "reward.settings":
        given = (*given, "normalize")  # which is a key of the section reward there
    try:
        parameters = inspect.signature(factory, eval_str=True).parameters.values()
    except (NameError, AttributeError, TypeError):  # a user's annotations may not be there at run time
        parameters = inspect.signature(factory).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    fields: dict[str, Any] = {
        p.name: (
            Any if p.annotation is p.empty or isinstance(p.annotation, str) else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for p in parameters
        if p.name not in given
    }
    model = create_model(factory.__name__, __config__=ConfigDict(**STRICT, arbitrary_types_allowed=True), **fields)
    return build(model, settings, where=where)[1]
