"""Tables of systems and metrics."""

from __future__ import annotations

import json

import pytest

from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.text import none
from nemo_llm_feedback.evaluation.metrics import CorpusScores, bootstrap, paired_difference, score_corpus
from nemo_llm_feedback.evaluation.records import Table, facts_text, to_json, to_plain
from nemo_llm_feedback.evaluation.tables import Cell, ScoreTable, build_table

REFERENCES = ["a b c d", "e f g h", "i j k l", "m n o p", "q r s t"]


def system(wrong: list[int]) -> CorpusScores:
    """A system that gets the first ``wrong[u]`` words of utterance u wrong; the first word of each is an entity."""
    hypotheses = [" ".join(["x"] * n + text.split()[n:]) for n, text in zip(wrong, REFERENCES, strict=True)]
    return score_corpus(REFERENCES, hypotheses, normalize=none, entities=[[text[0]] for text in REFERENCES])


BASE, BETTER = system([2, 2, 2, 2, 2]), system([1, 2, 1, 1, 1])
SETTINGS = {"samples": 500, "seed": 3}


def table(**changes) -> ScoreTable:
    arguments = {"metrics": ["wer", "entity_recall", "false_alarms"], "base": "base"} | SETTINGS | changes
    return build_table({"base": BASE, "ours": BETTER}, **arguments)


def test_cells_are_those_of_the_metrics():
    base, ours = table().rows["base"], table().rows["ours"]
    interval = bootstrap(BETTER, "wer", **SETTINGS)
    difference = paired_difference(BETTER, BASE, "wer", **SETTINGS)
    assert ours[0] == Cell(interval.value, interval.low, interval.high, -40.0, difference.p_value, -20.0)
    assert (base[0].value, base[0].change, base[0].p_value) == (50.0, None, None)
    assert ours[0].value == 30.0
    # recall is 0 in both: no relative change, but a test
    assert (ours[1].change, ours[1].p_value) == (None, 1.0)


def test_near_zero_the_change_is_in_points():
    assert Cell(0.9, 0.0, 2.0, None, 0.5, 0.5).against == "+0.5 points"
    one = score_corpus(["a b"] * 300, ["a b"] * 298 + ["a x"] * 2, normalize=none)
    more = score_corpus(["a b"] * 300, ["a b"] * 292 + ["a x"] * 8, normalize=none)
    cell = build_table({"base": one, "more": more}, metrics=["wer"], base="base", **SETTINGS).rows["more"][0]
    assert (cell.change, cell.difference) == (None, pytest.approx(1.0))
    assert "(+1.0 points)*" in str(cell)


def test_text_form():
    lines = table().table.to_text().splitlines()
    assert lines[0].split("  ")[0] == "system"
    assert "WER ↓ (%)" in lines[0]
    assert "entity recall ↑ (%)" in lines[0]
    assert "entity false alarms ↓ (per 100 utterances)" in lines[0]
    assert set(lines[1]) == {"-", " "}
    assert "50.0 [50.0, 50.0]" in lines[2]
    low, high = table().rows["ours"][0].low, table().rows["ours"][0].high
    assert f"30.0 [{low:.1f}, {high:.1f}] (−40.0 %) " in lines[3]  # four utterances that differ are too few for a *
    column = lines[0].index("WER")
    assert lines[2].index("50.0") == lines[3].index("30.0") == column
    assert lines[3].endswith("–")  # no term list: false alarms are undefined
    assert lines[-1].startswith("5 utterances; 95 % intervals by bootstrap over utterances (500 samples)")
    assert "relative to base" in lines[-1]


def test_markdown_form():
    made = build_table({"a|b": BASE, "two\nlines": BETTER}, metrics=["wer"], base="a|b", **SETTINGS)
    lines = made.table.to_markdown().splitlines()
    assert lines[0] == "| system | WER ↓ (%) |"
    assert lines[1] == "| --- | ---: |"
    assert lines[2] == "| a\\|b | 50.0 [50.0, 50.0] |"
    assert lines[3].startswith("| two lines | 30.0 [")
    assert lines[4] == ""


def test_without_base_there_is_no_change():
    plain = table(base=None)
    assert all(cell.change is None and cell.p_value is None for cells in plain.rows.values() for cell in cells)
    assert "relative" not in plain.caption


def test_json_form():
    data = json.loads(to_json(table().record))
    assert (data["utterances"], data["base"], data["samples"], data["seed"]) == (5, "base", 500, 3)
    ours = data["systems"]["ours"]
    assert ours["wer"]["value"] == 30.0
    assert ours["wer"]["change"] == pytest.approx(-40.0)
    assert ours["wer"]["unit"] == "%"
    assert ours["false_alarms"] == {
        "value": None, "low": None, "high": None, "change": None, "p_value": None, "difference": None,
        "unit": "per 100 utterances",
    }  # fmt: skip


def test_any_values_as_text_and_as_json():
    table = Table(["name", "share", "rows"], [["one", 0.125, 3], ["another", float("nan"), None]], "A caption.")
    assert table.to_text().splitlines() == [
        "name     share  rows",
        "-------  -----  ----",
        "one       0.12     3",
        "another      –",
        "",
        "A caption.",
    ]
    assert Table(["a"], []).to_text() == "a\n-"
    assert facts_text({"LLM": "none", "spread": 1.0}) == "LLM     none\nspread  1.00"
    record = {"cell": Cell(1.0, float("nan"), float("inf")), 3: (1, "x")}
    plain = {"value": 1.0, "low": None, "high": None, "change": None, "p_value": None, "difference": None}
    assert to_plain(record) == {"cell": plain, "3": [1, "x"]}
    assert json.loads(to_json(record)) == to_plain(record)


def test_a_cell_in_words():
    assert str(Cell(12.34, 11.0, 13.6)) == "12.3 [11.0, 13.6]"
    assert str(Cell(12.34, 11.0, 13.6, 3.21, 0.2)) == "12.3 [11.0, 13.6] (+3.2 %)"
    assert str(Cell(12.34, 11.0, 13.6, -3.21, 0.01)) == "12.3 [11.0, 13.6] (−3.2 %)*"
    assert str(Cell(float("nan"), float("nan"), float("nan"))) == "–"


def test_bad_input():
    with pytest.raises(ConfigError, match="unknown base system 'bsae': choose from base, ours"):
        table(base="bsae")
    with pytest.raises(ConfigError, match="unknown metric 'werr'"):
        table(metrics=["werr"])
    with pytest.raises(ConfigError, match="at least one"):
        build_table({}, metrics=["wer"], base=None, **SETTINGS)
    with pytest.raises(ConfigError, match="at least one"):
        table(metrics=[])
    other = score_corpus(["z"], ["z"], normalize=none)
    with pytest.raises(ManifestError, match="short: scored on other references than base"):
        build_table({"base": BASE, "short": other}, metrics=["wer"], base=None, **SETTINGS)


def test_score_rows_reads_entities_in_every_form_of_the_manifest() -> None:
    from nemo_llm_feedback.core.errors import ManifestError
    from nemo_llm_feedback.core.types import Context
    from nemo_llm_feedback.data.manifests import Row
    from nemo_llm_feedback.evaluation.scoring import score_rows

    forms = ["latte", ["latte"], [[1, 2]], [{"text": "latte", "type": "drink"}], {"drink": "latte"}]
    rows = [Row("a.wav", 1.0, 0.0, "a latte", Context(), "m:1", {"entities": form}) for form in forms]
    scores = score_rows(rows, ["a latte", "a lada"] * 2 + ["a latte"], run_context=Context())
    assert scores.column("entities").tolist() == [1] * 5
    assert scores.value("entity_recall") == 60.0
    with pytest.raises(ManifestError, match="m:1: `entities`: 7 is neither a string nor a span"):
        score_rows([Row("a.wav", 1.0, 0.0, "a", Context(), "m:1", {"entities": 7})], ["a"], run_context=Context())


def test_a_table_too_wide_for_a_terminal_has_a_row_per_metric():
    lines = table(metrics=["wer", "cer", "ewer", "entity_recall", "false_alarms"]).to_text().splitlines()
    assert lines[0].split() == ["base", "ours"]
    assert [line.split(" ")[0] for line in lines[2:5]] == ["WER", "CER", "EWER"]
    assert lines[2].count("[") == 2
    assert max(map(len, lines[:7])) <= 100
