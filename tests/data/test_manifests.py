"""Manifests: every form of `text`, contexts, faults listed together, staged copies."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from helpers.tiny import write_audio, write_manifest

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import expand_paths, merge_context, parse_context, read_manifest
from nemo_llm_feedback.data.staging import stage


def _manifest(path: Path, lines: list[object]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def test_text_present_absent_empty_and_null(tmp_path: Path) -> None:
    audio = {"audio_filepath": str(write_audio(tmp_path / "a.wav", seconds=1, seed=0)), "duration": 1.0}
    path = _manifest(
        tmp_path / "m.json", [{**audio, "text": "hi"}, audio, {**audio, "text": ""}, {**audio, "text": None}]
    )
    assert [row.text for row in read_manifest(path)] == ["hi", "", "", ""]
    assert [row.text for row in read_manifest(path, use_text=False)] == ["", "", "", ""]
    staged = stage({"manifest_filepath": str(path)}, tmp_path / "s", use_text=True, on_bad_audio="error")
    lines = [json.loads(x) for x in Path(staged.manifest_filepath).read_text().splitlines()]
    assert [line["text"] for line in lines] == ["hi", "", "", ""]
    assert staged.num_labelled == 1
    assert staged.hours(unlabeled=True) == pytest.approx(3 / 3600)


@pytest.mark.parametrize("spelled", ["m.json", "./m.json", ".//m.json", "../{}/m.json", "~/m.json", "{}"])
def test_a_copy_has_the_rows_of_its_file_however_the_path_is_spelled(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = {"audio_filepath": str(write_audio(tmp_path / "a.wav", seconds=1, seed=0)), "duration": 1.0}
    path = _manifest(tmp_path / "m.json", [audio, {**audio, "text": "hi"}])
    other = _manifest(tmp_path / "other.json", [{**audio, "replay": "kl"}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    named = spelled.format(path if spelled == "{}" else tmp_path.name)
    # Twice, as a pool is listed to be seen oftener, and between them another file: ids are places in all lines.
    for given in ([named, str(other), named], [named, named, str(other)], f"{named},{other}", named):
        staged = stage({"manifest_filepath": given}, tmp_path / "s", use_text=True, on_bad_audio="error")
        written = read_manifest(staged.manifest_filepath)
        assert [(row.text, row.replay) for row in written] == [(row.text, row.replay) for row in staged.rows]
        assert len(written) == len(read_manifest(given))


def test_rows_without_terms_share_the_runs_list() -> None:
    run = Context("x", ("a", "b"))
    assert merge_context(run, Context("y")).terms is run.terms
    assert merge_context(run, Context("", ("b", "c"))).terms == ("b", "c", "a")


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    good = {"audio_filepath": "a.wav", "duration": 1.0}
    lines: list[object] = [
        "{not json",
        {"duration": 1.0},
        {"audio_filepath": "a.wav"},
        {**good, "duration": -1},
        {**good, "text": 3},
        {**good, "context": 5},
        good,
        [1],
    ]
    with pytest.raises(ManifestError) as error:
        read_manifest(_manifest(tmp_path / "m.json", lines))
    for number in (1, 2, 3, 4, 5, 6, 8):
        assert f"m.json:{number}:" in str(error.value)
    assert "m.json:7:" not in str(error.value)
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / "absent.json")
    with pytest.raises(ManifestError, match="the file is empty"):
        read_manifest(_manifest(tmp_path / "empty.json", []))
    (tmp_path / "array.json").write_text(json.dumps([good, good], indent=1))
    with pytest.raises(ManifestError, match=r"array\.json: is a JSON array; write an object per line"):
        read_manifest(tmp_path / "array.json")
    with pytest.raises(ManifestError, match=r"names 's3://calls/a\.wav', which is not on a disk here"):
        read_manifest(_manifest(tmp_path / "far.json", [{**good, "audio_filepath": "s3://calls/a.wav"}]))


def test_bad_audio_is_an_error_or_counted(tmp_path: Path) -> None:
    ok = write_audio(tmp_path / "ok.wav", seconds=1, seed=0)
    (tmp_path / "broken.wav").write_bytes(b"not audio")
    lines = [
        {"audio_filepath": str(p), "duration": 1.0} for p in (ok, tmp_path / "absent.wav", tmp_path / "broken.wav")
    ]
    lines.append({"audio_filepath": str(ok), "duration": 1.0, "offset": 5.0})
    path = _manifest(tmp_path / "m.json", list(lines))
    with pytest.raises(ManifestError) as error:
        stage({"manifest_filepath": str(path)}, tmp_path / "s", use_text=True, on_bad_audio="error")
    assert "on_bad_audio=skip" in str(error.value)
    assert all(f"m.json:{n}:" in str(error.value) for n in (2, 3, 4))
    staged = stage({"manifest_filepath": str(path)}, tmp_path / "s", use_text=True, on_bad_audio="skip")
    assert len(staged.rows) == 1
    assert len(staged.left_out["with unreadable audio"]) == 3


def test_long_and_short_rows_are_listed_not_dropped_silently(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.json", [None] * 3, seconds=1.0)
    config = {"manifest_filepath": str(path), "max_duration": 1.15, "min_duration": 1.05}
    staged = stage(config, tmp_path / "s", use_text=True, on_bad_audio="error")
    assert len(staged.rows) == 1
    assert staged.left_out["under min_duration"] == (f"{path}:1: 1.00 s",)
    assert staged.left_out["over max_duration"] == (f"{path}:3: 1.20 s",)
    with pytest.raises(ManifestError, match="no row is left"):
        stage({**config, "max_duration": 0.1}, tmp_path / "s", use_text=True, on_bad_audio="error")
    with pytest.raises(ManifestError, match="manifest_filepath is missing"):
        stage({}, tmp_path / "s", use_text=True, on_bad_audio="error")


def test_staging_keeps_the_structure_of_several_and_sharded_manifests(tmp_path: Path) -> None:
    for k in range(3):
        write_manifest(tmp_path / f"manifest_{k}.json", [None, "a"])
    sharded = str(tmp_path / "manifest__OP_0..1_CL_.json")
    assert [Path(p).name for p in expand_paths(sharded)] == ["manifest_0.json", "manifest_1.json"]
    both = f"{sharded},{tmp_path / 'manifest_2.json'}"
    staged = stage({"manifest_filepath": both}, tmp_path / "s", use_text=True, on_bad_audio="error")
    assert len(staged.rows) == 6
    assert len(expand_paths(staged.manifest_filepath)) == 3
    assert len(read_manifest(staged.manifest_filepath)) == 6
    nested = [[str(tmp_path / "manifest_0.json")], [str(tmp_path / "manifest_1.json")]]
    staged = stage({"manifest_filepath": nested}, tmp_path / "n", use_text=True, on_bad_audio="error")
    assert [len(item) for item in staged.manifest_filepath] == [1, 1]


def test_relative_paths_resolve_against_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_manifest(tmp_path / "data" / "m.json", [None])
    monkeypatch.chdir(tmp_path)
    (row,) = read_manifest(path)
    assert Path(row.audio) == tmp_path / "data" / "wav" / "m_0.wav"
    assert row.utterance.endswith("@0.000+1.200")


def test_context_of_an_utterance_goes_over_the_runs() -> None:
    run = Context("an order", ("latte", "mocha"))
    assert merge_context(run, parse_context(None)) == run
    assert merge_context(run, parse_context("a complaint")) == Context("a complaint", ("latte", "mocha"))
    assert merge_context(run, parse_context(["chai", "latte"])) == Context("an order", ("chai", "latte", "mocha"))
    with pytest.raises(ValueError, match="string or a list"):
        parse_context({"a": 1})


def test_tarred_rows_that_no_tar_file_holds_are_listed(tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "a.wav", seconds=1, seed=0)
    with tarfile.open(tmp_path / "audio_0.tar", "w") as archive:
        archive.add(audio, arcname="a.wav")
    lines = [{"audio_filepath": name, "duration": 1.0, "shard_id": 0} for name in ("a.wav", "b.wav")]
    path = _manifest(tmp_path / "manifest_0.json", list(lines))
    config = {"manifest_filepath": str(path), "tarred_audio_filepaths": str(tmp_path / "audio_0.tar")}
    with pytest.raises(ManifestError, match="in no tar file"):
        stage(config, tmp_path / "s", use_text=True, on_bad_audio="error")
    staged = stage(config, tmp_path / "s", use_text=True, on_bad_audio="skip")
    assert [row.audio for row in staged.rows] == ["a.wav"]
    with pytest.raises(ManifestError, match="cannot be read"):
        stage({**config, "tarred_audio_filepaths": "/absent.tar"}, tmp_path / "s", use_text=True, on_bad_audio="skip")
