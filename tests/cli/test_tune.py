"""``tune``: the grid, honest cross-validation, the label-free rule, the plot, and the line to paste."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import write_manifest

from nemo_llm_feedback.cli.jobs.nbest_probe import Look
from nemo_llm_feedback.cli.jobs.tune import (
    Tuned,
    TuneOptions,
    best_point,
    choose,
    labelled_grid,
    tuned_text,
)
from nemo_llm_feedback.cli.jobs.tune_plot import check_plot_path, write_plot
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.config import ProposalConfig, RunConfig
from nemo_llm_feedback.core.errors import ConfigError, RewardError
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.hypotheses.reward_scale import component_spread, from_spread
from nemo_llm_feedback.hypotheses.scored_nbest import NBestSettings

NAN = math.nan


def scored(texts: list[str], llm: list[float], asr: list[float]) -> ScoredGroup:
    """A group with these components; its first member is greedy."""
    members = tuple(Hypothesis(text, ()) for text in texts)
    lengths = [float(len(text.split())) for text in texts]
    return ScoredGroup(HypothesisGroup("u", members), {}, {}, parts={"llm": llm, "asr": asr, "length": lengths})


def look(references: list[str], entities: list[list[str]] | None = None) -> Look:
    """Rows with these texts."""
    rows = tuple(
        Row("a.wav", 1.0, float(i), text, Context(), f"m:{i}", {"entities": entities[i]} if entities else {})
        for i, text in enumerate(references)
    )
    return Look(RunConfig(), rows, len(rows), NBestSettings(ProposalConfig(), Context()), Path("x.nemo"))


# The truth is the LLM's favourite by 4 nats and the recogniser's second by 6: it wins for α > 1.5.
RIGHT = ["a latte", "the tea", "one mocha", "to go", "hot milk", "small tea"]
GROUPS = [scored(["wrong words", text], [-9.0, -5.0], [-1.0, -7.0]) for text in RIGHT]


# ---------------------------------------------------------------- choosing


def test_choice_follows_the_formula():
    group = scored(["a b c", "a", "a b"], [-9.0, -4.0, NAN], [-1.0, -5.0, 0.0])
    assert choose(group, alpha=0.0, beta=0.0) == 0
    assert choose(group, alpha=1.0, beta=0.0) == 1
    assert choose(group, alpha=1.0, beta=2.0) == 0
    assert choose(group, alpha=0.0, beta=0.0, asr_weight=0.0) == 0  # equal: the first
    assert choose(scored(["a", "b"], [NAN, NAN], [0.0, 1.0]), alpha=1.0, beta=0.0) == 0


def test_the_grid_finds_where_the_truth_wins():
    choice = TuneOptions(alphas=(0.0, 1.0, 2.0, 3.0), betas=(0.0, 2.0), folds=3)
    grid = labelled_grid(look(RIGHT), GROUPS, range(6), choice, asr_weight=1.0)
    assert {point: values["wer"] for point, values in grid.points.items()} == {
        (alpha, beta): (100.0 if alpha < 1.5 else 0.0) for alpha in choice.alphas for beta in choice.betas
    }
    assert grid.fold_choices == ((2.0, 0.0),) * 3  # the smallest of equals
    assert grid.cross_validated["wer"] == grid.oracle["wer"] == 0.0
    assert grid.greedy["wer"] == grid.default["wer"] == 100.0
    assert math.isnan(grid.greedy["ewer"])
    assert (grid.rows, grid.folds) == (6, 3)


def test_cross_validation_does_not_see_the_rows_that_it_reports():
    """One of two rows wants the LLM, the other the recogniser: each fold is told what is wrong for it."""
    groups = [
        scored(["wrong words", "a latte"], [-9.0, -5.0], [-1.0, -2.0]),
        scored(["the tea", "wrong words"], [-9.0, -5.0], [-1.0, -2.0]),
    ]
    choice = TuneOptions(alphas=(0.0, 1.0), betas=(0.0,), folds=2)
    grid = labelled_grid(look(["a latte", "the tea"]), groups, range(2), choice, asr_weight=1.0)
    assert [values["wer"] for values in grid.points.values()] == [50.0, 50.0]
    assert grid.cross_validated["wer"] == 100.0
    assert sorted(grid.fold_choices) == [(0.0, 0.0), (1.0, 0.0)]


def test_a_single_row_cannot_be_cross_validated():
    grid = labelled_grid(look(RIGHT[:1]), GROUPS[:1], [0], TuneOptions(), asr_weight=1.0)
    assert grid.folds == 0
    assert math.isnan(grid.cross_validated["wer"])


def test_the_metric_asked_for_decides():
    """α 1 repairs the entity at the price of two other words."""
    groups = [scored(["get me late now", "latte now"], [-9.0, -5.0], [-1.0, -2.0])]
    rows = look(["get me latte now"], [["latte"]])
    for metric, alpha in (("wer", 0.0), ("ewer", 1.0)):
        choice = TuneOptions(alphas=(0.0, 1.0), betas=(0.0,), metric=metric)
        grid = labelled_grid(rows, groups, [0], choice, asr_weight=1.0)
        values = {a: (v["wer"], v["ewer"]) for (a, _), v in grid.points.items()}
        assert values == {0.0: (25.0, 100.0), 1.0: (50.0, 0.0)}
        assert best_point(grid.points, metric) == (alpha, 0.0)


# ---------------------------------------------------------------- without labels


def test_without_labels_the_llm_gets_as_much_say_as_the_recogniser():
    groups = [
        scored(["a", "b"], [-3.0, -5.0], [-1.0, -7.0]),  # standard deviations 1 and 3
        scored(["a", "b c", "d"], [-1.0, -7.0, NAN], [-2.0, -4.0, NAN]),  # 3 and 1
        scored(["a"], [-1.0], [-1.0]),
    ]
    spread = component_spread(groups)
    assert spread == pytest.approx({"llm": 2.0, "asr": 4 / 2, "length": (0 + np.std([1, 2, 1])) / 2})
    assert from_spread({"llm": 4.0, "asr": 2.0}, factor=1.0, asr_weight=1.0) == (0.5, 1.0)
    assert from_spread({"llm": 4.0, "asr": 2.0}, factor=3.0, asr_weight=0.5) == (0.75, 1.5)
    for spread in ({"llm": 0.0, "asr": 1.0}, {"llm": NAN, "asr": 1.0}, {"llm": 1.0}):
        with pytest.raises(RewardError, match="spread"):
            from_spread(spread, factor=1.0, asr_weight=1.0)


# ---------------------------------------------------------------- refusals, text and plot


def test_every_fault_of_the_options_is_told():
    faults = TuneOptions(alphas=(-1.0,), betas=(), metric="cer", folds=1, factor=0.0).validate()
    assert [fault.split()[0] for fault in faults] == ["--alphas", "--betas", "--metric", "--folds", "--factor"]
    assert TuneOptions().validate() == []
    for path, words in (("x.docx", "end in"), ("/absent/x.html", "no such folder")):
        with pytest.raises(ConfigError, match=words):
            check_plot_path(path)


def tuned(grid: Any) -> Tuned:
    spread = {"llm": 2.0, "asr": 3.0, "length": 0.0}
    return Tuned(2.0, 0.0, spread, grid, TuneOptions(alphas=(0.0, 2.0), betas=(0.0,)), 6, 2.0, 1.0, "an LLM")


def test_text_and_plot_say_the_same(tmp_path):
    choice = TuneOptions(alphas=(0.0, 2.0), betas=(0.0,), folds=2)
    found = tuned(labelled_grid(look(RIGHT), GROUPS, range(6), choice, asr_weight=1.0))
    text = tuned_text(found)
    assert text.splitlines()[-1] == "reward.alpha=2 reward.beta=0"
    assert "cross-validated (2 folds)" in text
    assert "edge of the grid" in text
    assert "No transcripts" in tuned_text(tuned(None))
    for name in ("a.html", "a.svg", "a.png"):
        write_plot(found, str(tmp_path / name))
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<svg" in page
    assert "reward.alpha=2" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # names of formats, nothing that is fetched
    assert "src=" not in page
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- the command


def test_the_command_with_labels_and_without(nemo_file, tiny_llm, tmp_path, monkeypatch, capsys):
    manifest = write_manifest(tmp_path / "dev.json", ["a latte with soy", "one mocha", "tea is hot"])
    flags = [
        *("tune", str(nemo_file("rnnt_char")), "--manifest", str(manifest), "--llm", str(tiny_llm)),
        *("--description", "an order", "--cache", f"{tmp_path}/scores/"),
        *("--plot", str(tmp_path / "p.html"), "--json", str(tmp_path / "out.json")),
        *("--set", "proposals.beam=3", "proposals.boosted=0", "proposals.term_swap=0", "proposals.max_symbols=3"),
    ]
    assert main([*flags, "--alphas", "0", "1", "--betas", "0", "4"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    points = {(p["alpha"], p["beta"]): p["wer"] for p in found["grid"]["points"]}
    assert set(points) == {(0.0, 0.0), (0.0, 4.0), (1.0, 0.0), (1.0, 4.0)}
    assert points[found["alpha"], found["beta"]] == min(points.values())
    assert found["grid"]["folds"] == 3
    assert capsys.readouterr().out.splitlines()[-1] == found["line"]
    assert (tmp_path / "p.html").is_file()

    (tmp_path / "p.html").unlink()
    monkeypatch.setattr("nemo_llm_feedback.llm.scorer.load_model", lambda *_: pytest.fail("the LLM was loaded"))
    assert main([*flags, "--no-text", "--factor", "2"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["grid"] is None
    assert found["alpha"] == pytest.approx(2 * found["spread"]["asr"] / found["spread"]["llm"], rel=0.06)
    assert found["beta"] == pytest.approx(2 * found["alpha"], rel=0.06)
    assert not (tmp_path / "p.html").exists()

    assert main([*flags, "--metric", "ewer"]) == 1
    assert "entities" in capsys.readouterr().err
    assert main([*flags, "--folds", "1"]) == 1
