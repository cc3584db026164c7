"""The manifest key `hypotheses`: its forms, its faults, and that every loader hands it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_llm_feedback.core.config.sections import RESERVED_SOURCES
from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.types import ExternalText
from nemo_llm_feedback.data.external import MAX_TEXTS, parse_hypotheses
from nemo_llm_feedback.data.manifests import read_manifest


def _rows(path: Path, *hypotheses: Any) -> Path:
    rows = [{"audio_filepath": "a.wav", "duration": 1.0, "hypotheses": value} for value in hypotheses]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_hypotheses_are_texts_or_objects(tmp_path: Path) -> None:
    cloud = {"text": " A mocha. ", "source": "cloud/v2", "score": -1.5}
    path = _rows(tmp_path / "m.json", ["a latte", cloud, {"text": "tea", "source": None, "score": "2"}], [], None)
    first, empty, null = read_manifest(path)
    assert first.external == (
        ExternalText("a latte", "external"),
        ExternalText("A mocha.", "cloud/v2", -1.5),
        ExternalText("tea", "external", 2.0),
    )
    assert empty.external == null.external == ()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("a latte", "must be a list of texts"),
        ({"text": "a latte"}, "must be a list of texts"),
        ([3], "`hypotheses` 1: must be a text, or an object"),
        (["tea", None], "`hypotheses` 2: must be a text, or an object"),
        ([{"source": "cloud"}], "must be a text, or an object"),
        (["a latte", "  "], "`hypotheses` 2: the text is empty: leave it out"),
        ([{"text": "tea", "scores": 1}], "not 'scores'"),
        ([{"text": "tea", "score": "high"}], "`score` must be a number"),
        ([{"text": "tea", "source": 7}], "a source must be a name"),
        ([{"text": "tea", "source": "my cloud"}], "without spaces"),
        ([{"text": "tea", "source": "x" * 65}], "64 characters"),
        (["tea"] * 500, f"has 500 texts, at most {MAX_TEXTS} are read: keep the best"),
    ],
)
def test_a_fault_in_hypotheses_names_the_row_and_the_fix(value: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as error:
        read_manifest(_rows(tmp_path / "m.json", ["tea"], value))
    assert "m.json:2:" in str(error.value)
    assert says in str(error.value)
    assert "m.json:1:" not in str(error.value)


@pytest.mark.parametrize("name", [*RESERVED_SOURCES, "Beam", "GREEDY"])
def test_a_source_cannot_be_called_as_one_of_ours(name: str) -> None:
    with pytest.raises(ValueError, match=r"is one of ours.*give it another name"):
        parse_hypotheses([{"text": "tea", "source": name}])
