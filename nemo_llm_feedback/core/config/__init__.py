"""All settings of the plugin, each with its one default. NeMo's sections (``model``, ``trainer``, ``exp_manager``)
stay NeMo's; the sections here are ours, are checked before any work, and unknown keys are refused by name.
"""

# ruff: noqa: F401  (what the other rooms import from here)

from nemo_llm_feedback.core.config.context import ContextConfig, read_terms
from nemo_llm_feedback.core.config.reward import RewardConfig
from nemo_llm_feedback.core.config.run import SECTIONS, RunConfig, check_keys, parse_run_config, plain
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
