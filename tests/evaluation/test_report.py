"""The report: one inert file, with the numbers of the tables, in a real browser where there is one."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import write_manifest

from nemo_llm_feedback.cli.jobs.report import report as rebuild
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, read_manifest
from nemo_llm_feedback.evaluation.comparison import Comparison, Member, Scoring, System, compare
from nemo_llm_feedback.evaluation.report import (
    Change,
    ReportData,
    adaptation_report,
    evaluation_report,
    load_report,
    save_report,
    write_report,
)
from nemo_llm_feedback.evaluation.report.data import Run, changed_settings
from nemo_llm_feedback.evaluation.report.page import GuardRow, _data_uri, _with_base, guard_rows
from nemo_llm_feedback.evaluation.report.plots import curves, read_numbers
from nemo_llm_feedback.evaluation.report.utterances import NBest, list_utterances
from nemo_llm_feedback.evaluation.report.words import align, diff_pieces, term_changes, term_rows
from nemo_llm_feedback.evaluation.transcribe import Decoded

ATTACK = "<img src=x onerror=document.title='taken'>"
TEXTS = ["a latte with soy", "one mocha to go", "thank you very much"]
BASE = ["a lada with soy", "one moka to", "thank you much"]
ADAPTED = ["a latte with soy", "one mocha two go", "thank you very very much"]
COMMAND = ["adapt", "a=1 b", "llm.token=sk-9 9", "--api-key", "sk-9", "--x", "1"]
ENTITIES = [[{"text": "latte", "type": "drink"}, "soy"], ["mocha"], []]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Three rows with audio and entities."""
    path = tmp_path_factory.mktemp("rows") / "dev.json"
    return read_manifest(write_manifest(path, TEXTS, entities=ENTITIES, speaker=["x", "y", "y"]))


@pytest.fixture(scope="module")
def comparison(rows: list[Row]) -> Comparison:
    """Base and adapted, the names and one N-best member of which are hostile."""
    nbest = tuple((Member(text, {"asr": -1.25, "llm": -20.5}), Member(ATTACK)) for text in ADAPTED)
    systems = [System("base", tuple(BASE)), System(f"$x$ {ATTACK}", tuple(ADAPTED), nbest, rtfx=12.0)]
    return compare(rows, systems, Scoring(group_by=("speaker",), samples=100))


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full page: curves, notes, audio."""
    folder = tmp_path_factory.mktemp("page")
    steps = [{"step": s, "feedback/reward_policy": -9.0 + s, "feedback/reward/llm": -5.0 + s} for s in range(1, 12)]
    lines = [*map(json.dumps, steps), json.dumps({"step": 5, "val/dev/wer": 33.0, "val/general/wer": 20.0}), '{"st']
    (folder / "steps.jsonl").write_text("\n".join(lines))
    data = evaluation_report(comparison, left_out=[ATTACK])
    data = dataclasses.replace(data, steps_file=str(folder / "steps.jsonl"), settings=f"key: '{ATTACK}'")
    return write_report(data, folder / "deep" / "report.html")


def visible(source: str) -> str:
    """The text of a page without tags, scripts and styles."""
    source = re.sub(r"<(style|script)>.*?</\1>", " ", source, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", source)).split())


def test_the_page_holds_the_numbers_of_the_table(page: Path, comparison: Comparison) -> None:
    text = visible(page.read_text(encoding="utf-8"))
    for name, cells in comparison.table().rows.items():
        assert name in text
        for cell in cells:
            assert cell.value != cell.value or f"{cell.value:.1f}" in text
    assert comparison.scores["base"].value("ewer") == pytest.approx(100 * 2 / 3)
    assert "Entity WER · evaluation set 66.7 → 0.0 %" in text
    assert "−100.0 % relative" in text
    assert "oracle WER of the N-best" in text
    assert "3 terms, spoken 3 times: 1 right before, 3 right after ; false alarms 0 before, 0 after." in text
    assert "By entity type" in text
    assert "−20.50" in text  # a score part of the N-best


def test_nothing_on_the_page_is_fetched_or_run(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    assert "<img" not in source
    assert not re.findall(r"""(?:src|href|action)=["'](?!#|data:)[^"']+""", source)
    assert "@import" not in source
    assert not re.findall(r"url\((?!#)", source)
    assert source.count("<script") == 1
    assert "default-src 'none'" in source
    assert len(re.findall(r'src="data:audio/(?:mpeg|flac);base64,', source)) == 3
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', source)) <= set(ids)


def test_private_audio_stays_out(comparison: Comparison, tmp_path: Path) -> None:
    source = write_report(evaluation_report(comparison), tmp_path / "r.html", audio=False).read_text(encoding="utf-8")
    assert "data:audio" not in source
    assert "Audio was left out" in source


@pytest.fixture(scope="module")
def browser() -> str:
    """A headless Chromium."""
    found = next(
        (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), ""
    )
    if not found:
        pytest.skip("no chromium or google-chrome on PATH: the page is not tried in a browser")
    return found


def test_a_real_browser_shows_the_numbers_and_runs_only_our_script(page: Path, browser: str, tmp_path: Path) -> None:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or "<html" not in done.stdout:
        pytest.skip(f"{browser} does not start here: {done.stderr[-200:]}")
    text = visible(done.stdout)
    assert "Entity WER · evaluation set 66.7 → 0.0 %" in text
    assert "3 of 3 utterances" in text  # written by the script, which the page's policy lets through
    assert "<img" not in done.stdout
    assert "<title>Evaluation: base against" in done.stdout
    assert '<form class="controls" id="controls">' in done.stdout  # no longer hidden


def test_a_run_folder_gives_the_same_page_again(comparison: Comparison, tmp_path: Path, capsys: Any) -> None:
    data = evaluation_report(comparison)
    data = dataclasses.replace(data, changes=(change(comparison.rows[0]),), surveyed=7)
    save_report(data, tmp_path)
    loaded = load_report(tmp_path)
    assert loaded.changes == data.changes
    assert str(loaded.sets["evaluation set"].table()) == str(comparison.table())
    first = write_report(data, tmp_path / "first.html", audio=False).read_text(encoding="utf-8")
    assert main(["report", str(tmp_path), "--no-audio"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first
    (tmp_path / "settings.yaml").write_text("report_audio: false\n", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0  # a run that was to show no recordings never does
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first


def test_what_was_said_before_is_kept_by_the_saved_report(rows: list[Row], tmp_path: Path) -> None:
    context = Context("an order", ("mocha",), previous=("hello", "what would you like"))
    said = [dataclasses.replace(row, context=context) for row in rows]
    compared = compare(said, [System("base", tuple(BASE))], Scoring(context=context))
    save_report(ReportData("t", "s", "now", sets={"dev": compared}, changes=(change(said[0]),)), tmp_path)
    loaded = load_report(tmp_path)
    assert loaded.sets["dev"].rows == tuple(said)
    assert loaded.sets["dev"].scoring.context == context
    assert loaded.changes[0].row.context == context


def change(row: Row) -> Change:
    return Change(
        row,
        "a lada",
        "a latte please",
        {"reward": (-30.0, -22.5), "llm": (-30.0, -22.5)},
        (Member("a latte", {"llm": -21.0}),),
    )


def test_without_references_it_shows_what_changed_and_by_which_scores(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 4, "held_out/kl": 0.5}\n{"step": 8, "held_out/kl": 0.75}\n')
    lost = dataclasses.replace(change(rows[1]), scores={"reward": (-10.0, -12.5)})
    run = Run(
        steps=8, kept_step=4, gain=3.25, share=0.5, limits={"kl": 4.0}, weights={"llm": 1.0}, terms={"latte": (0, 2)}
    )
    data = ReportData("Adaptation", "t", "now", changes=(change(rows[0]), lost), surveyed=9, run=run)
    data = dataclasses.replace(data, steps_file=str(tmp_path / "steps.jsonl"))
    text = visible(write_report(data, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert (
        "Settings Reward gained · per held-out utterance +3.25 nats Step 4 of 8 is kept" in text
    )  # what it opens with
    assert "Transcripts that changed 2 of 9 1 with more reward, 1 with less" in text
    assert "Guards all passed" in text
    assert "50 % of the update is exported" in text
    assert "distance from the base, nats per label 0.500 0.750 4" in text
    assert "Appeared 1 latte 0 → 2" in text
    assert "Most gained +7.50" in text
    assert "Most lost −2.50" in text
    assert "llm −30.00 → −22.50" in text
    assert "1-best of adapted" in text
    stopped = dataclasses.replace(run, kept_step=0, gain=-0.0, ended="too far away", held_out=False)
    stopped = dataclasses.replace(data, run=stopped)
    text = visible(write_report(stopped, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "The starting weights are kept" in text
    assert "Guards ended early too far away" in text
    assert "Reward gained · per trained utterance" in text
    assert "on trained utterances" in text


def test_terms_are_counted_as_in_the_metrics(rows: list[Row]) -> None:
    said = ["a lada with soy latte latte", "one mocha to go", "thank you mocha much"]
    compared = compare(rows, [System("base", tuple(BASE)), System("adapted", tuple(said))], Scoring(samples=10))
    aligned = [[align(row.text, texts[u], compared.spans[u]) for texts in (BASE, said)] for u, row in enumerate(rows)]
    found = {row.text: row for row in term_rows(compared, aligned)}
    assert list(found) == ["mocha", "latte", "soy"]
    latte = found["latte"]
    assert (latte.spoken, latte.right, latte.false_alarms, dict(latte.missed_as)) == (1, [0, 0], [0, 1], {"lada": 1})
    assert (found["mocha"].gain, found["mocha"].false_alarms, found["mocha"].missed_as) == (1, [0, 1], {})
    for s, name in enumerate(("base", "adapted")):
        scores = compared.scores[name]
        assert sum(row.right[s] for row in found.values()) == scores.column("entities_recalled").sum()
        assert sum(row.false_alarms[s] for row in found.values()) == scores.column("false_alarms").sum()


def test_terms_that_come_and_go_without_references() -> None:
    pairs = [("a lada", "a Latte, a latte"), ("one mocha", "one"), ("soy", "soy")]
    found = term_changes(pairs, [("latte", "Mocha", "soy")] * 3, normalizer="basic")
    assert list(found.items()) == [("latte", (0, 2)), ("mocha", (1, 0))]


def test_it_says_why_the_best_member_won() -> None:
    weights = {"llm": 2.0, "asr": 1.0}
    best = Member("a latte", {"reward": -11.0, "llm": -4.0, "asr": -3.0}, "boosted")
    other = Member("a lot", {"reward": -12.0, "llm": -4.5, "asr": -3.0}, "beam")
    greedy = Member("a lada", {"reward": -17.0, "llm": -8.0, "asr": -1.0}, "greedy")
    found = NBest.of([best, other, greedy], weights)
    assert (found.rival, found.why) == (greedy, {"llm": 8.0, "asr": -2.0})
    assert NBest.of([best, other], weights).rival == other
    assert NBest.of([best, other, greedy], {"llm": 1.0, "asr": 1.0}).why == {}  # not the sum that was used
    assert NBest.of([best], weights).rival is None


def test_only_settings_that_are_not_the_defaults_are_shown() -> None:
    from nemo_llm_feedback.core.config.compose import with_defaults

    given = {"objective": {"name": "distill"}, "guards": {"patience": 9}, "llm": {"model": "a/b", "chat": "auto"}}
    text = changed_settings(with_defaults(given))
    assert "patience: 9" in text
    assert "model: a/b" in text
    assert not {"max_kl", "chat", "seed", "distill"} & set(re.findall(r"\w+", text))


def test_a_page_that_cannot_be_written_names_its_path(comparison: Comparison, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "r.html"):
        with pytest.raises(ConfigError, match=re.escape(f"{path} cannot be written")):
            write_report(evaluation_report(comparison), path, audio=False)
    for flag in ("--report", "--json"):  # before the predictions are even read
        assert main(["evaluate", "--predictions", str(tmp_path / "absent"), flag, str(tmp_path)]) == 1
        assert "cannot be written" in capsys.readouterr().err


def test_guards_show_the_kept_step_and_the_furthest_value() -> None:
    steps = [
        {"step": 4.0, "held_out/length_ratio": 0.8, "held_out/gain": 1.0},
        {"step": 8.0, "held_out/length_ratio": 1.1, "held_out/gain": 2.0},
    ]
    found = guard_rows(steps, Run(kept_step=8, limits={"length_ratio": 1.5}))
    assert found == [GuardRow("length_ratio", 1.1, 0.8, 1.5), GuardRow("gain", 2.0, 2.0, None)]


def test_curves_mark_the_kept_step_refreshes_and_limits() -> None:
    steps = [{"step": float(s), "feedback/kl_reference": 1.0, "held_out/kl": 0.1 * s} for s in range(1, 9)]
    (plain,) = curves(steps)
    (marked,) = curves(steps, Run(kept_step=6, refresh_every=3, limits={"kl": 2.0}))
    assert "kept" in marked.svg
    assert "kept" not in plain.svg
    assert ("var(--bad)" in marked.svg, "var(--bad)" in plain.svg) == (True, False)
    assert marked.svg.count("<use") == plain.svg.count("<use") + 2  # steps 3 and 6
    (far,) = curves(steps, Run(limits={"kl": 400.0}))
    assert "var(--bad)" not in far.svg
    assert far.note.endswith("Limit 400.")


def test_a_running_job_shows_its_curves(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such folder"):
        rebuild(tmp_path / "absent")
    with pytest.raises(ManifestError, match=r"neither report_data\.json nor .*nemo_experiments/adapted/version_0"):
        rebuild(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "feedback/length_ratio": 1.0}\n{"step": 2')
    (tmp_path / "run.json").write_text(json.dumps({"command": ["/x/nlf", *COMMAND], "versions": {"torch": "9.9"}}))
    (tmp_path / "settings.yaml").write_text("reward:\n  api_key: sk-123\n  alpha: 1\n")
    source = rebuild(tmp_path).read_text(encoding="utf-8")
    assert "Length ratio" in source
    assert "The run has not finished" in source
    assert "nlf adapt 'a=1 b' 'llm.token=(hidden)' --api-key '(hidden)' --x 1" in visible(source)  # for a shell
    assert "sk-9" not in source
    assert "9.9" in source
    assert "sk-123" not in source
    with pytest.raises(ConfigError, match="would be written over, and this command reads it"):
        rebuild(tmp_path, output=tmp_path / "steps.jsonl")
    (tmp_path / "report_data.json").write_text('{"format": 0}')
    with pytest.raises(ManifestError, match="another version"):
        rebuild(tmp_path)


def test_the_report_of_an_adaptation(rows: list[Row], comparison: Comparison, tmp_path: Path) -> None:
    before, after = (comparison.scores[s.name] for s in comparison.systems)
    data = adaptation_report(
        log_dir=tmp_path,
        rows={"dev": rows},
        before={"dev": before},
        after={"dev": after},
        context=Context("an order", ("mocha",)),
        normalizer="basic",
        facts={
            "base": "b.nemo",
            "llm": None,
            "steps": 3,
            "kept_step": 2,
            "alpha": 1.5,
            "beta": 3.0,
            "gain": None,
            "learning_rate": 3e-5,
            "before": {"dev": {}},
        },
        settings={"llm": {"token": "hf_1", "model": "a/b"}, "x": [1, None], "guards": {"max_kl": 4.0}},
        nbest={"dev": [(Member("a latte", {"reward": -7.125, "asr": -3.5}),), (), ()]},
    )
    (tmp_path / "steps.jsonl").write_text('{"step": 4, "val/dev/wer": 33.0}\n')
    source = write_report(data, tmp_path / "r.html", audio=False).read_text(encoding="utf-8")
    assert "1-best of adapted" in source  # only the rows that have one
    assert source.count("-best of adapted") == 1
    assert "−7.12" in visible(source)
    assert not data.sets["dev"].oracles
    steps = [{"step": 4.0, "val/dev/wer": 33.0}]
    assert _with_base(steps, data.sets) == [{"step": 0.0, "val/dev/wer": before.value("wer")}, *steps]
    assert data.facts == {"Base": "b.nemo", "Learning rate": "3e-05", "Steps": "3", "Kept step": "2"}
    assert data.run is not None
    assert (data.run.kept_step, data.run.weights) == (2, {"llm": 1.5, "length": 3.0, "asr": 1.0})
    assert data.run.limits == {"kl": 4.0}
    assert "hf_1" not in data.settings
    assert data.sets["dev"].scores["adapted"].value("wer") == after.value("wer")
    assert data.sets["dev"].scoring.group_by == ("speaker",)
    assert data.steps_file == str(tmp_path / "steps.jsonl")


def test_words_of_a_diff() -> None:
    aligned = align("one iced mocha to go", "an one iced two mocha go", compare_spans())
    assert [(p.text, p.kind, p.entity) for p in aligned.pieces] == [
        ("an", "ins", False), ("one", "ok", False), ("iced", "ok", True), ("two", "ins", True),
        ("mocha", "ok", True), ("to", "del", False), ("go", "ok", False),
    ]  # fmt: skip
    assert (aligned.errors, aligned.recalled, aligned.heard) == (3, (False,), ("iced two mocha",))
    old, new = diff_pieces("a b c", "a x c")
    assert [p.kind for p in old] == ["ok", "old", "ok"]
    assert [p.kind for p in new] == ["ok", "new", "ok"]


def compare_spans() -> Any:
    rows = [Row("a.wav", 1.0, 0.0, "one iced mocha to go", Context(), "m:1", {"entities": ["iced mocha"]})]
    return compare(rows, [System("s", ("",))], Scoring()).spans[0]


def test_the_list_is_ordered_by_change_and_flagged(comparison: Comparison) -> None:
    listing = list_utterances({"dev": comparison}, [])
    assert [card.change for card in listing.cards] == sorted((card.change for card in listing.cards), reverse=True)
    flags = {card.row.text: set(card.flags) for card in listing.cards}
    assert flags["a latte with soy"] == {"changed", "better", "fixed"}
    assert flags["thank you very much"] == {"changed", "wrong"}


def test_no_term_links_to_an_utterance_that_is_not_listed(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most, dead in ((1, True), (1500, False)):
        monkeypatch.setattr("nemo_llm_feedback.evaluation.report.utterances.MAX_CARDS", most)
        source = write_report(evaluation_report(comparison), tmp_path / "r.html", audio=False).read_text()
        links, ids = re.findall(r'href="#(u[^"]+)"', source), re.findall(r'id="(u[^"]+)"', source)
        assert set(links) <= set(ids)
        assert bool(re.search(r'<th scope="row">(latte|soy|mocha)</th>', source)) == dead


def test_drawings_take_odd_names_and_undefined_values(tmp_path: Path) -> None:
    (drawn,) = curves([{"step": 1.0, "val/$a_b$/wer": 2.0, "val/<b>&/wer": 3.0}])
    assert "<b>" not in drawn.svg
    assert "&lt;b&gt;&amp;" in drawn.svg
    assert "$a_b$" in drawn.svg
    assert "var(--series-1)" in drawn.svg
    assert not re.search(r"#[0-9a-f]{6}", drawn.svg.replace("#000000", ""))
    (tmp_path / "s.jsonl").write_text('{"loss": 1}\n{"step": 1, "feedback/kl_reference": NaN, "text": "x"}\n')
    assert curves(read_numbers(tmp_path / "s.jsonl")) == []
    assert curves(read_numbers(None)) == []


@pytest.fixture(scope="module")
def trained(nemo_file: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Row]]:
    """A word-piece model as a run without reward leaves it, and its pool."""
    from helpers.fits import begin

    from nemo_llm_feedback.training.models import restore

    folder = tmp_path_factory.mktemp("trained")
    manifest = write_manifest(folder / "pool.json", [None, None])
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    data = {"manifest_filepath": str(manifest), "sample_rate": 16000, "batch_size": 2, "shuffle": False}
    sections = {
        "model": {"train_ds": data, "optim": {"lr": 1e-3}},
        "proposals": {"beam": 3, "boosted": 0, "term_swap": 0},
        "objective": {"name": "self_training"},
        "context": {"description": "an order"},
    }
    model.setup_feedback(sections, work_dir=folder)
    begin(model)
    return model, read_manifest(manifest)


def decoded(model: Any, texts: list[str], *, by_letter: bool = False) -> Decoded:
    """Transcripts with their labels, as the tokenizer splits them or one label per letter."""
    vocabulary = model.feedback.heads[0].vocabulary
    letters = {vocabulary.ids_to_text((i,)): i for i in range(vocabulary.vocab_size)}
    ids = [[letters[c] for c in text] if by_letter else vocabulary.text_to_ids(text) for text in texts]
    return Decoded(tuple(map(tuple, ids)), tuple(texts), ())


def test_changes_are_judged_by_the_runs_reward(trained: tuple[Any, list[Row]], monkeypatch: Any) -> None:
    from nemo_llm_feedback.core.types import RewardOutput, pad_groups
    from nemo_llm_feedback.evaluation.report.changes import judged_changes

    model, pool = trained
    before, after = decoded(model, ["a latte", "tea"]), decoded(model, ["a  latte", "a tea"])
    without = judged_changes(model, pool, before, after)
    assert [c.after for c in without] == ["a tea"]  # the first is the same after normalisation
    assert set(without[0].scores) == {"asr"}
    assert without[0].scores["asr"][0] != without[0].scores["asr"][1]
    assert {key for member in without[0].nbest for key in member.scores} == {"asr"}  # no reward, none shown

    def longest(groups: Any) -> RewardOutput:
        assert [h.source for h in groups[0].hypotheses].count("greedy") == 1
        values = pad_groups([[float(len(text)) for text in g.texts] for g in groups])
        return RewardOutput(values, {"asr": pad_groups([list(g.ref_logp) for g in groups])})

    monkeypatch.setattr(model.feedback.maker, "reward", longest)
    (judged,) = judged_changes(model, pool, before, after)
    assert judged.scores["reward"] == (3.0, 5.0)
    assert judged.scores["asr"] == pytest.approx(without[0].scores["asr"])
    rewards = [member.scores["reward"] for member in judged.nbest]
    assert len(rewards) > 1
    assert rewards == sorted(rewards, reverse=True)
    assert judged_changes(model, pool, before, before) == []


def test_the_report_scores_the_labels_that_were_decoded(trained: tuple[Any, list[Row]]) -> None:
    from nemo_llm_feedback.data.audio import load_audio
    from nemo_llm_feedback.evaluation.report.changes import judged_changes

    model, pool = trained
    texts, other = ["tea", "latte"], ["the", "late"]
    spelled, split = decoded(model, texts), decoded(model, texts, by_letter=True)
    assert spelled.labels != split.labels
    feedback = model.feedback
    for before in (spelled, split):
        for i, change in enumerate(judged_changes(model, pool, before, decoded(model, other))):
            audio = load_audio(pool[i : i + 1], sample_rate=16000, device=model.device)
            encoded = feedback.reference.encode(audio.signal, audio.signal_len)
            logp = feedback.reference.heads[0].score(*encoded, [[before.labels[i]]])
            assert change.scores["asr"][0] == pytest.approx(float(logp), abs=1e-2)


def test_terms_are_counted_in_all_transcripts_of_the_pool(rows: list[Row], tmp_path: Path) -> None:
    """Counted in the changed ones alone a term that stood in ten others had "appeared"."""
    pool = [(rows[0], "a latte", "a latte")] * 10 + [(rows[0], "a lada", "a latte")]
    data = adaptation_report(
        log_dir=tmp_path,
        rows={},
        before={},
        after={},
        context=Context("an order", ("latte",)),
        normalizer="basic",
        facts={},
        settings={},
        pool=pool,
    )
    assert data.surveyed == 11
    assert data.run is not None
    assert data.run.terms == {"latte": (10, 11)}


def test_audio_of_ready_transcripts_without_a_duration_is_played(rows: list[Row]) -> None:
    found = _data_uri(dataclasses.replace(rows[0], duration=0.0))
    assert found is not None
    assert found.startswith("data:audio/")
