"""Scores that survive batches, epochs and, on disk, runs.

A key is a hash of everything that a score depends on. A value is the raw sum of log-probabilities and the number of
tokens, so that one entry serves every normalisation. Scores that are not finite are never kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context

CachedScore = tuple[float, int]


def score_key(identity: str, context: Context, text: str) -> str:
    """Returns the key of a text's score: a hash of the scorer's identity, the context and the text."""
    parts = [identity, context.description, list(context.terms), text]
    if context.previous:  # keys of contexts without it stay what they were
        parts.append(list(context.previous))
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


class SQLiteCache:
    """Keeps scores in an SQLite file, which several processes and later runs may share.

    Args:
        path: the file; a folder, or a path that ends in a slash, gets the file ``llm_scores.sqlite``.

    Attributes:
        hits, misses: how many looked-up keys were known and unknown so far.

    Raises:
        RewardError: the path cannot be opened, or is a file of another kind.
    """

    _CHUNK = 500  # keys a query; SQLite allows 999 parameters in old builds

    def __init__(self, path: str) -> None:
        file = Path(path).expanduser()
        self.path = file / "llm_scores.sqlite" if file.is_dir() or path.endswith("/") else file
        self.hits = 0
        self.misses = 0
        self._connection: sqlite3.Connection | None = None
        self._process = -1
        self._connect()

    def __len__(self) -> int:
        return self._connect().execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def get_many(self, keys: Iterable[str]) -> dict[str, CachedScore]:
        """Returns key → (sum of log-probabilities, number of tokens) of those keys that are known."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, CachedScore] = {}
        for start in range(0, len(wanted), self._CHUNK):
            part = wanted[start : start + self._CHUNK]
            marks = ",".join("?" * len(part))
            with self._typed():
                rows = self._connect().execute(f"SELECT key, logp, tokens FROM scores WHERE key IN ({marks})", part)
                found.update((key, (logp, tokens)) for key, logp, tokens in rows)
        self.hits += len(found)
        self.misses += len(wanted) - len(found)
        return found

    def put_many(self, scores: Mapping[str, CachedScore]) -> None:
        """Keeps the finite ones among the scores."""
        rows = [(key, logp, tokens) for key, (logp, tokens) in scores.items() if math.isfinite(logp)]
        with self._typed(), self._connect() as connection:  # one transaction
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """SQLite's errors as ours, with the file's name."""
        try:
            yield
        except sqlite3.Error as error:
            raise RewardError(
                f"reward.cache={self.path} cannot be read or written ({error}): another process may hold it, or it is "
                "a file of another kind; give another path."
            ) from error

    def _connect(self) -> sqlite3.Connection:
        """Returns this process's connection; one that was inherited through a fork must not be used."""
        if self._connection is None or self._process != os.getpid():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(self.path, timeout=60.0)
                with connection:
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, logp REAL, tokens INTEGER) "
                        "WITHOUT ROWID"
                    )
            except (OSError, sqlite3.Error) as error:
                raise RewardError(
                    f"reward.cache={self.path} cannot be used ({error}): give the path of a new file, of an earlier "
                    "run's score cache, or of a folder."
                ) from error
            self._connection, self._process = connection, os.getpid()
        return self._connection


def open_cache(path: str | None) -> MemoryCache | SQLiteCache:
    """Returns the cache on disk at ``path`` (a file or a folder), or one in memory for None."""
    return MemoryCache() if path is None else SQLiteCache(path)
