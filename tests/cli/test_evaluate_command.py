"""`evaluate`: systems from checkpoints and from ready transcripts, breakdowns, and everything that is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import write_audio, write_manifest

from nemo_llm_feedback.cli.jobs.evaluate import (
    evaluate,
    evaluation_record,
    evaluation_text,
    system_names,
)
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Scoring, System, compare
from nemo_llm_feedback.evaluation.entities import Span, TypedEntity, parse_entities
from nemo_llm_feedback.evaluation.predictions import rows_of_predictions

ROWS: list[dict[str, Any]] = [
    {
        "audio_filepath": "a.wav",
        "text": "A large iced mocha, please.",
        "entities": [{"text": "iced mocha", "type": "drink"}, {"span": [1, 2], "type": "size"}],
        "speaker": "x",
    },
    {"audio_filepath": "b.wav", "text": "one mocha", "entities": [{"text": "mocha", "type": "drink"}], "speaker": "y"},
    {"audio_filepath": "c.wav", "text": "thank you", "speaker": "y"},
]
BASE = ["a large iced moka please", "one locker", "thank you"]
BETTER = ["a large iced mocha please", "one mocha", "thank you latte"]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def predictions(path: Path, texts: list[str], rows: list[dict[str, Any]] = ROWS, **more: list[Any]) -> str:
    """A predictions file: the rows with ``pred_text`` and further keys."""
    extra = [{key: values[i] for key, values in more.items()} for i in range(len(rows))]
    return write_lines(path, [r | {"pred_text": t} | e for r, t, e in zip(rows, texts, extra, strict=True)])


def manifest(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    return write_lines(path, [row | {"duration": 1.0} for row in rows])


def both(folder: Path, **more: Any) -> Any:
    """The evaluation of the two systems."""
    files = [predictions(folder / "base.json", BASE), predictions(folder / "better.json", BETTER)]
    return evaluate(manifest=manifest(folder / "m.json"), predictions=files, **more)


def test_two_systems_from_ready_transcripts(tmp_path: Path) -> None:
    evaluation = both(tmp_path, group_by=("speaker",), terms=["mocha", "latte"], samples=200)
    comparison = evaluation.comparison
    assert comparison.scores["base"].value("wer") == pytest.approx(100 * 2 / 9)
    assert comparison.scores["better"].value("wer") == pytest.approx(100 * 1 / 9)
    assert comparison.scores["base"].value("ewer") == pytest.approx(100 * 2 / 4)
    assert comparison.scores["better"].value("entity_recall") == 100
    assert comparison.scores["better"].value("false_alarms") == pytest.approx(100 / 3)
    assert comparison.by_type["drink"]["base"].value("ewer") == pytest.approx(100 * 2 / 3)
    assert comparison.by_type["size"]["base"].value("entity_recall") == 100
    assert comparison.by_group["speaker"]["y"]["base"].value("wer") == pytest.approx(100 / 4)
    text = evaluation_text(evaluation)
    assert "Text normalisation: basic (NFKC" in text
    assert "(−50.0 %)" in text
    assert "False alarms: 2 different terms, the context's terms." in text
    numbers = evaluation_record(evaluation)
    assert numbers["by_group"]["speaker"]["x"]["better"]["wer"]["value"] == 0
    assert numbers["normalizer"] == "basic"
    assert json.dumps(numbers, allow_nan=False)


def test_without_a_term_list_the_manifests_entities_are_the_list(tmp_path: Path) -> None:
    evaluation = both(tmp_path, samples=50)
    assert (evaluation.comparison.terms, evaluation.comparison.terms_from) == (3, "all entities of the manifest")


def test_the_normalisation_can_be_switched_off(tmp_path: Path) -> None:
    files = [predictions(tmp_path / "p.json", BETTER)]
    scoring: dict[str, Any] = {"normalizer": "none", "entities_key": "entities", "samples": 50}
    said = r"(?s)`evaluate --missing-entities skip`.*'iced mocha' in"  # "mocha," with its comma
    with pytest.raises(ManifestError, match=said):
        evaluate(manifest=manifest(tmp_path / "m.json"), predictions=files, **scoring)
    skipping: dict[str, Any] = {"normalizer": "none", "missing_entities": "skip", "samples": 50}
    evaluation = evaluate(manifest=manifest(tmp_path / "m.json"), predictions=files, **skipping)
    assert evaluation.comparison.scores["p"].value("wer") == pytest.approx(100 * 4 / 9)
    assert "1 entities are not in their reference" in evaluation_text(evaluation)


def test_predictions_hold_their_own_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [predictions(tmp_path / "base.json", BASE), predictions(tmp_path / "better.json", BETTER)]
    assert main(["evaluate", "--predictions", *files, "--resamples", "50", "--json", str(tmp_path / "n.json")]) == 0
    assert "better" in capsys.readouterr().out
    assert json.loads((tmp_path / "n.json").read_text())["systems"]["base"]["wer"]["value"] == pytest.approx(200 / 9)


def test_oracle_and_biased_words_from_predictions(tmp_path: Path) -> None:
    nbest = [[{"text": b, "asr": -2.0, "parts": {"llm": -9.5}}, r["text"]] for b, r in zip(BASE, ROWS, strict=True)]
    file = predictions(tmp_path / "base.json", BASE, nbest=nbest)
    scoring: dict[str, Any] = {"bias_key": "entities", "samples": 50}
    evaluation = evaluate(manifest=manifest(tmp_path / "m.json"), predictions=[file], **scoring)
    comparison = evaluation.comparison
    assert comparison.oracles["base"].value("wer") == 0
    assert comparison.systems[0].nbest[0][0].scores == {"asr": -2.0, "llm": -9.5}
    assert comparison.scores["base"].value("b_wer") == pytest.approx(100 * 2 / 4)
    assert "oracle WER 0.0" in evaluation_text(evaluation)
    assert "B-WER" in evaluation_text(evaluation)


def test_an_utterance_is_found_under_any_spelling_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    rows = [row | {"audio_filepath": str(tmp_path / row["audio_filepath"])} for row in ROWS]
    absolute = predictions(tmp_path / "out" / "p.json", list(reversed(BASE)), list(reversed(rows)))
    evaluation = evaluate(manifest=manifest(tmp_path / "m.json"), predictions=[absolute], samples=50)
    assert evaluation.comparison.systems[0].texts == tuple(BASE)


def test_segments_of_one_file_are_told_apart_by_their_offset(tmp_path: Path) -> None:
    rows = [{"audio_filepath": "long.wav", "offset": 2.5 * i, "text": f"word{i}"} for i in range(3)]
    file = predictions(tmp_path / "p.json", ["word2", "word1", "word0"], list(reversed(rows)))
    evaluation = evaluate(manifest=manifest(tmp_path / "m.json", rows), predictions=[file], samples=50)
    assert evaluation.comparison.scores["p"].value("wer") == 0


def test_segments_of_one_place_are_told_apart_by_their_duration(tmp_path: Path) -> None:
    """Rows that share audio and offset could not be evaluated: "occurs twice", and nothing helped."""
    rows = [{"audio_filepath": "long.wav", "duration": 1.0 + i, "text": f"word{i}"} for i in range(3)]
    labels = write_lines(tmp_path / "m.json", rows)
    file = predictions(tmp_path / "p.json", ["word2", "word1", "word0"], list(reversed(rows)))
    assert evaluate(manifest=labels, predictions=[file], samples=50).comparison.scores["p"].value("wer") == 0
    bare = [{key: value for key, value in row.items() if key != "duration"} for row in rows]
    in_order = predictions(tmp_path / "q.json", ["word0", "word1", "word2"], bare)
    assert evaluate(manifest=labels, predictions=[in_order], samples=50).comparison.scores["q"].value("wer") == 0
    wrong = predictions(tmp_path / "r.json", ["a", "b", "c"], [*rows[:2], rows[2] | {"duration": 9.0}])
    with pytest.raises(ManifestError, match=r"m\.json:3: .*long\.wav is not in it once more, or not of this duration"):
        evaluate(manifest=labels, predictions=[wrong], samples=50)
    # Of one place and one duration they are taken in their order; alone a duration decides nothing.
    twice = [rows[0], rows[0] | {"text": "word1"}]
    file = predictions(tmp_path / "s.json", ["word0", "word1"], twice)
    assert evaluate(predictions=[file], samples=50).comparison.scores["s"].value("wer") == 0
    # Equal lines alone are one line that was written twice, and a row that is listed twice shares its line.
    again = predictions(tmp_path / "again.json", ["word0", "word0"], [rows[0], rows[0]])
    with pytest.raises(
        ManifestError, match=r"2 lines of .*again\.json are equal to another one; give --manifest FILE"
    ):
        evaluate(predictions=[again], samples=50)
    listed = write_lines(tmp_path / "listed.json", [rows[0], rows[0], rows[1]])
    for lines in ([rows[0], rows[1]], [rows[0], rows[0], rows[1]]):
        once = predictions(tmp_path / "u.json", [row["text"] for row in lines], lines)
        assert evaluate(manifest=listed, predictions=[once], samples=50).comparison.scores["u"].value("wer") == 0
    rough = predictions(tmp_path / "t.json", ["word0"], [rows[0] | {"duration": 1.04}])
    assert evaluate(manifest=write_lines(tmp_path / "one.json", rows[:1]), predictions=[rough], samples=50)


def test_predictions_without_a_manifest_are_of_the_same_utterances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without texts was refused; and one could be scored against the texts of another's recordings."""
    for folder, text in (("a", "one"), ("b", "two")):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "p.json", [{"audio_filepath": "x.wav", "text": text, "pred_text": text}])
    with pytest.raises(ManifestError, match=r"1 reference\(s\) differ .*give --manifest FILE:\s+.*b/p\.json:1"):
        evaluate(predictions=[tmp_path / "a" / "p.json", tmp_path / "b" / "p.json"])
    bare = write_lines(tmp_path / "bare.json", [{"audio_filepath": "x.wav", "pred_text": "one"}])
    found = evaluate(predictions=[tmp_path / "a" / "p.json", bare], samples=50)
    assert found.comparison.scores["bare"].value("wer") == 0
    # A path is relative to where NeMo finds it: here first, as in manifests, so that a report has its audio.
    write_audio(tmp_path / "x.wav", seconds=1.0, seed=0)
    monkeypatch.chdir(tmp_path)
    assert rows_of_predictions("a/p.json")[0].audio == str(tmp_path / "x.wav")


@pytest.mark.parametrize(
    ("rows", "lines", "words"),
    [
        (ROWS, ROWS[:2], "c.wav is not in it"),
        (ROWS[:2], ROWS, "c.wav is not among the rows"),
        (ROWS, [*ROWS, ROWS[0]], "occurs twice"),
        ([], ROWS, "the file is empty"),
        ([{**r, "text": ""} for r in ROWS], ROWS, "none of the 3 rows has a reference"),
        ([{**ROWS[0], "text": None}, *ROWS[1:]], ROWS, "1 of 3 rows have no reference"),
        ([{**ROWS[0], "entities": ["latte"]}, *ROWS[1:]], ROWS, "'latte' in 'A large iced mocha"),
        ([{**ROWS[0], "entities": [3.5]}, *ROWS[1:]], ROWS, "neither a string nor a span"),
        ([{**ROWS[0], "entities": [{"type": "x", "start": 1}]}, *ROWS[1:]], ROWS, "word span"),
    ],
)
def test_faults_of_the_data_are_typed_errors(rows: list[Any], lines: list[Any], words: str, tmp_path: Path) -> None:
    file = predictions(tmp_path / "p.json", [r["text"] for r in lines], lines)
    with pytest.raises(ManifestError, match=words):
        evaluate(manifest=manifest(tmp_path / "m.json", rows), predictions=[file], samples=50)


def test_faults_of_the_call_are_typed_errors(tmp_path: Path) -> None:
    file, other = predictions(tmp_path / "p.json", BASE), predictions(tmp_path / "q.json", BASE, ROWS[:0] + ROWS)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate()
    with pytest.raises(ConfigError, match="needs another file"):
        evaluate(predictions=[file, file])
    with pytest.raises(ConfigError, match=r"no row .* has the key town; there are: .*speaker"):
        evaluate(predictions=[file], group_by=("town",))
    changed = predictions(tmp_path / "r.json", BASE, [{**ROWS[0], "text": "another"}, *ROWS[1:]])
    with pytest.raises(ManifestError, match=r"1 reference\(s\) differ"):
        evaluate(predictions=[other, changed])
    silent = write_lines(tmp_path / "s.json", [{**ROWS[0]}])
    with pytest.raises(ManifestError, match="lacks `pred_text`"):
        evaluate(predictions=[silent])
    with pytest.raises(ConfigError, match="different names"):
        compare([row("a")], [System("x", ("a",)), System("x", ("a",))], Scoring())


def test_a_result_takes_the_place_of_nothing_that_was_read_and_a_terminal_cannot_lose_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, labels = predictions(tmp_path / "p.json", BASE), manifest(tmp_path / "m.json")
    before = Path(labels).read_bytes()
    assert main(["evaluate", "--predictions", file, "--manifest", labels, "--json", labels]) == 1
    assert "would be written over, and this command reads it" in capsys.readouterr().err
    assert Path(labels).read_bytes() == before

    class Gone(io.StringIO):
        def flush(self, *text: str) -> None:
            raise BrokenPipeError

        write = flush  # type: ignore[assignment]

    out = tmp_path / "out.json"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Gone())
        assert main(["evaluate", "--predictions", file, "--manifest", labels, "--json", str(out)]) == 1
    assert json.loads(out.read_text())

    def worker(*args: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", worker)
    with pytest.raises(BrokenPipeError):  # of another pipe than the terminal's
        main(["evaluate", "--predictions", file, "--manifest", labels])


def row(text: str, **data: Any) -> Row:
    return Row("a.wav", 1.0, 0.0, text, Context(), "m.json:1", data)


def test_names_are_as_short_as_they_can_be() -> None:
    assert system_names(["/r/one/best.nemo", "/r/two/best.nemo", "/r/base.nemo"]) == {
        "/r/one/best.nemo": "one/best",
        "/r/two/best.nemo": "two/best",
        "/r/base.nemo": "base",
    }
    assert system_names(["/r/base.nemo", "/r/base.json"]) == {
        "/r/base.nemo": "base.nemo",
        "/r/base.json": "base.json",
    }
    dots = ["/r/parakeet-tdt-0.6b-v2", "/r/parakeet-tdt-0.6b-v3", "/r/a.0.5.nemo", "/r/b.jsonl.gz"]  # no suffix at 0.
    assert list(system_names(dots).values()) == ["parakeet-tdt-0.6b-v2", "parakeet-tdt-0.6b-v3", "a.0.5", "b"]


def test_forms_of_entities() -> None:
    assert parse_entities(["a b", [0, 2], {"text": "c", "type": "t"}, {"span": [1, 2]}, {"start": 3, "end": 4}]) == [
        TypedEntity("a b"), TypedEntity((0, 2)), TypedEntity("c", "t"), TypedEntity((1, 2)), TypedEntity((3, 4)),
    ]  # fmt: skip
    assert parse_entities({"drink": "mocha", "milk": ["soy", [1, 2]]}) == [
        TypedEntity("mocha", "drink"), TypedEntity("soy", "milk"), TypedEntity((1, 2), "milk"),
    ]  # fmt: skip
    assert parse_entities(None) == parse_entities("") == parse_entities([]) == []


def test_repeated_and_overlapping_entities_are_mentions_of_their_own() -> None:
    listed = [{"text": "new york", "type": "city"}, {"text": "new york times", "type": "paper"}]
    found = compare([row("new york has the new york times", entities=listed)], [System("s", ("x",))], Scoring())
    assert found.spans[0] == (Span(0, 2, ("city",)), Span(4, 6, ("city",)), Span(4, 7, ("paper",)))
    assert found.scores["s"].column("entities").sum() == 3
    assert found.by_type["city"]["s"].column("entities").sum() == 2


def test_a_file_that_a_model_fails_on_costs_itself_only(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.asr import encoded_rows as module

    texts = ["a latte", "mocha", "tea", "soy milk"]
    path = write_manifest(tmp_path / "m.json", texts)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines.append({"audio_filepath": "gone.wav", "duration": 1.0, "text": "gone"})
    write_lines(path, lines)
    encode, calls = module.encode, []

    def failing(model: Any, signal: Any, lengths: Any) -> Any:
        calls.append(len(lengths))
        if len(calls) <= 5 and (lengths == 20800).any():  # the second row, 1.3 s; the first model only
            raise RuntimeError("out of memory\nsecond line")
        return encode(model, signal, lengths)

    monkeypatch.setattr(module, "encode", failing)
    models = [str(nemo_file("ctc_char")), str(nemo_file("hybrid_char"))]
    found = evaluate(models, manifest=str(path), samples=50, oracle=2)
    assert calls[:5] == [4, 1, 1, 1, 1]
    assert len(found.comparison.rows) == 3
    assert all(len(system.texts) == 3 == len(system.nbest) for system in found.comparison.systems)
    assert found.comparison.systems[0].rtfx > 0
    for members in found.comparison.systems[0].nbest:
        scores = [member.scores["asr"] for member in members]
        assert scores == sorted(scores, reverse=True)
        assert max(scores) < 0
    assert len(found.left_out) == 2
    assert found.left_out[0].endswith("m.json:2: ctc_char: RuntimeError: out of memory")
    assert "no such file" in found.left_out[1]
    text = evaluation_text(found)
    assert "2 of 5 utterances failed and are left out of ALL systems" in text
    assert "RTFx" in text
    assert "oracle WER" in text


def test_a_model_that_fails_on_everything_is_an_error(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.asr import encoded_rows as module

    def failing(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(module, "encode", failing)
    path = write_manifest(tmp_path / "m.json", ["a latte", "mocha"])
    with pytest.raises(ManifestError, match=r"ctc_char failed on all 2 rows, e\.g\. RuntimeError: broken"):
        evaluate([str(nemo_file("ctc_char"))], manifest=str(path), samples=50)
