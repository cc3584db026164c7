"""The test beds: what each row trains on, and that its settings are settings."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_llm_feedback.core.config import parse_run_config
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.evaluation.metrics import bootstrap, score_corpus
from nemo_llm_feedback.training.inputs import rates_to_try

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "experiments"


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module; the scripts import each other by their names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bed as module

    yield module
    for name in ("bed", "inference", "settings"):
        sys.modules.pop(name, None)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def made(bed: Any, tmp_path: Path) -> tuple[Any, Any]:
    """Options and a bed of two rows with a text that must not be read."""
    pool = [{"audio_filepath": f"{i}.ogg", "duration": 2, "text": f"secret {i}", "entities": ["x"]} for i in range(2)]
    general = [{"audio_filepath": f"g{i}.ogg", "duration": 1.0 + i, "text": f"general {i}"} for i in range(12)]
    pool_file = _write(tmp_path / "pool.json", pool)
    replay = {_write(tmp_path / "general" / "a.json", general): 1.0}
    terms = tmp_path / "menu.json"
    terms.write_text('["soy latte"]')
    options = bed.parser("x", steps=16).parse_args(["data", "base.nemo", "--out", str(tmp_path / "out"), "--held"])
    options.llm = tmp_path
    others = tmp_path / "whisper.json"
    others.write_text('{"0.ogg": "One latte.", "1.ogg": "Two mochas."}')
    return options, bed.Bed(pool_file, "an order, at a shop", terms, replay, pool_file, ("a hospital", terms), others)


@pytest.mark.parametrize(
    ("judge", "name", "flags"),
    [
        ([], "rescored_dev", ["--alpha", "2.0", "--beta", "4.0"]),
        (
            ["--judge", "reward=entity", "reward.alpha=2"],
            "rescored_judge_dev",
            ["--set", "reward=entity", "reward.alpha=2"],
        ),
    ],
)
def test_rescored_rows_name_their_reward(
    judge: list[str], name: str, flags: list[str], bed: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another reward chose lies in a file of its own, so that no row shows the other's transcripts."""
    _, domain = made
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(bed, "rescored", lambda model, manifest, target, **more: seen.append((target, more["judge"])))
    arguments = ["data", "base.nemo", "--out", str(tmp_path), "--inference", "rescored", *judge]
    options = bed.parser("x", steps=16).parse_args(arguments)
    assert bed._predictions(options, domain, bed.TestSet("dev", tmp_path / "dev.json")) == [str(seen[0][0])]
    assert seen == [(tmp_path / f"{name}.json", flags)]


def test_a_row_trains_on_the_pool_without_its_text_and_on_as_much_held_speech(
    bed: Any, made: Any, tmp_path: Path
) -> None:
    options, domain = made
    options.steps = 1
    rows = bed.read_rows(bed._training_rows("feedback", domain, options, replay=True))
    pool, general = rows[:8], rows[8:]
    assert not any({"text", "entities"} & set(row) for row in pool)
    assert len({row["audio_filepath"] for row in pool}) == 2
    assert len(general) == 8
    assert len({row["audio_filepath"] for row in general}) == 6  # all that have 1 to 8 seconds, before one comes again
    options.pool_rows = 1
    part = bed.read_rows(bed._training_rows("feedback", domain, options, replay=True))
    assert [row["audio_filepath"] for row in part[:8]] == 8 * [pool[0]["audio_filepath"]]
    assert len(part) == len(rows)
    assert all(row["replay"] == "kl" and "text" not in row for row in general)
    other = _write(tmp_path / "other.json", [{"audio_filepath": "o.ogg", "duration": 2, "text": "o"}])
    options.general_speech = [f"{other}=0.5"]
    general = bed.read_rows(bed._training_rows("feedback", domain, options, replay=True))[8:]
    assert [row["audio_filepath"] for row in general] == 4 * [str(tmp_path / "o.ogg")]
    labelled = bed.read_rows(bed._training_rows("supervised", domain, options, replay=False))
    assert [row["text"] for row in labelled[:2]] == ["secret 0", "secret 1"]
    assert len(labelled) == 8
    options.steps = 3
    assert len(bed.read_rows(bed._training_rows("supervised", domain, options, replay=False))) == 24


def test_rows_of_another_recogniser_have_its_transcripts_and_no_text(bed: Any, made: Any, tmp_path: Path) -> None:
    options, domain = made
    rows = bed.read_rows(bed._training_rows("feedback_others", domain, options, replay=True))
    pool = [row for row in rows if row.get("replay") != "kl"]
    assert {Path(row["audio_filepath"]) for row in pool} == {tmp_path / "0.ogg", tmp_path / "1.ogg"}
    assert {row["hypotheses"][0]["text"] for row in pool} == {"One latte.", "Two mochas."}
    assert not any("text" in row for row in pool)


def test_every_row_has_settings_that_adapt_accepts(bed: Any, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options, domain = made
    monkeypatch.setattr(bed, "_training_rows", lambda *args, **kwargs: "train.json")
    options.held_weight, options.held_augment = 2.0, True
    for name in bed.ROWS:
        cfg = compose_config(bed.row_overrides(name, options, domain, [Path("dev.json")], target=Path("a.nemo")))
        tree: Any = OmegaConf.to_container(cfg)
        config = parse_run_config(tree)
        tried = rates_to_try(tree["model"], config)
        others = {"feedback_wrong_context": "a hospital", "feedback_no_context": ""}
        assert config.context.description == others.get(name, "an order, at a shop")
        labelled = name in ("supervised", "self_training_boosted")  # NeMo's loss as it is, beside what is held
        assert (config.feedback.supervised_weight, config.feedback.replay_weight) == (1.0 if labelled else 2.0, 2.0)
        assert config.feedback.replay_augment
        if name.startswith("feedback_defaults"):
            assert tried
            assert config.reward.scaled_by_pool
            assert config.feedback.refresh_every == 50
        else:
            assert not tried
            weights = {"feedback_no_llm": (0.0, 0.0), "feedback_no_length_term": (2.0, 0.0)}.get(name, (2.0, 4.0))
            assert config.reward.weights == weights or not config.reward.weighed
            assert config.feedback.refresh_every == 4


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import table as module

    yield module
    sys.modules.pop("table", None)


def _scores(hypotheses: list[str]) -> Any:
    references = [f"one soy latte number {i} please" for i in range(40)]
    assert len(references) == len(hypotheses)
    return score_corpus(references, hypotheses, normalize=get_normalizer("basic"), entities=[["soy latte"]] * 40)


def test_the_tables_interval_is_the_librarys_where_there_is_one_seed(table: Any) -> None:
    scores = _scores([f"one soy latte number {i} please" if i % 3 else "one so let a number" for i in range(40)])
    cell = table.Draws(40).cell([scores], "ewer")
    known = bootstrap(scores, "ewer", samples=10_000, seed=1)
    assert cell.value == pytest.approx(known.value)
    assert [cell.low, cell.high] == pytest.approx([known.low, known.high], abs=2.5)


def test_the_tables_changes_are_of_means_over_seeds_and_paired(table: Any) -> None:
    right = [f"one soy latte number {i} please" for i in range(40)]
    base = _scores(["one so let number", *right[1:20], *["one so let number"] * 20])
    seeds = [_scores(["one so let number", *right[1:]]), _scores(right)]
    found = table.cells({"base": [base], "same": [base], "ours": seeds}, "same")
    assert found["same"]["ewer"].change == 0
    assert found["same"]["ewer"].p_value == 1
    ours = found["ours"]["ewer"]
    assert ours.seeds == pytest.approx((2.5, 0.0))
    assert ours.value == pytest.approx(1.25)
    assert ours.change == pytest.approx(100 * (1.25 / 52.5 - 1))
    assert ours.change_low < ours.change <= ours.change_high < -85
    assert ours.p_value == pytest.approx(2e-4)
    assert found["ours"]["ewer_against"].change == ours.change
    printed = table.markdown(found, {"guard": {"ours": {"wer": found["ours"]["wer"]}}})
    assert "| ours | 2 |" in printed
    assert "**-97.6 %" in printed


def test_a_fresh_draw_leaves_out_what_pool_and_dev_say(
    bed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import invented

    def sentences(name: str, *texts: str, folder: Path) -> None:
        _write(folder / f"{name}.json", [{"audio_filepath": f"{t}.ogg", "duration": 1.0, "text": t} for t in texts])

    data = tmp_path / "data"
    for name in ("pool_labels", "dev", "general_dev"):
        sentences(name, f"in {name}", folder=data)

    def make(shared: Path, out: Path, *, seed: int, sizes: Any) -> None:
        for name in ("test", "test_unseen_voice", "general"):
            sentences(name, "in pool_labels", "in dev", "in general_dev", f"new {seed} {name}", folder=out)

    monkeypatch.setattr(invented, "make_data", make)
    fresh = invented.fresh_tests(tmp_path, data, seed=7)
    monkeypatch.delitem(sys.modules, "invented")
    assert fresh != data
    for name in ("test", "test_unseen_voice", "general"):
        (row,) = bed.read_rows(fresh / f"{name}.json")
        assert row["text"] == f"new 7 {name}"
        assert row["audio_filepath"] == str(fresh / f"new 7 {name}.ogg")


def test_every_run_of_an_objective_has_settings_that_adapt_accepts(
    bed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import objectives

    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(objectives.importlib.util, "find_spec", lambda _: package)
    options = argparse.Namespace(out=tmp_path, target=tmp_path / "dev.json", llm=None)
    for name, rate in itertools.product([*objectives.COMPARED, *objectives.TRIED], objectives.RATES):
        cfg = objectives.run_settings(options, name, rate)
        assert parse_run_config(cfg).objective.name == name.partition(",")[0]
        assert cfg.model.optim.lr == rate


def test_settings_given_reach_every_row(bed: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that is left to the defaults takes what is set by hand, too; a grid would run it unchanged, unsaid."""
    options, domain = made
    monkeypatch.setattr(bed, "_training_rows", lambda *args, **kwargs: "train.json")
    options.set = ["model.optim.lr=1e-3"]
    for name in bed.ROWS:
        overrides = bed.row_overrides(name, options, domain, [], target=tmp_path / "a.nemo")
        assert [item for item in overrides if item.startswith("model.optim.lr=")][-1:] == options.set, name


def test_every_ablation_has_a_row_whose_settings_come_last(bed: Any, made: Any, tmp_path: Path) -> None:
    """Over those that all rows have: `reward.asr_weight=0` and so on must be what trains."""
    options, domain = made
    rows = [name for name in bed.ROWS if name.startswith(("feedback_n_", "feedback_source_", "feedback_reward_"))]
    assert len(rows) == 12
    for name in [*rows, "feedback_no_asr_term", "feedback_no_length_term", "feedback_llm_in_16_bit"]:
        overrides = bed.row_overrides(name, options, domain, [], target=tmp_path / "a.nemo")
        assert overrides[-len(bed.ROWS[name]) :] == bed.ROWS[name], name
        assert bed.ROWS[name]


def test_the_picture_of_pool_size_starts_at_the_base_and_takes_the_rows_of_its_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import pool_size

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pool_size.py", "out.png", "8=large", "2=small", "--sets", "dev"])
    cell = {"value": 50.0, "low": 40.0, "high": 60.0}
    for folder, value in (("small", 30.0), ("large", 20.0)):
        here = cell | {"value": value, "low": value - 5, "high": value + 5}
        systems = {"start": {"wer": cell, "ewer": cell}, "feedback_seed1": {"wer": here, "ewer": here}}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dev_seed1.json").write_text(json.dumps({"base": "start", "systems": systems}))
    pool_size.main()
    assert (tmp_path / "out.png").stat().st_size > 1000
    found = pool_size.points(
        {8: tmp_path / "large", 2: tmp_path / "small"}, "dev_seed1.json", metric="ewer", system="feedback_seed1"
    )
    assert found == [(0, 50.0, 40.0, 60.0), (2, 30.0, 25.0, 35.0), (8, 20.0, 15.0, 25.0)]
    sys.modules.pop("pool_size")


def test_the_bases_sentences_leave_out_those_of_manifests_reserved_ones_and_the_domains_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER / "invented_names"))
    import finetune_base

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "commands.txt").write_text("play a song\nstop the music\ncall doctor bexalone\nturn it off\n")
    (tmp_path / "text" / "reserved_commands.txt").write_text("stop the music\n")
    draw = {"seed": 1, "number": 10, "shares": ["commands=1.0"], "terms": ["bexalone"]}
    assert sorted(finetune_base.general_sentences(tmp_path, **draw)) == ["play a song", "turn it off"]
    spoken: dict[str, list[str]] = {}
    monkeypatch.setattr(finetune_base, "speak", lambda texts, *_, name, **__: spoken.setdefault(name, texts))
    monkeypatch.setattr(finetune_base, "BASE_DRAWS", ())
    (tmp_path / "terms.txt").write_text("bexalone\n")
    heard = _write(tmp_path / "heard.json", [{"audio_filepath": "a.wav", "duration": 1.0, "text": "turn it off"}])
    args = argparse.Namespace(
        data=tmp_path, shared=tmp_path, work=tmp_path, without=[heard], seed=1, sentences=10, aside=10
    )
    args.shares, args.voices = ["commands=1.0"], ["slt"]
    finetune_base.speak_all(args)
    assert spoken == {"train": ["play a song"], "aside": []}
    for name in ("finetune_base", "on_demand", "speech"):
        sys.modules.pop(name, None)
