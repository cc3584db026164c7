"""Scripts without spaces: metrics, entities, false alarms, oracle, report and swaps count characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_llm_feedback.cli.jobs.evaluate import evaluate
from nemo_llm_feedback.core.text import basic, folded_words, join_words, text_length, words
from nemo_llm_feedback.evaluation.entities import Span, locate
from nemo_llm_feedback.evaluation.metrics import oracle
from nemo_llm_feedback.evaluation.report.words import align, changed_words, diff_pieces, term_changes
from nemo_llm_feedback.hypotheses.term_swaps import swap_terms
from nemo_llm_feedback.rewards.rules import repetition

TEXTS = ["请给我一杯抹茶拿铁谢谢", "我要两份小笼包", "明天早上八点叫我起床"]
ENTITIES = [["抹茶拿铁"], ["小笼包"], []]
BAD = ["请给我一杯摸茶那铁谢谢", "我要两份小龙包", "明天早上八点叫我起床抹茶拿铁"]


def _files(folder: Path) -> Path:
    def write(name: str, key: str, texts: list[str]) -> None:
        rows = [
            {"audio_filepath": f"/x/{i}.wav", "duration": 2.0, key: text, "entities": ENTITIES[i]}
            for i, text in enumerate(texts)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("manifest.json", "text", TEXTS)
    write("good.json", "pred_text", TEXTS)
    write("bad.json", "pred_text", BAD)
    (folder / "terms.txt").write_text("抹茶拿铁\n小笼包\n")
    return folder


def _check(folder: Path) -> None:
    found = evaluate(
        manifest=folder / "manifest.json",
        predictions=[folder / "good.json", folder / "bad.json"],
        terms_file=folder / "terms.txt",
    ).comparison
    good, bad = found.scores["good"], found.scores["bad"]
    assert found.missing == []
    assert int(good.column("entities").sum()) == 2
    assert (good.value("entity_recall"), bad.value("entity_recall")) == (100.0, 0.0)
    assert (good.value("wer"), bad.value("wer")) == (0.0, pytest.approx(25.0))
    assert (good.value("false_alarms"), bad.value("false_alarms")) == (0.0, pytest.approx(100 / 3))


def test_an_evaluation_counts_characters(tmp_path: Path) -> None:
    _check(_files(tmp_path))


def test_the_shared_case(shared: Path) -> None:
    _check(shared / "cases" / "05-scripts-without-spaces")


def test_words_are_one_definition() -> None:
    assert words("我要 latte 谢谢") == ["我", "要", "latte", "谢", "谢"]
    assert words("ที่นี่ don't") == ["ที่", "นี่", "don't"]
    assert join_words(words("我要 latte 谢谢")) == "我要 latte 谢谢"
    for text in ("Jean-Luc O’Brien", "don't ‘quote’", "AT&T 3.5", "抹茶 latte", "- --", "a½b", ""):
        assert [word for word, _, _ in folded_words(text)] == words(basic(text)), text
        assert text_length(text) <= max(1, len(words(text)))
    assert repetition("谢谢谢谢") == pytest.approx(2 / 3, abs=0.34)
    assert repetition("谢谢谢谢") > 0


def test_swaps_replace_the_characters_and_never_the_sentence() -> None:
    assert TEXTS[0] in swap_terms(BAD[0], ["抹茶拿铁"], min_similarity=50, limit=4)
    for text, term in (("コーヒーを二つお願いします", "coffee"), ("明天早上八点叫我起床", "抹茶拿铁")):
        assert term not in swap_terms(text, [term], min_similarity=1, limit=4)
    assert swap_terms("我要一杯 late 谢谢", ["latte"], min_similarity=60, limit=4) == ["我要一杯 latte 谢谢"]


def test_oracle_spans_and_the_report_count_characters() -> None:
    assert oracle(["我要两份小笼包"], [["小笼包", "我要两份小龙包"]], normalize=basic) == ["我要两份小龙包"]
    assert locate("我要两份小笼包", "我要两份小笼包", [4, 7], basic) == {(4, 7)}
    found = align(TEXTS[1], BAD[1], [Span(4, 7)])
    assert (found.errors, found.recalled, found.heard) == (1, (False,), ("小龙包",))
    assert [piece.text for piece in found.pieces] == ["我要两份", "小", "龙", "包"]
    assert changed_words(TEXTS[1], BAD[1]) == 1
    old, new = diff_pieces(TEXTS[1], BAD[1])
    assert [[p.text for p in side] for side in (old, new)] == [["我要两份小", "笼", "包"], ["我要两份小", "龙", "包"]]
    assert term_changes([(BAD[1], TEXTS[1])], [["小笼包"]], normalizer="basic") == {"小笼包": (0, 1)}
