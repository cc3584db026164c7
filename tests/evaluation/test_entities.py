"""Which words of a reference are entities: those that the manifest marks, else the context's terms in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Scoring, System, compare
from nemo_llm_feedback.evaluation.scoring import score_rows

MENU = Context("an order", ("latte", "Soy-Milk", "milk", "mocha"))
TEXTS = ["a latte with soy milk", "one tea", "milk, soy milk and a mocha"]
HEARD = ["a lottie with soy milk", "one tea", "milk so milk and a mocha"]


def _row(text: str, **data: Any) -> Row:
    return Row("a.wav", 1.0, 0.0, text, Context(), "m.json:1", data)


def test_without_marked_entities_the_terms_that_were_said_are_the_entities() -> None:
    rows = [_row(text) for text in TEXTS]
    scores = score_rows(rows, HEARD, run_context=MENU)
    # latte, soy milk | | milk, soy milk, mocha: seven words, of which "latte" and one "soy" are wrong
    assert scores.value("ewer") == pytest.approx(100 * 2 / 7)
    comparison = compare(rows, [System("a", HEARD)], Scoring(context=MENU))
    assert comparison.scores["a"].value("ewer") == scores.value("ewer")
    assert [(span.start, span.end) for span in comparison.spans[0]] == [(1, 2), (3, 5)]
    # Inside a longer term a term is no mention of its own; by itself it is.
    assert [(span.start, span.end) for span in comparison.spans[2]] == [(0, 1), (1, 3), (5, 6)]
    assert comparison.scores["a"].column("entities").tolist() == [2, 0, 3]
    assert "Entities: the terms that a reference holds, as no row has the key `entities`." in comparison.basis
    assert "ewer" in comparison.metrics


def test_typed_entities_have_scores_of_their_own() -> None:
    rows = [_row(TEXTS[0], entities=[{"text": "latte", "type": "drink"}, {"text": "soy milk", "type": "extra"}])]
    comparison = compare(rows, [System("a", HEARD[:1])], Scoring())
    assert {name: scores["a"].value("ewer") for name, scores in comparison.by_type.items()} == {
        "drink": 100,
        "extra": 0,
    }


def test_marked_entities_are_all_that_count() -> None:
    rows = [_row(TEXTS[0], entities=["latte"]), _row(TEXTS[1]), _row(TEXTS[2])]
    scores = score_rows(rows, HEARD, run_context=MENU)
    assert scores.value("ewer") == 100.0
    comparison = compare(rows, [System("a", HEARD)], Scoring(context=MENU))
    assert not any("Entities" in line for line in comparison.basis)


def test_a_span_outside_its_text_names_its_row() -> None:
    """It named "utterance 0", whichever row it was in; bias words outside their text were dropped."""
    rows = [_row(TEXTS[0]), replace(_row(TEXTS[1], entities=[{"start": 50, "end": 60}]), origin="m.json:2")]
    rows.append(replace(_row(TEXTS[2], entities=[[0, 99]]), origin="m.json:3"))
    said = r"2 row\(s\) have entities.*m\.json:2: `entities`: .*\(50, 60\).*not the characters.*m\.json:3"
    with pytest.raises(ManifestError, match=f"(?s){said}"):
        score_rows(rows, HEARD, run_context=Context())
    for scoring in (Scoring(), Scoring(bias_key="entities")):
        with pytest.raises(ManifestError, match=f"(?s){said}"):
            compare(rows, [System("a", tuple(HEARD))], scoring)
    bias = [replace(row, data={"rare": row.data.get("entities", [])}) for row in rows]
    with pytest.raises(ManifestError, match=r"(?s)m\.json:2: `rare`.*m\.json:3"):
        compare(bias, [System("a", tuple(HEARD))], Scoring(bias_key="rare"))


def test_without_terms_there_are_no_entities() -> None:
    comparison = compare([_row(text) for text in TEXTS], [System("a", HEARD)], Scoring())
    assert "ewer" not in comparison.metrics
    assert not any("Entities" in line for line in comparison.basis)
