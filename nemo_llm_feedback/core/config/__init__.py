"""All settings of the plugin, each with its one default. NeMo's own sections (``model``, ``trainer``, ``exp_manager``)
stay NeMo's; the sections here are ours, are checked before any work, and unknown keys are refused by name.
"""

from nemo_llm_feedback.core.config.context import ContextConfig, read_terms
from nemo_llm_feedback.core.config.learning import (
    OBJECTIVE_NAMES,
    FeedbackConfig,
    ObjectiveConfig,
)
from nemo_llm_feedback.core.config.llm import LLMConfig
from nemo_llm_feedback.core.config.proposals import SOURCE_NAMES, ProposalConfig
from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.config.run import SECTIONS, RunConfig, check_keys, parse_run_config
from nemo_llm_feedback.core.config.training import GuardConfig, ParametersConfig

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
