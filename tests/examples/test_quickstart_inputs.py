"""The quickstart's inputs: nothing that is learned from has a text, and nothing that is measured is learned from."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from helpers.scripts import load_script

from nemo_llm_feedback.core.config import parse_run_config
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.data.audio import read_audio, unreadable
from nemo_llm_feedback.data.manifests import Row, read_manifest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def learned() -> list[Row]:
    cfg = compose_config([f"quickstart_dir={FOLDER}"], config_name="quickstart")
    return read_manifest(cfg.model.train_ds.manifest_filepath)


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    return [row for name in ("orders", "everyday") for row in read_manifest(FOLDER / "data" / f"{name}.json")]


def test_every_recording_can_be_read(learned: list[Row], measured: list[Row]) -> None:
    assert not unreadable([*learned, *measured])
    shipped = {path.resolve() for path in (FOLDER / "data" / "audio").rglob("*.ogg")}
    assert shipped == {Path(row.audio).resolve() for row in [*learned, *measured]}


def test_nothing_that_is_learned_from_has_a_text(learned: list[Row]) -> None:
    assert len(learned) == 240
    assert sum(row.replay == "kl" for row in learned) == 120
    assert [row for row in learned if {"text", "entities"} & set(row.data)] == []


def test_nothing_that_is_measured_is_learned_from(learned: list[Row], measured: list[Row]) -> None:
    def contents(rows: list[Row]) -> set[str]:
        return {hashlib.sha256(Path(row.audio).read_bytes()).hexdigest() for row in rows}

    def speakers(rows: list[Row]) -> set[str]:
        """Of speechocean762, whose file names begin with the speaker's number."""
        return {name[:7] for row in rows if (name := Path(row.audio).name).startswith("so")}

    assert len(contents(measured)) == len(measured) == 110
    assert not contents(measured) & contents(learned)
    assert len(speakers(measured)) == 26
    assert not speakers(measured) & speakers(learned)


def test_the_terms_that_were_spoken_are_on_the_menu(measured: list[Row]) -> None:
    cfg = compose_config([f"quickstart_dir={FOLDER}", "llm.model=any"], config_name="quickstart")
    menu = set(parse_run_config(cfg).context.load().terms)
    spoken = {term for row in measured for term in row.data.get("entities", [])}
    assert len(spoken) > 20
    assert spoken <= menu


def test_decoded_copies_hold_the_same_samples_and_lose_no_row(tmp_path: Path) -> None:
    few = tmp_path / "few"
    (few / "data" / "audio").mkdir(parents=True)
    shutil.copy(FOLDER / "base.nemo", few)
    first = next((FOLDER / "data" / "audio").rglob("*.ogg"))
    shutil.copy(first, few / "data" / "audio")
    (few / "data" / "pool.json").write_text(f'{{"audio_filepath": "audio/{first.name}", "duration": 2.0}}\n')
    load_script("examples/quickstart/run.py").decode(few, tmp_path / "copies")
    (row,) = read_manifest(tmp_path / "copies" / "data" / "pool.json")
    assert row.audio.endswith(".wav")
    assert (read_audio(row.audio) == read_audio(first)).all()
    assert (tmp_path / "copies" / "base.nemo").read_bytes() == (FOLDER / "base.nemo").read_bytes()
    assert not list((tmp_path / "copies").rglob("*.part"))
