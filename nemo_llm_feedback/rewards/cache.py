"""Scores that survive batches and epochs.

A key is a hash of everything that a score depends on. A value is the raw sum of log-probabilities and the number of
tokens, so that one entry serves every normalisation. Scores that are not finite are never kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Protocol

from nemo_llm_feedback.types import Context

CachedScore = tuple[float, int]


def score_key(identity: str, context: Context, text: str) -> str:
    """Returns the key of a text's score: a hash of the scorer's identity, the context and the text."""
    parts = [identity, context.description, list(context.terms), text]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


class ScoreCache(Protocol):
    """A store of scores, in memory or on disk."""

    def get_many(self, keys: Iterable[str]) -> dict[str, CachedScore]:
        """Returns key → (sum of log-probabilities, number of tokens) of those keys that are known."""

    def put_many(self, scores: Mapping[str, CachedScore]) -> None:
        """Keeps the finite ones among the scores."""


class MemoryCache:
    """Keeps the ``max_entries`` most recently used scores of this process.

    Attributes:
        hits, misses: how many looked-up keys were known and unknown so far.
    """

    def __init__(self, max_entries: int = 1_000_000) -> None:
        self._scores: OrderedDict[str, CachedScore] = OrderedDict()
        self._max_entries = max_entries
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._scores)

    def get_many(self, keys: Iterable[str]) -> dict[str, CachedScore]:
        """Returns key → (sum of log-probabilities, number of tokens) of those keys that are known."""
        found = {}
        for key in keys:
            if key in self._scores:
                self._scores.move_to_end(key)
                found[key] = self._scores[key]
                self.hits += 1
            else:
                self.misses += 1
        return found

    def put_many(self, scores: Mapping[str, CachedScore]) -> None:
        """Keeps the finite ones among the scores; the least recently used ones make room."""
        for key, (logp, num_tokens) in scores.items():
            if math.isfinite(logp):
                self._scores[key] = (logp, num_tokens)
                self._scores.move_to_end(key)
        while len(self._scores) > self._max_entries:
            self._scores.popitem(last=False)
