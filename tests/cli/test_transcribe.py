"""The transcribe command: manifests and folders, rescoring with contexts, files that fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from helpers.tiny import write_audio, write_manifest

from nemo_llm_feedback.cli.jobs import transcribe as job
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.config.rescoring import RescoringConfig, parse_rescoring_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.rewards import register
from nemo_llm_feedback.rewards.rules import CallableReward

SEEN: list[tuple[str, str, list[str]]] = []


@register("test_transcribe_contexts")
def context_reward() -> CallableReward:
    """Notes what it is shown."""

    def judge(texts: list[str], utterances: list[str], descriptions: list[str], terms: list[list[str]]) -> list[float]:
        SEEN.extend(zip(utterances, descriptions, terms, strict=True))
        return [-float(len(text)) for text in texts]

    return CallableReward(judge, name="short")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_manifest_is_transcribed_with_n_best_and_each_row_s_context(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows keep their order and keys; audio paths stay right in another folder."""
    manifest = write_manifest(
        tmp_path / "in" / "m.json",
        ["a latte", "tea", "hot tea"],
        context=["a desk", ["mocha"], None],
        speaker=["x", "y", "z"],
    )
    settings = ["reward.name=test_transcribe_contexts", "--alpha", "0.5", "--beta", "1", "--boosted", "0"]
    settings += ["--term-swap", "0", "--description", "a shop", "--terms", "tea"]
    out = tmp_path / "out" / "o.json"
    SEEN.clear()
    arguments = ["--rescore", "--set", *settings, "--nbest", "3", "--batch-size", "2", "--timestamps", "--cuda", "-1"]
    assert (
        main(
            [
                "transcribe",
                str(nemo_file("ctc_bpe")),
                "--dataset-manifest",
                str(manifest),
                "--output-filename",
                str(out),
                *arguments,
            ]
        )
        == 0
    )
    lines = read(out)
    assert [line["speaker"] for line in lines] == ["x", "y", "z"]
    assert all(Path(line["audio_filepath"]).is_file() for line in lines)
    for line in lines:
        best = line["nbest"][0]
        assert 1 <= len(line["nbest"]) <= 3
        assert best["text"].split() == line["pred_text"].split()
        assert best["score"] == pytest.approx(best["asr"] + 0.5 * best["short"] + best["length"], abs=1e-3)
        assert " ".join(word["word"] for word in line["word"]) == line["pred_text"].strip()
    told = {(description, tuple(terms)) for _, description, terms in SEEN}
    assert told == {("a desk", ("tea",)), ("a shop", ("mocha", "tea")), ("a shop", ("tea",))}
    report = capsys.readouterr().err
    assert "3 of 3 utterances" in report
    assert "RTFx" in report
    assert "WER" in report


def test_the_reward_of_a_run_rescores_by_the_same_overrides(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    """--set takes what adapt took; the flags come on top."""
    manifest = write_manifest(tmp_path / "m.json", ["a latte", "tea"])
    out = tmp_path / "o.json"
    overrides = ["reward=entity", "reward.settings.weight=3", f"llm.model={tiny_llm}", "context.terms=[tea, latte]"]
    arguments = ["--rescore", "--alpha", "0.5", "--beta", "1.5", "--nbest", "4", "--set", *overrides]
    files = ["--dataset-manifest", str(manifest), "--output-filename", str(out)]
    assert main(["transcribe", str(nemo_file("ctc_bpe")), *files, *arguments]) == 0
    members = [member for line in read(out) for member in line["nbest"]]
    assert len(members) > 2
    for m in members:
        assert m["score"] == pytest.approx(m["asr"] + 0.5 * m["entity"] + 1.5 * m["length"], abs=2e-3)


def test_keys_of_rescoring_without_a_flag_are_set_by_those_of_adapt() -> None:
    """The message sent the user to flags that there were not."""
    from nemo_llm_feedback.cli.options import JudgeOptions, RescoringFlags, rescoring_tree

    given = ("proposals.external=0", "feedback.normalizer=none", "reward.name=length")
    tree = rescoring_tree(RescoringFlags(rescore=True, judge=JudgeOptions(overrides=given)), 0, own_texts=False)
    assert tree is not None
    assert (tree["external"], tree["normalizer"], "language" in tree) == (0, "none", False)
    assert parse_rescoring_config(tree).external == 0


def test_rescoring_uses_the_weights_that_score_and_adapt_take_from_the_same_rows(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.json", ["a latte", "tea", "one mocha"])
    (tmp_path / "wav" / "broken.wav").write_bytes(b"no audio at all")
    broken = {"audio_filepath": str(tmp_path / "wav" / "broken.wav"), "duration": 1.0}
    with_broken = tmp_path / "broken.json"
    with_broken.write_text(manifest.read_text() + json.dumps(broken) + "\n")
    judge = ["--llm", str(tiny_llm), "--description", "an order", "--terms", "latte", "mocha"]
    base, out = str(nemo_file("ctc_bpe")), tmp_path / "out.json"
    assert main(["score", base, "--manifest", str(manifest), *judge, "--json", str(out)]) == 0
    weights = json.loads(out.read_text())["weights"]
    assert weights["origin"] == "spread"
    capsys.readouterr()
    command = ["transcribe", base, "--manifest", str(with_broken), "--rescore", *judge, "--nbest", "3"]
    assert main([*command, "--output", str(out)]) == 1  # the broken row fails alone
    said = f"weights: reward.alpha={weights['alpha']:g} reward.beta={weights['beta']:g}, by the spread of these rows"
    assert said in capsys.readouterr().err
    members = [member for line in read(out) for member in line["nbest"]]
    for m in members:
        whole = m["asr"] + weights["alpha"] * m["llm"] + weights["beta"] * m["length"]
        assert m["score"] == pytest.approx(whole, abs=2e-3)
    assert main([*command, "--alpha", "0.5"]) == 1
    assert "weights: reward.alpha=0.5 reward.beta=1, as set" in capsys.readouterr().err


def test_files_that_fail_are_listed_and_do_not_lose_the_others(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "audio"
    write_audio(folder / "sub" / "b.wav", seconds=1.0, seed=1)
    write_audio(folder / "a.flac", seconds=1.2, seed=2)
    stereo = torch.randn(16000, 2).mul(0.1).numpy()
    soundfile.write(folder / "stereo.wav", stereo, 8000)
    (folder / "broken.wav").write_bytes(b"no audio at all")
    (folder / "notes.txt").write_text("not audio")
    assert main(["transcribe", str(nemo_file("hybrid_bpe")), str(folder), "--decoder-type", "ctc"]) == 1
    captured = capsys.readouterr()
    printed = [Path(line.split("\t")[0]).name for line in captured.out.splitlines()]
    assert printed == ["a.flac", "stereo.wav", "b.wav"]
    assert "3 of 4 utterances" in captured.err
    assert "1 failed:" in captured.err
    assert "broken.wav: " in captured.err
    assert "Traceback" not in captured.err
    assert main(["transcribe", str(nemo_file("hybrid_bpe")), str(folder), "--audio-type", "flac", "--nbest", "2"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "a.flac" in listed[0]
    assert "asr=" in listed[1]


def test_a_batch_that_fails_is_repeated_row_by_row(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(write_audio(tmp_path / f"{i}.wav", seconds=1.0 + i / 10, seed=i)) for i in range(3)]
    genuine, batches = job._hypotheses, []

    def sometimes(model: Any, encoded: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
        batches.append(len(lengths))
        if encoded.shape[0] > 1:
            raise RuntimeError("out of memory")
        return genuine(model, encoded, lengths)

    monkeypatch.setattr(job, "_hypotheses", sometimes)
    found = job.transcribe(nemo_file("rnnt_bpe"), files, batch_size=3)
    assert batches == [3, 1, 1, 1]
    assert all(hyp is not None for hyp in found.hypotheses)
    assert found.failures == ()
    assert found.audio_seconds == pytest.approx(3.3)
    assert found.rtfx > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.wav", "--dataset-manifest", "m.json"], "either audio files or folders"),
        ([], "either audio files or folders"),
        (["/absent.wav"], "no such file or folder"),
        (["{folder}"], "no audio in this folder"),
        (["{wav}", "--alpha", "1"], "without --rescore"),
        (["{wav}", "--rescore"], "--llm is missing"),
        (["{wav}", "--rescore", "--llm", "x"], "or --no-context when every manifest row"),
        (["{wav}", "--rescore", "--llm", "x", "--description", "x", "--beam-size", "1"], "--beam-size must be ≥ 2"),
        (["{wav}", "--rescore", "--llm", "x", "--description", "x", "--boosted", "-1"], "--boosted must be ≥ 0"),
        (["{wav}", "--rescore", "--llm", "/absent", "--description", "x"], "/absent"),
        (["{wav}", "--set", "reward=entity"], "without --rescore"),
        (["{wav}", "--rescore", "--set", "feedback.heads=ctc"], "--set takes reward, llm, context"),
        (["{wav}", "--rescore", "--set", "proposals.boosted=1"], "have flags: --beam-size, --boosted"),
        (["{wav}", "--rescore", "--set", "reward.alhpa=1"], "did you mean reward.alpha"),
        (
            [
                "{wav}",
                "--rescore",
                "--llm",
                "{llm}",
                "--set",
                "reward=entity",
                "reward.settings.wieght=3",
                "context.terms=[a]",
            ],
            "did you mean reward.settings.weight",
        ),
        (["{wav}", "--batch-size", "0"], "--batch-size"),
        (["{wav}", "--decoder-type", "ctc"], "for hybrid models"),
        (["{wav}", "--cuda", "99"], "with a smaller number"),
    ],
)
def test_wrong_input_is_told_with_its_fix(
    arguments: list[str],
    words: str,
    nemo_file: Any,
    tiny_llm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wav = write_audio(tmp_path / "x" / "a.wav", seconds=1.0, seed=0)
    (tmp_path / "empty").mkdir()
    filled = [a.format(wav=wav, llm=tiny_llm, folder=tmp_path / "empty") for a in arguments]
    assert main(["transcribe", str(nemo_file("ctc_bpe")), *filled]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_the_manifest_that_is_transcribed_is_never_written_over(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(tmp_path / "m.json", ["a latte", "tea"])
    before = (tmp_path / "m.json").read_bytes()
    (tmp_path / "link.json").symlink_to("m.json")
    for rows in (["--manifest", str(tmp_path / "m.json")], [str(tmp_path / "m.json")]):
        assert main(["transcribe", str(nemo_file("ctc_bpe")), *rows, "--output", str(tmp_path / "link.json")]) == 1
        assert "give another file, or --add-to" in capsys.readouterr().err
    assert (tmp_path / "m.json").read_bytes() == before
    packed = tmp_path / "new" / "out.json.gz"
    assert main(["transcribe", str(nemo_file("ctc_bpe")), str(tmp_path / "m.json"), "--output", str(packed)]) == 0
    assert len(read_manifest(packed)) == 2
    # Nor is anything else that is read: an audio of the rows, the model, the terms.
    (tmp_path / "menu.txt").write_text("latte")
    rescoring = ["--rescore", "--llm", str(tmp_path), "--terms-file", str(tmp_path / "menu.txt")]
    model, wav = shutil.copy(nemo_file("ctc_bpe"), tmp_path / "m.nemo"), tmp_path / "wav" / "m_1.wav"
    for target in (wav, model, tmp_path / "menu.txt"):
        for rows in ([str(tmp_path / "wav")], ["--manifest", str(tmp_path / "m.json")]):
            known = target.read_bytes()
            assert main(["transcribe", str(model), *rows, *rescoring, "--output", str(target)]) == 1
            assert f"{target} would be written over, and this command reads it" in capsys.readouterr().err
            assert target.read_bytes() == known
    # What is no file, a pipe for one, is written to and not replaced.
    assert main(["transcribe", str(nemo_file("ctc_bpe")), str(tmp_path / "m.json"), "--output", "/dev/stdout"]) == 0


def test_an_output_where_nothing_worked_is_as_it_was(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that was not mounted emptied the output of yesterday."""
    pool = write_manifest(tmp_path / "pool.json", [None, None])
    command = ["transcribe", str(nemo_file("ctc_char")), "--output", str(tmp_path / "out.json")]
    for rows in (["--manifest", str(pool)], ["--add-to", str(pool)]):
        assert main([*command, *rows]) == 0
        before = (tmp_path / "out.json").read_bytes()
        (tmp_path / "wav").rename(tmp_path / "gone")
        assert main([*command, *rows]) == 1
        (tmp_path / "gone").rename(tmp_path / "wav")
        assert (tmp_path / "out.json").read_bytes() == before
        said = capsys.readouterr().err
        assert f"nothing is written to {tmp_path / 'out.json'}" in said
        assert "2 failed:" in said


def test_no_hypotheses_or_times_of_another_model_stay_beside_a_transcript(nemo_file: Any, tmp_path: Path) -> None:
    """`evaluate` then had the oracle of the other model."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    own = {"speaker": ["x", "y"], "call": ["1", "2"]}
    pool = write_manifest(tmp_path / "pool.json", ["a latte", "tea"], **own)
    flags = ["--nbest", "3", "--timestamps", "--manifest", str(pool), "--output", str(first)]
    assert main(["transcribe", str(nemo_file("ctc_bpe")), *flags]) == 0
    assert set(read(first)[0]) >= {"nbest", "word", "segment"}
    other = str(nemo_file("ctc_char"))
    assert main(["transcribe", other, "--manifest", str(first), "--output", str(second)]) == 0
    keys = {"audio_filepath", "duration", "text", "speaker", "call", "pred_text"}
    assert [set(line) for line in read(second)] == [keys, keys]
    # What is no list of a recogniser's is the user's own.
    named = write_manifest(tmp_path / "named.json", ["a latte"], segment=["call_12_03"])
    assert main(["transcribe", other, "--manifest", str(named), "--output", str(second)]) == 0
    assert read(second)[0]["segment"] == "call_12_03"


def test_entities_play_no_part_in_the_totals(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spans of characters, which are none of words, ended the command behind all its work."""
    manifest = write_manifest(tmp_path / "m.json", ["a latte"], entities=[[{"start": 50, "end": 60}]])
    assert main(["transcribe", str(nemo_file("ctc_char")), str(manifest), "--output", str(tmp_path / "o.json")]) == 0
    assert "WER" in capsys.readouterr().err


def test_settings_are_checked_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_rescoring_config(
            {
                "nbets": 4,
                "boosted": "x",
                "reward": {"alhpa": 1},
                "llm": {"model": "m"},
                "context": {"description": "d"},
            }
        )
    for words in ("did you mean nbest", "boosted must be int", "did you mean reward.alpha"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="nbest must be ≥ 2"):
        parse_rescoring_config({"reward": None, "nbest": 1})
    assert parse_rescoring_config({"reward": None}) == RescoringConfig(reward=None)
