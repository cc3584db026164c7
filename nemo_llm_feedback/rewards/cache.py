"""A cache of LLM scores, in memory or in an SQLite file that later runs share.

A key is a hash of everything that a score depends on. A value is the raw sum of log-probabilities and the number of
tokens, so that one entry serves every normalisation. Scores that are not finite are never kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import TextScore


def score_key(identity: str, context: Context, text: str) -> str:
    """Returns the key of a text's score: a hash of the scorer's identity, the context and the text."""
    parts = [identity, context.description, list(context.terms), text]
    if context.previous:  # keys of contexts without it stay what they were
        parts.append(list(context.previous))
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


class ScoreCache:
    """Keeps scores in an SQLite file, which several processes and later runs may share, or in memory.

    Args:
        path: the file; a folder, or a path that ends in a slash, gets the file ``llm_scores.sqlite``. ``:memory:``
            keeps the scores in this process.

    Attributes:
        hits, misses: how many looked-up keys were known and unknown so far.

    Raises:
        RewardError: the path cannot be opened, or is a file of another kind.
    """

    def __init__(self, path: str = ":memory:") -> None:
        file = Path(path).expanduser()
        self.path = file / "llm_scores.sqlite" if file.is_dir() or path.endswith("/") else file
        self.hits = self.misses = 0
        self._connection: sqlite3.Connection | None = None
        self._process = -1
        self._connect()

    def __len__(self) -> int:
        return self._connect().execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def get_many(self, keys: Iterable[str]) -> dict[str, TextScore]:
        """Returns key → score of those keys that are known."""
        wanted = list(dict.fromkeys(keys))
        query = "SELECT key, logp, tokens FROM scores WHERE key IN (SELECT value FROM json_each(?))"
        with self._typed():
            rows = self._connect().execute(query, [json.dumps(wanted)])
            found = {key: TextScore(logp, tokens) for key, logp, tokens in rows}
        self.hits += len(found)
        self.misses += len(wanted) - len(found)
        return found

    def put_many(self, scores: Mapping[str, TextScore]) -> None:
        """Keeps the finite ones among the scores."""
        rows = [(key, logp, tokens) for key, (logp, tokens) in scores.items() if math.isfinite(logp)]
        with self._typed(), self._connect() as connection:  # one transaction
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """Turns SQLite's errors into a RewardError that names the file and the fix."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise RewardError(
                f"reward.cache={self.path} cannot be used ({error}): another process may hold it, or it is a file of "
                "another kind; give the path of a new file, of an earlier run's score cache, or of a folder."
            ) from error

    def _connect(self) -> sqlite3.Connection:
        """Returns this process's connection; one that was inherited through a fork must not be used."""
        if self._connection is None or self._process != os.getpid():
            with self._typed():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(self.path, timeout=60.0, check_same_thread=False)
                with connection:
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, logp REAL, tokens INTEGER) "
                        "WITHOUT ROWID"
                    )
            self._connection, self._process = connection, os.getpid()
        return self._connection


def open_cache(cache: ScoreCache | str | None) -> ScoreCache:
    """Returns the cache on disk at a path (a file or a folder), a new one in memory for None, or the cache itself."""
    return cache if isinstance(cache, ScoreCache) else ScoreCache(cache or ":memory:")
