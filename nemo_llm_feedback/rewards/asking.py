"""Base class of the rewards that ask an LLM, and the cache of its answers, which later runs share.

A key of the cache is a hash of everything that a score depends on. A value is the raw sum of log-probabilities and the
number of tokens, so that one entry serves every normalisation. Scores that are not finite are never kept.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.llm import TextScore
from nemo_llm_feedback.llm.encoding import hash_of

logger = logging.getLogger(__name__)

_RECENT = 100  # groups whose failures decide whether the run goes on
_FEWEST = 10  # as many groups count at least, so that one early failure does not count as 100 %
_MAX_FAILED = 0.2

Item = TypeVar("Item", bound=Hashable)
Pair = tuple[Context, str]
View = Callable[[HypothesisGroup], HypothesisGroup]
"""How a group is shown to the LLM: the same members, perhaps with other terms and another spelling."""


def score_key(identity: str, context: Context, text: str) -> str:
    """Returns the key of a text's score: a hash of the scorer's identity, the context and the text."""
    parts = [identity, context.description, list(context.terms), text]
    if context.previous:  # keys of contexts without it stay what they were
        parts.append(list(context.previous))
    return hash_of(parts)


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


class FailedGroups:
    """Counts the groups that got no reward though they should have, and stops a run in which they are too many.

    Args:
        judge: what gives no reward, in a sentence.
        most: share of the recent groups above which the run stops.
        fix: what to do then, as a sentence.

    Attributes:
        num_groups, num_failed: all groups and those without a reward so far.
    """

    def __init__(self, judge: str, *, most: float = _MAX_FAILED, fix: str) -> None:
        self._judge, self._most, self._fix = judge, most, fix
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self.num_groups = self.num_failed = 0

    def add(self, failed: Sequence[bool]) -> None:
        """Counts some groups, one flag each.

        Raises:
            RewardError: too many of the last groups failed.
        """
        self._recent.extend(failed)
        self.num_groups += len(failed)
        self.num_failed += sum(failed)
        if not any(failed):
            return
        counts = sum(failed), len(failed), self._judge, self.num_failed, self.num_groups
        logger.warning("%d of %d groups got no reward from %s (%d of %d so far).", *counts)
        if sum(self._recent) > self._most * max(len(self._recent), _FEWEST):
            raise RewardError(
                f"{self._judge} failed {sum(self._recent)} of the last {len(self._recent)} groups, more than "
                f"{self._fix}"
            )


class AskingReward:
    """What the rewards that ask an LLM share.

    Args:
        scorer: what asks the LLM; ``uses_context`` says whether its prompt shows the context at all, ``num_broken``,
            where it has one, counts answers that are no numbers.
        cache: store of raw scores, or the path of one on disk (see ``open_cache``); in memory by default.
        view: how groups are shown to the LLM; as they are by default.
        allow_no_context: take groups that have no context instead of refusing.
    """

    def __init__(
        self, scorer: Any, *, cache: ScoreCache | str | None, view: View | None, allow_no_context: bool
    ) -> None:
        self._scorer = scorer
        self.failed = FailedGroups(
            "the LLM",
            fix=f"a share of {_MAX_FAILED:g}: its scores are no numbers, so nothing judges the training any more. Its "
            "memory may be damaged, or its numbers overflow: resume the run, with llm.compute_dtype=float32 if it "
            "happens again.",
        )
        self.cache = open_cache(cache)
        self._view = view
        self._needs_context = scorer.uses_context and not allow_no_context

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up scores that the cache knew so far; NaN before the first."""
        asked = self.cache.hits + self.cache.misses
        return self.cache.hits / asked if asked else math.nan

    def _shown(self, groups: Sequence[HypothesisGroup]) -> list[HypothesisGroup]:
        """The groups as the LLM sees them.

        Raises:
            RewardError: names the first utterance without context where one is needed, and the fix.
        """
        for group in groups:
            if self._needs_context and not group.context:
                raise RewardError(
                    f"Utterance {group.utterance} has no context for the LLM: set context.description, context.terms "
                    "or context.terms_file, or a 'context' in the manifest row (context.required=false goes without)."
                )
        return [self._view(group) for group in groups] if self._view else list(groups)

    def _num_broken(self) -> int:
        return int(getattr(self._scorer, "num_broken", 0))

    def _count(self, rows: Sequence[Sequence[float]], *, broken: int) -> None:
        """Counts groups; a failed one has a member without a number, though the LLM can read it.

        Args:
            rows: the LLM's value of each member.
            broken: :meth:`_num_broken` before they were asked for.

        Raises:
            RewardError: too many of the last groups failed.
        """
        now = self._num_broken() > broken  # else a value is missing since a text does not fit the LLM
        self.failed.add([now and not all(map(math.isfinite, row)) for row in rows])

    def _look_up(
        self, keys: Mapping[Item, Sequence[str]], ask: Callable[[list[Item]], Mapping[Item, Sequence[TextScore]]]
    ) -> dict[Item, Sequence[TextScore]]:
        """Returns the scores of every item, asking for those that the cache lacks and keeping the answers.

        Args:
            keys: item → the keys of its scores, of which it may have several.
            ask: items → item → its scores, in the order of its keys.
        """
        known = self.cache.get_many([key for row in keys.values() for key in row])
        found: dict[Item, Sequence[TextScore]] = {
            item: [known[key] for key in row] for item, row in keys.items() if all(key in known for key in row)
        }
        if lacking := [item for item in keys if item not in found]:
            answers = ask(lacking)
            self.cache.put_many({k: s for item, row in answers.items() for k, s in zip(keys[item], row, strict=True)})
            found.update(answers)
        return found

    def _scores(
        self,
        pairs: Sequence[Pair],
        identities: Sequence[str],
        ask: Callable[[list[tuple[Context, list[str]]]], Sequence[Sequence[Sequence[TextScore]]]],
    ) -> dict[Pair, Sequence[TextScore]]:
        """Returns the scores of (context, text) pairs.

        Args:
            pairs: what is scored; a pair may come several times.
            identities: for each score of a pair, a name of everything else that it depends on.
            ask: (context, its texts) → per context, per text its scores; a context comes once, so that its prompt is
                run once.
        """

        def _by_context(lacking: list[Pair]) -> dict[Pair, Sequence[TextScore]]:
            texts: dict[Context, list[str]] = {}
            for context, text in lacking:
                texts.setdefault(context, []).append(text)
            answers = zip(texts.items(), ask(list(texts.items())), strict=True)
            return {
                (context, text): scores
                for (context, column), rows in answers
                for text, scores in zip(column, rows, strict=True)
            }

        keys = {pair: [score_key(identity, *pair) for identity in identities] for pair in dict.fromkeys(pairs)}
        return self._look_up(keys, _by_context)
