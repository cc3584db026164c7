"""Settings of rescoring at inference: how many hypotheses, what judges them, and what is known about the domain."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.config.context import ContextConfig
from nemo_llm_feedback.core.config.faults import choice, listing, non_negative, positive
from nemo_llm_feedback.core.config.learning import NORMALIZERS
from nemo_llm_feedback.core.config.llm import LLMConfig
from nemo_llm_feedback.core.config.proposals import ProposalConfig
from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.config.run import parse_run_config
from nemo_llm_feedback.core.errors import ConfigError

SHARED_SECTIONS = ("reward", "llm", "context")


@dataclass(frozen=True)
class RescoringConfig:
    """How the N-best of NeMo's beam decoders are rescored.

    Attributes:
        nbest: size of the first pass's beam; null = that of the user's own beam strategy, and 8 where the strategy is
            greedy, which has no N-best (it is replaced by the family's batched beam).
        boosted, term_swap, boosting_weight: further hypotheses of utterances whose context has terms, as in the groups
            of ``adapt`` (``ProposalConfig``): a rescored transcript is then what training would prefer; 0 = none.
        normalizer: text normalisation under which hypotheses count as one, and in which the reward sees them.
        memory_budget_mb: most MiB for the joint while the exact log p is computed.
        reward: the section ``reward`` as in ``adapt``; null = the exact log p(y|x) alone.
        llm: the section ``llm`` as in ``adapt``.
        context: the section ``context`` as in ``adapt``.
    """

    nbest: int | None = None
    boosted: int = ProposalConfig.boosted
    term_swap: int = ProposalConfig.term_swap
    boosting_weight: float = ProposalConfig.boosting_weight
    normalizer: str = "basic"
    memory_budget_mb: int = 512
    reward: RewardConfig | None = field(default_factory=RewardConfig)
    llm: LLMConfig | None = None
    context: ContextConfig = field(default_factory=ContextConfig)

    def validate(self) -> list[str]:
        """Returns every fault of the values outside the three shared sections as a sentence."""
        faults = non_negative("rescoring", self, "boosted", "term_swap", "boosting_weight")
        faults += positive("rescoring", self, "memory_budget_mb")
        faults += choice("rescoring.normalizer", self.normalizer, NORMALIZERS)
        if self.nbest is not None and self.nbest < 2:
            faults.append(f"rescoring.nbest={self.nbest} leaves nothing to choose from: give at least 2, or null.")
        return faults


def parse_rescoring_config(tree: Mapping[str, Any]) -> RescoringConfig:
    """Builds checked settings from plain nested mappings, e.g. a YAML file of the user's (see conf/rescoring.yaml).

    Raises:
        ConfigError: one message that lists every unknown key with the nearest known one, and every fault.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"the rescoring settings must be a mapping of keys, got {type(tree).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(RescoringConfig)}
    faults = [
        f"unknown key {key}; did you mean {difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]}?"
        for key in tree
        if key not in fields
    ]
    own = {key: value for key, value in tree.items() if key in fields and key not in SHARED_SECTIONS}
    for key, value in own.items():
        if not _fits(value, str(fields[key].type)):
            faults.append(f"{key} must be {fields[key].type}, got {value!r}.")
    judged = tree.get("reward", {}) is not None
    shared = {key: tree[key] for key in SHARED_SECTIONS if tree.get(key) is not None} if judged else {}
    parts: dict[str, Any] = {"reward": None}
    try:
        if judged:
            run = parse_run_config(shared)
            parts = {"reward": run.reward, "llm": run.llm, "context": run.context}
        elif tree.get("context"):
            parts["context"] = parse_run_config({"context": tree["context"], "reward": {"name": "length"}}).context
    except ConfigError as error:
        faults += [line.removeprefix("  - ") for line in str(error).splitlines()[1:]] or [str(error)]
    if not faults:
        config = RescoringConfig(**own, **parts)
        faults = config.validate()
        if not faults:
            return config
    raise ConfigError("the rescoring settings have " + listing(faults))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of the user's into plain mappings.

    Raises:
        ConfigError: the file is missing, no YAML, or no mapping.
    """
    import yaml

    try:
        tree = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({error}).") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, as conf/rescoring.yaml does.")
    return tree


def read_rescoring_config(path: str | Path) -> RescoringConfig:
    """Reads the settings from a YAML file.

    Raises:
        ConfigError: the file is missing or no YAML, or has faults.
    """
    return parse_rescoring_config(read_yaml(path))


def _fits(value: Any, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if isinstance(value, bool):
        return False
    wanted: dict[str, Any] = {"int": int, "float": (int, float), "str": str}
    return isinstance(value, wanted[kind.split(" |")[0]])
