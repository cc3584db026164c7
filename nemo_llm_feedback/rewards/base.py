"""The interface of rewards, and the registry that finds them by name."""

from __future__ import annotations

import difflib
import pkgutil
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput


@runtime_checkable
class Reward(Protocol):
    """Judges the members of groups.

    Called with B groups it returns values [B, N], N the size of the largest group, higher is better, float32 on the
    CPU; NaN = "cannot judge" (never 0, which is the best value a log-probability can have) and padding. It must not
    depend on the order of the groups or on the other groups of the batch, nor touch torch's random state.
    """

    name: str

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns the groups' rewards.

        Raises:
            RewardError: the reward cannot work at all, as opposed to being unable to judge a member.
        """


def reference_scores(group: HypothesisGroup) -> tuple[float, ...]:
    """Returns log p(member | audio) of each member under the frozen reference.

    Raises:
        RewardError: the group has none.
    """
    if len(group.ref_logp) != len(group):
        raise RewardError(
            f"Utterance {group.utterance} has {len(group.ref_logp)} reference scores for {len(group)} hypotheses: "
            "score the group with the frozen reference model first, or set reward.asr_weight=0 (in a composite: leave "
            "the component asr out)."
        )
    return group.ref_logp


class RefusedError(RewardError):
    """A server refuses whatever this run would ask: further attempts cannot help."""


Factory = TypeVar("Factory", bound=Callable[..., Any])
_REGISTRY: dict[str, Callable[..., Reward]] = {}
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator that makes a reward class, or a function returning a reward, known under a short name.

    Raises:
        RewardError: the name is taken by another factory.
    """

    def _keep(factory: Factory) -> Factory:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != factory.__qualname__:
            raise RewardError(f"The reward name {name!r} is taken by {known.__qualname__}: choose another name.")
        _REGISTRY[name] = factory
        return factory

    return _keep


def reward_names() -> list[str]:
    """Returns the registered names in alphabetical order."""
    return sorted(_REGISTRY)


def build_reward(name: str, *, allow_dotted: bool = False, **settings: Any) -> Reward:
    """Makes a reward.

    Args:
        name: a registered name, or ``package.module:attribute`` of a reward class or of a function that returns one.
        allow_dotted: accept the second form. It imports and runs code, so pass True only for names that the user
            typed or wrote into their own YAML, never for one read from a checkpoint.
        settings: keyword arguments of the reward.

    Raises:
        RewardError: no such name, a dotted path where none is allowed or that leads nowhere, or wrong settings.
    """
    factory = find_factory(name, allow_dotted=allow_dotted)
    try:
        reward = factory(**settings)
    except TypeError as error:
        raise RewardError(f"Reward {name!r} does not take these settings ({error}).") from error
    if not isinstance(reward, Reward):
        raise RewardError(
            f"{name!r} made {reward!r}, which is not a reward: it needs a name and to be callable on groups."
        )
    return reward


def find_factory(name: str, *, allow_dotted: bool = False) -> Callable[..., Reward]:
    """Returns the class or function that makes a reward; see :func:`build_reward`.

    Raises:
        RewardError: no such name, or a dotted path where none is allowed or that leads nowhere.
    """
    if ":" in name or "." in name:
        if not allow_dotted and _DOTTED.fullmatch(name):
            raise RewardError(
                f"The reward {name!r} is a path to code, which is accepted from the command line or YAML only."
            )
        return import_object(name)
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, _REGISTRY, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RewardError(f"There is no reward {name!r}; known: {', '.join(reward_names())}.{hint}")


def import_object(path: str) -> Callable[..., Any]:
    """Imports a class or function; only for paths that the user typed or wrote into their own YAML.

    Args:
        path: ``package.module:attribute``.

    Raises:
        RewardError: the path has another form, cannot be imported, or leads to neither a class nor a function.
    """
    if not _DOTTED.fullmatch(path):
        raise RewardError(f"{path!r} is neither a reward's name nor of the form package.module:attribute.")
    try:
        target = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"The reward {path!r} cannot be imported ({error}): is its folder on PYTHONPATH?") from error
    if not callable(target):
        raise RewardError(f"The reward {path!r} is neither a class nor a function.")
    return target
