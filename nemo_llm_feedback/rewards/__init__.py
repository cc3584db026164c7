"""Rewards by name: ``build_reward("llm", scorer=…, alpha=…, beta=…)``. Importing this registers the built-in ones."""

from nemo_llm_feedback.rewards.base import Reward, build_reward, register, reward_names
from nemo_llm_feedback.rewards.cache import MemoryCache, ScoreCache, SQLiteCache, open_cache, score_key
from nemo_llm_feedback.rewards.lm import LLMReward
from nemo_llm_feedback.rewards.rules import CallableReward, RuleReward

__all__ = [
    "CallableReward",
    "LLMReward",
    "MemoryCache",
    "Reward",
    "RuleReward",
    "SQLiteCache",
    "ScoreCache",
    "build_reward",
    "open_cache",
    "register",
    "reward_names",
    "score_key",
]
