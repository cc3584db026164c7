"""From the section ``reward`` to a reward, and what can be said against that section before any work.

``llm`` and ``remote`` hold the ASR and the length term themselves. ``judge``, ``correction``, ``entity`` and ``rules``
get them here: R(h) = alpha·(their value) + asr_weight·log p_ref(h | audio) + beta·length(h). Single rules, Python
functions and rewards by path are taken as they are, and so is ``composite``, whose components say it all.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.config.reward import ANCHORED_REWARDS
from nemo_llm_feedback.core.errors import ConfigError, LLMError, RewardError
from nemo_llm_feedback.llm.prompts import read_template
from nemo_llm_feedback.llm.view import LLMView
from nemo_llm_feedback.rewards.base import Reward, build_reward, find_factory, import_object
from nemo_llm_feedback.rewards.cache import ScoreCache, open_cache
from nemo_llm_feedback.rewards.composite import Component, CompositeReward
from nemo_llm_feedback.rewards.judge import JUDGE_MODES
from nemo_llm_feedback.rewards.remote.reward import parse_remote

# Arguments that come from other settings, so that reward.settings may not name them.
_GIVEN = ("scorer", "corrector", "cache", "view", "allow_no_context", "normalizer", "alpha", "beta", "asr_weight")


@dataclass(frozen=True)
class _Parts:
    """What the components of one reward share."""

    scorer: Any
    corrector: Any
    view: LLMView | None
    cache: ScoreCache
    allow_no_context: bool
    normalizer: str


def reward_from_config(config: RunConfig, scorer: Any) -> Reward:
    """Makes the reward that a configuration names.

    Args:
        config: the run's settings.
        scorer: the LLM; None where none is needed.

    Raises:
        RewardError, LLMError, ConfigError: the settings do not fit the reward or the LLM.
    """
    settings = config.reward
    corrector = corrector_from_config(config, scorer) if "correction" in settings.names else None
    view = LLMView.of(config.llm) if config.llm is not None else None
    cache = open_cache(settings.cache)
    parts = _Parts(scorer, corrector, view, cache, not config.context.required, config.feedback.normalizer)
    alpha, beta = settings.weights
    if settings.name in ("llm", "remote"):
        return _language_model(
            settings.name,
            parts,
            settings.settings,
            alpha=alpha,
            beta=beta,
            normalize=settings.normalize,
            asr_weight=settings.asr_weight,
        )
    if settings.name == "composite":
        return CompositeReward(
            [
                Component(
                    _bare(item["name"], parts, item.get("settings") or {}),
                    float(item.get("weight", 1.0)),
                    item.get("normalize", "none"),
                )
                for item in settings.settings["components"]
            ]
        )
    bare = _bare(settings.name, parts, settings.settings)
    if settings.name not in ANCHORED_REWARDS:
        return bare
    components = [Component(bare, alpha), Component(build_reward("length"), beta)]
    if settings.asr_weight:
        components.append(Component(build_reward("asr"), settings.asr_weight))
    return CompositeReward(components, name=settings.name)


def corrector_from_config(config: RunConfig, scorer: Any) -> Any:
    """The run's writer of corrections, an ``llm.generation.Corrector``.

    Raises:
        LLMError: ``llm.correction_template`` is faulty.
    """
    from nemo_llm_feedback.llm.generation import Corrector

    assert config.llm is not None
    path, chat = config.llm.correction_template, scorer.encoder.chat
    template = read_template(path, chat=chat, use="correction", key="llm.correction_template")
    return Corrector(scorer, template=template, view=LLMView.of(config.llm))


def reward_faults(config: RunConfig) -> list[str]:
    """Returns every fault of the reward that shows without loading an LLM, as sentences."""
    settings = config.reward
    faults = []
    if settings.name == "composite":
        for n, item in enumerate(settings.settings["components"]):
            faults += _faults_of(item["name"], item.get("settings") or {}, f"reward.settings.components[{n}].settings")
    else:
        faults += _faults_of(settings.name, settings.settings, "reward.settings")
    if config.llm is not None and config.llm.correction_template:
        try:
            read_template(config.llm.correction_template, chat=True, use="correction", key="llm.correction_template")
        except LLMError as error:
            faults.append(str(error))
    return faults


def _bare(name: str, parts: _Parts, settings: Mapping[str, Any]) -> Reward:
    """A reward without the ASR and the length term."""
    if name in ("llm", "remote"):
        own = {key: value for key, value in settings.items() if key != "normalize"}
        kind = settings.get("normalize", "sum")
        return _language_model(name, parts, own, alpha=1.0, beta=0.0, asr_weight=0.0, normalize=kind)
    shared: dict[str, Any] = {"cache": parts.cache, "allow_no_context": parts.allow_no_context}
    if name in ("judge", "entity"):
        return build_reward(name, scorer=parts.scorer, view=parts.view, **shared, **settings)
    if name == "correction":
        return build_reward(name, corrector=parts.corrector, normalizer=parts.normalizer, **shared, **settings)
    return build_reward(name, allow_dotted=True, **(_with_function(settings) if name == "callable" else settings))


def _with_function(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``callable`` with its function imported; a configuration has ``package.module:function``."""
    return {**settings, "function": import_object(str(settings["function"]))}


def _language_model(name: str, parts: _Parts, settings: Mapping[str, Any], **weights: Any) -> Reward:
    shared = {"cache": parts.cache, "allow_no_context": parts.allow_no_context, **weights}
    if name == "llm":
        return build_reward("llm", scorer=parts.scorer, view=parts.view, **shared)
    return build_reward("remote", settings=settings, **shared)


def _faults_of(name: str, settings: Mapping[str, Any], where: str) -> list[str]:
    try:
        factory = find_factory(name, allow_dotted=True)
        if name == "remote":
            parse_remote({key: value for key, value in settings.items() if key != "normalize"})
            return []
        if name == "judge":
            use = "rating" if settings.get("mode") == "rating" else "yes_no"
            read_template(settings.get("template"), chat=True, use=use, key=f"{where}.template")
        if name == "callable" and "function" in settings:
            build_reward(name, **_with_function(settings))
    except (RewardError, LLMError, ConfigError) as error:
        return [str(error)]
    faults = []
    if name == "judge" and settings.get("mode", "yes_no") not in JUDGE_MODES:
        faults.append(f"{where}.mode={settings['mode']!r} is not one of {', '.join(JUDGE_MODES)}.")
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return faults
    known = [p for p in parameters if p not in _GIVEN]
    if name == "llm" and where == "reward.settings":
        known = []  # there reward.normalize says it
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]}?" if near else "it has none."
            faults.append(f"unknown setting {where}.{key} of the reward {name}; {hint}")
    lacking = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in settings]
    lacking = [n for n in lacking if name != "llm"]
    faults += [f"{where}.{n} is missing: the reward {name} needs it." for n in lacking]
    return faults
