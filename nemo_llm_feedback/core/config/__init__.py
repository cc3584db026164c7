"""All settings of the plugin, each with its one default. NeMo's own sections (``model``, ``trainer``, ``exp_manager``)
stay NeMo's; the sections here are ours, are checked before any work, and unknown keys are refused by name.
"""

from nemo_llm_feedback.core.config.context import ContextConfig, read_terms
from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.config.run import SECTIONS, RunConfig, check_keys, parse_run_config
from nemo_llm_feedback.core.config.sections import (
    OBJECTIVE_NAMES,
    SOURCE_NAMES,
    FeedbackConfig,
    GuardConfig,
    LLMConfig,
    ObjectiveConfig,
    ParametersConfig,
    ProposalConfig,
)

__all__ = [
    "OBJECTIVE_NAMES",
    "SECTIONS",
    "SOURCE_NAMES",
    "ContextConfig",
    "FeedbackConfig",
    "GuardConfig",
    "LLMConfig",
    "ObjectiveConfig",
    "ParametersConfig",
    "ProposalConfig",
    "RewardConfig",
    "RunConfig",
    "check_keys",
    "parse_run_config",
    "read_terms",
]
