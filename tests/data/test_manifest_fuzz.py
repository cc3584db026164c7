"""Fuzzed manifest lines: rows or one typed error, in every reader, and what is staged can be read again."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_llm_feedback.core.errors import FeedbackError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.data.staging import write_copies
from nemo_llm_feedback.evaluation.entities import row_entities
from nemo_llm_feedback.evaluation.predictions import read_predictions, rows_of_predictions
from nemo_llm_feedback.evaluation.scoring import score_rows

LINES = 20
KEYS = ["audio_filepath", "audio_filename", "duration", "offset", "text", "context", "replay", "entities", "shard_id"]
KEYS += ["pred_text", "nbest", "lang", "sampling_rate"]

numbers = st.one_of(st.integers(-5, 90000), st.floats(), st.integers(-(10**400), 10**400), st.floats(0.1, 30))
texts = st.one_of(st.text(max_size=30), st.sampled_from(["a.wav", "b (1).wav", "1.5", "kl", "supervised", "nan", ""]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
good = st.fixed_dictionaries(
    {"audio_filepath": st.sampled_from(["a.wav", "/b.wav"]), "duration": st.floats(0.1, 30), "pred_text": texts}
)
rows = st.builds(
    lambda base, extra: {**base, **extra}, good, st.dictionaries(st.sampled_from(KEYS), values, max_size=5)
)
lines = st.one_of(
    rows.map(json.dumps),
    rows.map(lambda row: json.dumps(row, ensure_ascii=False)),
    values.map(json.dumps),
    st.text(max_size=60),
)


def _check(folder: Path, found: list[str]) -> int:
    """Reads the lines by every reader; returns the number of rows that the manifest reader took one by one."""
    path, taken = folder / "m.json", 0
    for number, content in enumerate(["\n".join(found), *found]):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            read = read_manifest(path)
        except FeedbackError:
            pass
        else:
            taken += len(read) if number else 0
            assert all(0 < row.duration <= 86400 and math.isfinite(row.offset) and row.offset >= 0 for row in read)
            copy = read_manifest(write_copies(str(path), read, folder / "copies"))
            assert [(row.utterance, row.text, row.context) for row in copy] == [
                (row.utterance, row.text, row.context) for row in read
            ]
            _typed(lambda read=read: row_entities(read))
            _typed(lambda read=read: score_rows(read, [row.text for row in read], run_context=Context()))
        _typed(lambda: read_predictions(path, rows_of_predictions(path), name="system"))
    return taken


def _typed(work: Any) -> None:
    with contextlib.suppress(FeedbackError):
        work()


def _fuzz(folder: Path, count: int) -> None:
    taken = 0

    @settings(
        max_examples=count // LINES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(lines, min_size=LINES, max_size=LINES))
    def check(found: list[str]) -> None:
        nonlocal taken
        taken += _check(folder, found)

    check()
    assert taken > count / 20, "the fuzz reaches no row"


def test_some_fuzzed_manifest_lines_are_rows_or_a_typed_error(tmp_path: Path) -> None:
    _fuzz(tmp_path, 400)


@pytest.mark.slow
def test_fuzzed_manifest_lines_are_rows_or_a_typed_error(tmp_path: Path) -> None:
    _fuzz(tmp_path, 10_000)
