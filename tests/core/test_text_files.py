"""Text files as people save them and as attackers make them: one reader, typed errors, bounds."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemo_llm_feedback.core.config import read_terms
from nemo_llm_feedback.core.errors import ConfigError, FeedbackError, LLMError, ManifestError
from nemo_llm_feedback.core.text_files import MAX_DEPTH, parse_json, read_text, to_number
from nemo_llm_feedback.data.manifests import expand_paths, read_manifest
from nemo_llm_feedback.data.staging import write_copies
from nemo_llm_feedback.evaluation.predictions import rows_of_predictions
from nemo_llm_feedback.llm.prompts import read_template

LINE = {"audio_filepath": "a.wav", "duration": 1.5, "text": "one\u2028two", "pred_text": "one\u2028two"}
TEMPLATE = "The following is {description}.\n{hypothesis}"


def _readers(path: Path) -> dict[str, Any]:
    """What every reader of text makes of a file."""
    return {
        "manifest": lambda: [row.text for row in read_manifest(path)],
        "predictions": lambda: [row.text for row in rows_of_predictions(path)],
        "terms": lambda: read_terms(path),
        "template": lambda: read_template(str(path), chat=False),
    }


@pytest.mark.parametrize("form", ["utf-8-sig", "utf-16", "\r\n", "gz"])
def test_every_reader_takes_files_as_people_save_them(tmp_path: Path, form: str) -> None:
    def save(name: str, text: str) -> Path:
        path = tmp_path / (f"{name}.gz" if form == "gz" else name)
        text = text.replace("\n", "\r\n") if form == "\r\n" else text
        content = text.encode(form if form.startswith("utf") else "utf-8")
        path.write_bytes(gzip.compress(content) if form == "gz" else content)
        return path

    lines = [json.dumps(LINE | {"offset": offset}, ensure_ascii=False) for offset in (0.0, 1.0)]
    rows = save("m.jsonl", "".join(f"{line}\n" for line in lines))
    assert _readers(rows)["manifest"]() == _readers(rows)["predictions"]() == ["one\u2028two"] * 2
    assert read_terms(save("t.txt", "latte\nsoy milk\n")) == ["latte", "soy milk"]
    assert read_terms(save("t.json", '["latte", "soy milk"]')) == ["latte", "soy milk"]
    found, plain = read_template(str(save("p.txt", TEMPLATE)), chat=False), tmp_path / "plain.txt"
    plain.write_text(TEMPLATE)
    assert found == read_template(str(plain), chat=False)


def test_numbers_that_are_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**LINE, "duration": "1.5", "offset": "0.25"}) + "\n")
    (row,) = read_manifest(path)
    (predicted,) = rows_of_predictions(path)
    assert (row.duration, row.offset) == (predicted.duration, predicted.offset) == (1.5, 0.25)
    copy = json.loads(Path(write_copies(str(path), [row], tmp_path / "s")).read_text())
    assert (copy["duration"], copy["offset"]) == (1.5, 0.25)
    assert [to_number(v) for v in (True, None, "x", "1e999", float("nan"), 10**400, [1])] == [None] * 7


@pytest.mark.parametrize("duration", ["Infinity", "NaN", "1e308", "-1", "0", "true", "86401", '"inf"', "9" * 400])
def test_absurd_durations_are_refused(tmp_path: Path, duration: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(f'{{"audio_filepath": "a.wav", "duration": {duration}}}\n')
    with pytest.raises(ManifestError, match="positive `duration`"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["data (1)", "a,b", "x{1}", "[old]", "<new>", "sub/.."])
def test_brackets_commas_and_dots_in_a_path_are_part_of_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (tmp_path / "sub").mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    path = folder / "m (2),{x}.json"
    path.write_text(json.dumps(LINE) + "\n")
    rows = read_manifest(str(path))
    assert expand_paths(str(path)) == [str(path)]
    copy = write_copies(str(path), rows, tmp_path / "run" / ".." / "copies", patterns=False)
    assert not set(str(copy)) & set(",{}()[]<>")
    assert [row.text for row in read_manifest(copy)] == ["one\u2028two"]
    if "," not in name:
        assert expand_paths(f"{folder}/m_(0..1).json") == [f"{folder}/m_{k}.json" for k in range(2)]
    if name != "sub/..":
        with pytest.raises(ManifestError, match="choose another run folder"):
            write_copies(str(path), rows, folder, patterns=False)


HOSTILE = {
    "surrogate": b'{"audio_filepath": "a.wav", "duration": 1, "pred_text": "a", "text": "\\ud800"}',
    "number": b'{"audio_filepath": "a.wav", "pred_text": "a", "duration": ' + b"9" * 5000 + b"}",
    "nested": b'{"audio_filepath": "a.wav", "pred_text": "a", "duration": 1, "x": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "deep": b'{"audio_filepath": "a", "pred_text": "a", "duration": 1, "entities": ' + b"[" * 99 + b"]" * 99 + b"}",
    "bytes": b"\xff\xfe\xfd\x00\x81",
    "latin": '{"audio_filepath": "é.wav"}'.encode("latin-1"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_lines_are_one_typed_error(tmp_path: Path, kind: str) -> None:
    for name, error in (("manifest", ManifestError), ("predictions", ManifestError), ("terms", ConfigError)):
        path = tmp_path / "m.json"
        path.write_bytes(HOSTILE[kind])
        with pytest.raises(error, match=r"m\.json"):
            _readers(path)[name]()


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder", "long", "gz", "bomb"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = {"/dev/zero": Path("/dev/zero"), "folder": tmp_path, "long": tmp_path / ("x" * 300)}.get(kind)
    if kind == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    elif kind == "gz":
        path = tmp_path / "m.json.gz"
        path.write_bytes(gzip.compress(b"x" * 1000)[:20])
    elif kind == "bomb":
        path = tmp_path / "t.gz"
        path.write_bytes(gzip.compress(b"a" * (65 * 2**20)))
    assert path is not None
    for name, reader in _readers(path).items():
        if kind != "bomb" or name == "terms":
            with pytest.raises((ManifestError, ConfigError, LLMError)):
                reader()
    with pytest.raises(ValueError, match=r"more than 1 MiB|not a file|name too long|ended|stream"):
        read_text(path, max_mebibytes=1)


def test_audio_paths_that_no_system_has_are_refused(tmp_path: Path) -> None:
    for audio in ("x" * 5000, "a\\u0000b", ""):
        path = tmp_path / "m.json"
        path.write_text(f'{{"audio_filepath": "{audio}", "duration": 1}}\n')
        with pytest.raises(FeedbackError, match=r"m\.json:1: lacks `audio_filepath`"):
            read_manifest(path)


def test_nesting_is_bounded_alike_everywhere() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))
