"""Rewards by name: ``build_reward("llm", scorer=…, alpha=…, beta=…)``. Importing this registers the built-in ones."""

# ruff: noqa: F401  (what the other rooms and users import from here)

from nemo_llm_feedback.rewards.asking import ScoreCache, open_cache, score_key
from nemo_llm_feedback.rewards.base import Reward, build_reward, register, reward_names
from nemo_llm_feedback.rewards.composite import Component, CompositeReward
from nemo_llm_feedback.rewards.correction import CorrectionReward
from nemo_llm_feedback.rewards.entity import EntityReward
from nemo_llm_feedback.rewards.from_config import corrector_from_config, reward_faults, reward_from_config
from nemo_llm_feedback.rewards.judge import JudgeReward
from nemo_llm_feedback.rewards.lm import LLMReward
from nemo_llm_feedback.rewards.remote.config import RemoteConfig, parse_remote
from nemo_llm_feedback.rewards.remote.reward import RemoteReward, RemoteScorer
from nemo_llm_feedback.rewards.rules import CallableReward, RuleReward, WerReward, as_reward
