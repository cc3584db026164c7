"""Rewards by name: ``build_reward("llm", scorer=…, alpha=…, beta=…)``. Importing this registers the built-in ones."""

from nemo_llm_feedback.rewards.base import Reward, build_reward, register, reward_names
from nemo_llm_feedback.rewards.cache import MemoryCache, ScoreCache, score_key
from nemo_llm_feedback.rewards.lm import LLMReward
from nemo_llm_feedback.rewards.rules import CallableReward, RuleReward
from nemo_llm_feedback.rewards.text import text_length

__all__ = [
    "CallableReward",
    "LLMReward",
    "MemoryCache",
    "Reward",
    "RuleReward",
    "ScoreCache",
    "build_reward",
    "register",
    "reward_names",
    "score_key",
    "text_length",
]
