"""Tarred audio by the Lhotse loader: names of segments, NeMo's ``-subN``, left-out rows, streams without a length."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
from helpers.fits import config

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.data.staging import stage

RATE = 16000


def _flac(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="FLAC")
    return buffer.getvalue()


def _write(folder: Path, shards: list[list[tuple[str, bytes]]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tar files, one manifest per shard, and NeMo's data section."""
    for number, members in enumerate(shards):
        with tarfile.open(folder / f"audio_{number}.tar", "w") as archive:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        lines = [json.dumps(row) for row in rows if row["shard_id"] == number]
        (folder / f"manifest_{number}.json").write_text("\n".join(lines) + "\n")
    last = len(shards) - 1
    return {
        "manifest_filepath": str(folder / (f"manifest__OP_0..{last}_CL_.json" if last else "manifest_0.json")),
        "tarred_audio_filepaths": str(folder / (f"audio__OP_0..{last}_CL_.tar" if last else "audio_0.tar")),
        "is_tarred": True,
        "use_lhotse": True,
        "use_bucketing": False,
        "shuffle": False,
        "batch_size": 4,
        "num_workers": 0,
    }


def _long(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tones = [np.sin(np.arange(int(1.5 * RATE)) * f) for f in (0.02, 0.05, 0.1, 0.2)]
    return (0.2 * np.concatenate(tones) + 0.01 * rng.standard_normal(6 * RATE)).astype(np.float32)


def _segments(names: list[str], shard: int = 0) -> list[dict[str, Any]]:
    return [
        {"audio_filepath": name, "offset": 1.5 * k, "duration": 1.5, "shard_id": shard} for k, name in enumerate(names)
    ]


def _names(nemo_file: Any, train_ds: dict[str, Any], folder: Path, *, batches: int = 1) -> list[str]:
    """The names of the unlabeled rows that training reads, with a trainer as the command makes it."""
    from nemo_llm_feedback.training.models import restore

    model = restore(nemo_file("ctc_char"), map_location="cpu")
    model.set_trainer(pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False))
    cfg = config("unused.json", objective={"name": "self_training"}, guards={"every": 0})
    cfg["model"]["train_ds"] = train_ds
    model.setup_feedback(cfg, work_dir=folder)
    assert model.trainer.limit_train_batches == 1.0
    stream = iter(model._train_dl)
    parts = [model.feedback_setup.reader.split(next(stream)).unlabeled for _ in range(batches)]
    return [name for part in parts for name in part.utterances]


def test_segments_of_equal_length_of_one_recording_have_different_names(nemo_file: Any, tmp_path: Path) -> None:
    """NeMo cuts them out, so that all start at 0; all learned the first one's words."""
    train_ds = _write(tmp_path, [[("long.flac", _flac(_long()))]], _segments(["long.flac"] * 4))
    names = _names(nemo_file, train_ds, tmp_path / "run")
    assert len(names) == len(set(names)) == 4
    assert sorted(name.split("@")[1] for name in names) == [f"{1.5 * k:.3f}+1.500" for k in range(4)]


def test_members_of_one_name_in_two_shards_have_different_names(nemo_file: Any, tmp_path: Path) -> None:
    shards = [[("a.flac", _flac(_long(k)[: 2 * RATE]))] for k in range(2)]
    rows = [{"audio_filepath": "a.flac", "duration": 2.0, "shard_id": k} for k in range(2)]
    names = _names(nemo_file, _write(tmp_path, shards, rows), tmp_path / "run")
    assert len(set(names)) == 2


def test_segments_that_nemos_converter_names_sub_are_in_the_tar_file(nemo_file: Any, tmp_path: Path) -> None:
    rows = _segments(["long.flac", "long-sub1.flac", "long-sub2.flac", "long-sub3.flac"])
    train_ds = _write(tmp_path, [[("long.flac", _flac(_long()))]], rows)
    staged = stage(train_ds, tmp_path / "s", use_text=True, on_bad_audio="error")
    assert len(staged.rows) == 4
    assert not staged.left_out
    assert len(set(_names(nemo_file, train_ds, tmp_path / "run"))) == 4
    with pytest.raises(ManifestError, match=r"long-sub1\.flac: in no tar file"):  # the classic loader keeps the suffix
        stage({**train_ds, "use_lhotse": False}, tmp_path / "c", use_text=True, on_bad_audio="error")


def test_a_member_whose_rows_are_all_left_out_does_not_stop_the_stream(nemo_file: Any, tmp_path: Path) -> None:
    members = [("long.flac", _flac(_long())), ("bad.flac", _flac(_long(1))[:9000])]
    rows = [*_segments(["long.flac"] * 2), {"audio_filepath": "bad.flac", "duration": 6.0, "shard_id": 0}]
    train_ds = _write(tmp_path, [members], rows)
    with pytest.raises(ManifestError, match=r"bad\.flac cannot be read"):
        stage(train_ds, tmp_path / "s", use_text=True, on_bad_audio="error")
    from nemo_llm_feedback.training.models import restore

    model = restore(nemo_file("ctc_char"), map_location="cpu")
    skip = {"on_bad_audio": "skip"}
    cfg = config("unused.json", feedback=skip, objective={"name": "self_training"}, guards={"every": 0})
    cfg["model"]["train_ds"] = train_ds
    model.setup_feedback(cfg, work_dir=tmp_path / "run")
    assert [len(rows) for rows in model.feedback_setup.staged.left_out.values()] == [1]
    parts = model.feedback_setup.reader.split(next(iter(model._train_dl)))  # the stream repeats
    assert len(set(parts.unlabeled.utterances)) == 2


def test_two_recordings_of_one_name_in_a_tar_file_are_an_error(tmp_path: Path) -> None:
    members = [("a.flac", _flac(_long(k)[:RATE])) for k in range(2)]
    train_ds = _write(tmp_path, [members], [{"audio_filepath": "a.flac", "duration": 1.0, "shard_id": 0}])
    with pytest.raises(ManifestError, match="two different recordings have one name"):
        stage(train_ds, tmp_path / "s", use_text=True, on_bad_audio="skip")


@pytest.mark.parametrize("case", ["07-tarred-sub-names", "08-tarred-equal-lengths"])
def test_shared_cases_give_four_names(nemo_file: Any, shared: Path, tmp_path: Path, case: str) -> None:
    folder = shared / "cases" / case
    train_ds = _write(tmp_path, [[]], [])
    for key in ("manifest_filepath", "tarred_audio_filepaths"):
        train_ds[key] = str(folder / Path(train_ds[key]).name)
    assert len(read_manifest(train_ds["manifest_filepath"], tarred=True)) == 4
    assert len(set(_names(nemo_file, train_ds, tmp_path / "run"))) == 4
