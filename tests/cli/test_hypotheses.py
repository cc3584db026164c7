"""`prepare --hypotheses` and `transcribe --add-to`: what other recognisers wrote comes into a manifest."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import write_audio, write_manifest

from nemo_llm_feedback.cli.jobs.hypotheses import add_hypotheses, join, named_source
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.types import ExternalText
from nemo_llm_feedback.data.manifests import read_manifest

SAID = {"a": "A latte.", "b": "tea"}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Rows of a.wav, b.wav and two segments of long.flac; one has a key of its own."""
    rows = [
        {"audio_filepath": "wav/a.wav", "duration": 1.0, "speaker": "é"},
        {"audio_filepath": "wav/b.wav", "duration": 2.0, "offset": 0.5},
        {"audio_filepath": "wav/long.flac", "duration": 2.0, "offset": 0.0},
        {"audio_filepath": "wav/long.flac", "duration": 2.0, "offset": 3.25},
    ]
    path = tmp_path / "pool.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _texts(manifest: Path) -> list[tuple[str, ...]]:
    return [tuple(text.text for text in row.external) for row in read_manifest(manifest)]


def _write(path: Path, form: str) -> Path:
    """A file or folder of another tool that says SAID."""
    if form == "folder":
        path.mkdir()
        (path / "a.txt").write_text(f" {SAID['a']}\n", encoding="utf-8")
        (path / "b.wav.txt").write_text(SAID["b"], encoding="utf-8")
        return path
    rows: list[dict[str, Any]] = [
        {"audio_filepath": f"wav/{name}.wav", "pred_text": text} for name, text in SAID.items()
    ]
    content = {
        "pred_text": "".join(json.dumps(row | {"text": "the reference"}) + "\n" for row in rows),
        "one row": json.dumps(rows[0] | {"pred_text": SAID["a"]}),
        "json lines": "".join(json.dumps({"audio": f"{n}.wav", "text": t}) + "\n" for n, t in SAID.items()),
        "list": json.dumps([{"path": f"/elsewhere/{n}.wav", "text": t} for n, t in SAID.items()]),
        "names": json.dumps({f"{n}.wav": t for n, t in SAID.items()}, indent=1),
        "kaldi": "".join(f"{n} {t}\n" for n, t in SAID.items()),
        "tabs": "".join(f"wav/{n}.wav\t{t}\n\n" for n, t in SAID.items()),
    }[form]
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["pred_text", "json lines", "list", "names", "kaldi", "tabs", "folder"])
def test_files_of_other_tools_are_joined_by_audio_path(form: str, pool: Path, tmp_path: Path) -> None:
    other = _write(tmp_path / "whisper base", form)
    before = pool.read_bytes()
    join(pool, other, out=tmp_path / "new.json")
    assert pool.read_bytes() == before
    assert _texts(tmp_path / "new.json") == [("A latte.",), ("tea",), (), ()]
    rows = read_manifest(tmp_path / "new.json")
    assert {text.source for row in rows for text in row.external} == {"whisper_base"}
    assert rows[0].data["speaker"] == "é"


def test_one_row_alone_is_joined(pool: Path, tmp_path: Path) -> None:
    join(pool, _write(tmp_path / "o.json", "one row"), out=pool)
    assert _texts(pool) == [("A latte.",), (), (), ()]


def test_segments_are_joined_by_their_offset_and_whole_recordings_are_counted(pool: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"audio_filepath": "wav/long.flac", "offset": 3.25, "text": "second"},
        {"audio_filepath": "wav/long.flac", "text": "first second"},
        {"audio_filepath": "wav/other.wav", "text": "elsewhere"},
        {"audio_filepath": "wav/a.wav", "text": " "},
        {
            "audio_filepath": "wav/b.wav",
            "nbest": [{"text": "tea", "score": -1.0, "asr": -1.0}, {"text": "bee"}, {"text": ""}],
        },
    ]
    other = tmp_path / "cloud.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = str(join(pool, other, out=pool))
    assert _texts(pool) == [(), ("tea", "bee"), (), ("second",)]
    assert read_manifest(pool)[1].external[0] == ExternalText("tea", "cloud", -1.0)
    assert "2 of 4 rows have got `hypotheses` (3 of cloud)" in said
    assert "entries that fit no row: 1\n" in said
    assert "wav/other.wav" in said
    assert "entries that are of whole recordings whose rows are segments: 1\n" in said
    assert "entries that have no text: 1\n" in said


def test_a_second_join_replaces_the_sources_texts_and_keeps_the_others(pool: Path, tmp_path: Path) -> None:
    other = tmp_path / "o.json"
    for source, text in (("one", "first"), ("two", "other"), ("one", "second")):
        other.write_text(json.dumps({"a.wav": text}))
        join(pool, other, out=pool, source=source)
    assert [(t.text, t.source) for t in read_manifest(pool)[0].external] == [("other", "two"), ("second", "one")]


def test_the_manifest_is_whole_or_as_it_was(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pool.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            join(pool, _write(tmp_path / "o.json", "names"), out=pool)
    assert pool.read_bytes() == before
    assert not list(tmp_path.glob(".pool*"))
    many = [ExternalText(f"text {n}", f"s{n}") for n in range(101)]
    with pytest.raises(ManifestError, match=r"pool.json:1: .*101 texts, at most 100"):
        add_hypotheses(pool, {read_manifest(pool)[0].utterance: many}, out=pool)
    assert pool.read_bytes() == before


def test_a_file_that_can_be_written_and_not_replaced_is_written(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is a container's mount (EBUSY); the work of hours was lost."""

    def busy(*args: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", busy)
        join(pool, _write(tmp_path / "o.json", "names"), out=pool)
    assert _texts(pool)[0] == ("A latte.",)
    assert not list(tmp_path.glob(".pool*"))


def test_what_a_recogniser_wrote_comes_before_what_its_manifest_held(pool: Path, tmp_path: Path) -> None:
    """A second recogniser keeps the first one's texts in its output; these were joined again, and its own lost."""
    first = {"audio_filepath": "wav/a.wav", "hypotheses": [{"text": "whisper's", "source": "whisper"}]}
    other = tmp_path / "big.json"
    other.write_text(json.dumps(first | {"pred_text": "big's"}) + "\n" + json.dumps({"audio": "b.wav", "text": "t"}))
    join(pool, other, out=pool, source="big")
    assert [(t.text, t.source) for t in read_manifest(pool)[0].external] == [("big's", "big")]
    folder, wav = _write(tmp_path / "texts", "folder"), write_audio(tmp_path / "wav" / "a.wav", seconds=1.0, seed=0)
    for texts, out in ((other, other), (other, wav), (folder, folder / "a.txt")):
        with pytest.raises(ConfigError, match="would be written over, and this command reads it"):
            join(pool, texts, out=out)


def test_links_packed_manifests_and_other_folders_are_written_right(pool: Path, tmp_path: Path) -> None:
    other = _write(tmp_path / "o.json", "names")
    link = tmp_path / "link.json"
    link.symlink_to(pool)
    join(link, other, out=link)
    assert link.is_symlink()
    assert _texts(pool)[0] == ("A latte.",)
    join(pool, other, out=tmp_path / "deep" / "new.json.gz", source="two")
    content = gzip.decompress((tmp_path / "deep" / "new.json.gz").read_bytes()).decode()
    assert json.loads(content.splitlines()[0])["audio_filepath"] == str(tmp_path / "wav" / "a.wav")
    assert [len(row.external) for row in read_manifest(tmp_path / "deep" / "new.json.gz")] == [2, 2, 0, 0]
    # Another recording of that name lies beside the new manifest.
    write_audio(tmp_path / "day2" / "wav" / "a.wav", seconds=1.0, seed=9)
    join(pool, other, out=tmp_path / "day2" / "new.json")
    assert read_manifest(tmp_path / "day2" / "new.json")[0].audio == str(tmp_path / "wav" / "a.wav")
    with pytest.raises(ConfigError, match="cannot be written"):
        join(pool, other, out=tmp_path / "day2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps({"a.wav": "tea", "b.wav": 3}), "b.wav: its transcript must be a text"),
        (json.dumps([{"text": "tea"}]), "entry 1: must be an object with the recording's path"),
        (json.dumps([{"audio": "a.wav"}]), "entry 1: has no transcript"),
        ('{"audio": "a.wav", "text": "tea"}\n{broken\n', "o.json:2: not JSON"),
        (json.dumps({"z.wav": "tea"}), "none of its 1 entries fits a row"),
        ("", "none of its 0 entries fits a row"),
        (json.dumps([{"audio": "a.wav", "hypotheses": [{"text": "tea", "source": "beam"}]}]), "'beam' is one of ours"),
    ],
)
def test_a_fault_in_the_other_file_names_its_place_and_nothing_is_written(
    content: str, says: str, pool: Path, tmp_path: Path
) -> None:
    (tmp_path / "o.json").write_text(content)
    with pytest.raises(ManifestError) as error:
        join(pool, tmp_path / "o.json", out=tmp_path / "new.json", source="cloud")
    assert says in str(error.value)
    assert not (tmp_path / "new.json").exists()


def test_a_name_that_two_recordings_share_asks_for_paths(tmp_path: Path) -> None:
    pool = tmp_path / "pool.json"
    pool.write_text("".join(json.dumps({"audio_filepath": f"{d}/a.wav", "duration": 1.0}) + "\n" for d in "xy"))
    (tmp_path / "o.json").write_text(json.dumps({"a.wav": "tea"}))
    with pytest.raises(ManifestError, match="name of 2 recordings: give their paths"):
        join(pool, tmp_path / "o.json", out=pool)
    (tmp_path / "o.json").write_text(json.dumps({"y/a.wav": "tea"}))
    join(pool, tmp_path / "o.json", out=pool)
    assert _texts(pool) == [(), ("tea",)]
    # A folder of texts that mirrors that of the recordings names them.
    for name in ("x/a.txt", "y/a.wav.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True)
        (tmp_path / "texts" / name).write_text(f"said in {name[0]}")
    join(pool, tmp_path / "texts", out=tmp_path / "new.json")
    assert [texts[-1] for texts in _texts(tmp_path / "new.json")] == ["said in x", "said in y"]
    (tmp_path / "texts" / "z").mkdir()
    (tmp_path / "texts" / "z" / "a.txt").write_text("of neither")
    with pytest.raises(ManifestError, match="name of 2 recordings: give their paths"):
        join(pool, tmp_path / "texts", out=pool)


def test_a_source_is_named_after_its_file_and_never_as_one_of_ours() -> None:
    assert named_source(None, "/x/Whisper base.json.gz") == "Whisper_base"
    assert named_source(None, "nvidia/parakeet.nemo") == "parakeet"
    assert named_source("cloud/v2", "o.json") == "cloud/v2"
    for given, origin in (("greedy", "o.json"), (None, "beam.json"), ("a b", "o.json")):
        with pytest.raises(ConfigError, match="--source: "):
            named_source(given, origin)


def test_prepare_joins_by_the_command_line(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = _write(tmp_path / "whisper.json", "names")
    assert main(["prepare", str(pool), "--hypotheses", str(other), "--output", str(pool), "--source", "cloud"]) == 0
    assert "2 of 4 rows have got `hypotheses` (2 of cloud)" in capsys.readouterr().out
    assert read_manifest(pool)[0].external[0].source == "cloud"
    assert main(["prepare", str(tmp_path), "--output", str(pool), "--source", "cloud"]) != 0
    assert "--source names the recogniser of --hypotheses" in capsys.readouterr().err


def test_transcribe_adds_another_models_n_best_with_source_and_score(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [["first"], None, [{"text": "old", "source": "second"}]]
    pool = write_manifest(tmp_path / "pool.json", [None, "tea", None], hypotheses=given)
    (tmp_path / "wav" / "pool_1.wav").write_bytes(b"no audio")
    model, before = str(nemo_file("ctc_char")), pool.read_text().splitlines()
    command = ["transcribe", model, "--add-to", str(pool), "--source", "second", "--nbest", "3", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "new.json")]) == 1, "a recording cannot be read"
    assert pool.read_text().splitlines() == before
    rows = [row.external for row in read_manifest(tmp_path / "new.json")]
    assert rows[0][0] == ExternalText("first")
    assert 1 <= len(rows[0][1:]) <= 3
    assert {text.source for text in rows[0][1:]} == {text.source for text in rows[2]} == {"second"}
    assert rows[1] == ()
    assert "old" not in [text.text for text in rows[2]], "the source's texts are replaced"
    scores = [text.score for text in rows[2]]
    assert all(isinstance(score, float) and score < 0 for score in scores)
    assert scores == sorted(scores, reverse=True)
    assert main(command) == 1
    assert [row.external for row in read_manifest(pool)] == rows, "in place, the same"
    assert "written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--add-to", "POOL", "--source", "beam"], "'beam' is one of ours"),
        (["--add-to", "POOL", "--manifest", "POOL"], "--add-to MANIFEST takes its rows"),
        (["--manifest", "POOL", "--source", "cloud"], "--source names the model"),
        (["--add-to", "ABSENT"], "cannot be read"),
    ],
)
def test_flags_that_contradict_add_to_are_refused(
    flags: list[str], says: str, pool: Path, tmp_path: Path, nemo_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"POOL": str(pool), "ABSENT": str(tmp_path / "absent.json")}
    assert main(["transcribe", str(nemo_file("ctc_char")), *(places.get(flag, flag) for flag in flags)]) != 0
    assert says in capsys.readouterr().err
    assert not (tmp_path / "absent.json").exists()
