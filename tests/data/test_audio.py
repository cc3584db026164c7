"""Broken audio: named, left out and counted under ``skip``, wherever it is met; names that two recordings share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers.fits import config, label_reward
from helpers.tiny import write_audio, write_manifest

from nemo_llm_feedback.core.errors import ConfigError, DecodingError, ManifestError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.audio import AUDIO_TYPES, audio_files, read_audio, unreadable
from nemo_llm_feedback.data.batches import BatchReader, training_config
from nemo_llm_feedback.data.manifests import Row, read_manifest
from nemo_llm_feedback.data.staging import stage


def _broken(path: Path, kind: str) -> Path:
    samples = np.random.default_rng(0).standard_normal(24000).astype(np.float32) * 0.1
    if kind in ("nan", "inf"):
        samples[100:200] = float(kind)
        soundfile.write(path, samples, 16000, subtype="FLOAT", format="WAV")
    elif kind == "half":
        soundfile.write(path, samples, 16000, format="FLAC")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        soundfile.write(path, samples[: {"no samples": 0, "short": 2000}[kind]], 16000, format="WAV")
    return path


@pytest.mark.parametrize("kind", ["half", "nan", "inf", "empty", "no samples", "short"])
def test_broken_audio_is_named_before_any_work_and_left_out_under_skip(tmp_path: Path, kind: str) -> None:
    path = write_manifest(tmp_path / "m.json", [None] * 3)
    bad = _broken(tmp_path / "bad.audio", kind)
    with path.open("a") as file:
        file.write(json.dumps({"audio_filepath": str(bad), "duration": 1.5}) + "\n")
    with pytest.raises(ManifestError, match=r"1 row\(s\) with unreadable audio(.|\n)*m\.json:4: .*bad\.audio cannot"):
        stage({"manifest_filepath": str(path)}, tmp_path / "s", use_text=True, on_bad_audio="error")
    staged = stage({"manifest_filepath": str(path)}, tmp_path / "s", use_text=True, on_bad_audio="skip")
    assert len(staged.rows) == 3
    assert "bad.audio" in staged.left_out["with unreadable audio"][0]


def test_lhotse_reads_of_a_file_what_the_row_says_also_without_an_offset(nemo_file: Any, tmp_path: Path) -> None:
    """Of a row with a duration alone NeMo's Lhotse reader takes the whole file, or leaves it out as too long."""
    from nemo_llm_feedback.training.models import restore

    path = write_manifest(tmp_path / "m.json", [None] * 2, seconds=2.0)
    lines = [json.loads(line) | {"duration": 1.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "offset"}) + "\n" for line in lines))
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    cfg = config(path)
    cfg["model"]["train_ds"] |= {"use_lhotse": True, "use_bucketing": False, "batch_size": 2, "max_duration": 1.5}
    model.setup_feedback(cfg, work_dir=tmp_path / "run", reward=label_reward)
    audio = model.feedback_setup.reader.split(next(iter(model._train_dl))).unlabeled
    assert audio.signal_len.tolist() == [16000, 16000]
    assert sorted(audio.utterances) == sorted(row.utterance for row in model.feedback_setup.staged.rows)


@pytest.mark.parametrize("key", ["input_cfg", "cuts_path", "shar_path", "text_field"])
def test_data_that_is_read_past_the_manifest_is_refused(key: str) -> None:
    """NeMo prefers them: a run trained on other rows, or on labels, than those that it had checked and shown."""
    given = {"manifest_filepath": "m.json", "sample_rate": 16000, "use_lhotse": True, key: "other"}
    with pytest.raises(ConfigError, match=f"model.train_ds.{key}: a run reads manifest_filepath"):
        training_config(given, manifest_filepath="m.json", global_rank=0, world_size=1, seed=0)


def test_recordings_behind_linked_folders_are_found_once(tmp_path: Path) -> None:
    write_audio(tmp_path / "archive" / "2024" / "a.wav", seconds=0.1, seed=0)
    write_audio(tmp_path / "calls" / "b.aiff", seconds=0.1, seed=1)
    (tmp_path / "calls" / "2024").symlink_to(tmp_path / "archive" / "2024")
    (tmp_path / "archive" / "2024" / "round").symlink_to(tmp_path / "archive" / "2024")
    (tmp_path / "calls" / "latest").symlink_to(tmp_path / "calls" / "2024")  # and a sibling, and the folder itself
    (tmp_path / "calls" / "again").symlink_to(tmp_path / "calls")
    write_audio(tmp_path / "calls" / "2023" / "c.wav", seconds=0.1, seed=2)
    (tmp_path / "calls" / "1st").symlink_to(tmp_path / "calls" / "2023")
    found = audio_files(tmp_path / "calls", {f".{kind}" for kind in AUDIO_TYPES})
    assert sorted(file.name for file in found) == ["a.wav", "b.aiff", "c.wav"]
    assert tmp_path / "calls" / "2023" / "c.wav" in found  # by its own name


@pytest.mark.parametrize("lhotse", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_audio_that_breaks_in_mid_run_is_named_and_skipped(
    nemo_file: Any, tmp_path: Path, lhotse: bool, skip: bool
) -> None:
    from nemo_llm_feedback.training.models import restore

    path = write_manifest(tmp_path / "m.json", [None] * 4)
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    cfg = config(path, feedback={"on_bad_audio": "skip" if skip else "error"})
    cfg["model"]["train_ds"] |= {"use_lhotse": lhotse, "use_bucketing": False, "batch_size": 4}
    model.setup_feedback(cfg, work_dir=tmp_path / "run", reward=label_reward)
    for number, kind in enumerate(["nan", "half", "empty"]):
        _broken(tmp_path / "wav" / f"m_{number}.wav", kind)
    split, loader = model.feedback_setup.reader.split, model._train_dl
    if not skip:
        with pytest.raises(DecodingError, match=r"m_\d\.wav"):
            split(next(iter(loader)))
        return
    parts = split(next(iter(loader)))
    assert ["m_3.wav" in name for name in parts.unlabeled.utterances] == [True]
    assert int(parts.unlabeled.signal_len[0]) == len(soundfile.read(tmp_path / "wav" / "m_3.wav")[0])
    left_out = sorted(model.feedback_setup.reader.left_out)  # every one is named and counted, not one of its batch
    assert [f"m_{number}.wav" in name for number, name in enumerate(left_out)] == [True] * 3
    _broken(tmp_path / "wav" / "m_3.wav", "half")
    parts = split(next(iter(loader)))
    assert parts.labelled is parts.replay is parts.unlabeled is None
    assert not parts.all_labelled


def test_a_step_without_readable_rows_trains_nothing(nemo_file: Any, tmp_path: Path) -> None:
    from helpers.fits import fit

    from nemo_llm_feedback.training.models import restore

    path = write_manifest(tmp_path / "m.json", [None, None])
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    model.setup_feedback(config(path, feedback={"on_bad_audio": "skip"}), work_dir=tmp_path, reward=label_reward)
    split = model.feedback_setup.reader.split
    model.feedback_setup.reader.split = lambda batch: split([torch.full_like(batch[0], torch.nan), *batch[1:]])
    pool = list(model.pool_batches())
    model.encoded_pool = lambda: iter([_encoded(model, split(batch).unlabeled) for batch in pool])
    before = {name: value.clone() for name, value in model.named_parameters()}
    fit(model, steps=1)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def _encoded(model: Any, audio: Any) -> Any:
    from nemo_llm_feedback.asr.reference import evaluation_mode
    from nemo_llm_feedback.training.pool import EncodedAudio

    with torch.no_grad(), evaluation_mode(model):
        return EncodedAudio(audio, *model._encode(audio))


def test_two_recordings_of_one_name_never_share_a_group() -> None:
    row = Row("/a.wav", 1.0, 0.0, "", Context(), "m.json:1", {})
    batch = [torch.randn(1, 100), torch.tensor([100]), torch.zeros(1, 0), torch.tensor([0]), torch.tensor([0])]
    reader = BatchReader(Context("x"), use_text=True, rows=[row])
    reader.split(batch)
    padded = [torch.nn.functional.pad(batch[0], (0, 50)), *batch[1:]]
    reader.split(padded)
    with pytest.raises(ManifestError, match=r"two different recordings are called /a\.wav@0\.000\+1\.000"):
        reader.split([torch.randn(1, 100), *batch[1:]])
    changed = BatchReader(Context("x"), use_text=True, rows=[row], train_ds={"augmentor": {"white_noise": {}}})
    changed.split(batch)
    changed.split([torch.randn(1, 100), *batch[1:]])


def test_the_reader_gives_what_nemos_reader_gives(tmp_path: Path) -> None:
    from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal((44100, 2)) * 0.1, 44100)
    place = {"offset": 0.2, "duration": 0.5}
    nemo = AudioSegment.from_file(str(path), target_sr=16000, channel_selector="average", **place)
    assert np.array_equal(read_audio(path, sample_rate=16000, **place), nemo.samples)


@pytest.mark.parametrize("case", ["06-corrupt-audio-body", "15-nan-samples"])
def test_shared_cases_have_one_bad_file(shared: Path, case: str) -> None:
    rows = read_manifest(shared / "cases" / case / "pool.json")
    ((i, reason),) = unreadable(rows).items()
    row = rows[i]
    assert Path(row.audio).name in reason
    assert Path(row.audio).name == {"06-corrupt-audio-body": "u2.flac"}.get(case, Path(row.audio).name)


def test_fuzzed_audio_is_read_or_a_typed_error(tmp_path: Path) -> None:
    """Cut, flipped, repeated and random bytes of real files in all formats that a manifest may name."""
    folder, files, rng = tmp_path, 200, np.random.default_rng(0)
    samples, _ = soundfile.read(write_audio(folder / "a.wav", seconds=0.5, seed=0))
    formats = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
    formats += [("AIFF", "PCM_16"), ("W64", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("NIST", "PCM_16")]
    whole = []
    for number, (kind, subtype) in enumerate(formats):
        soundfile.write(folder / f"w{number}", samples, 16000, format=kind, subtype=subtype)
        whole.append((folder / f"w{number}").read_bytes())
    read = 0
    for number in range(files):
        content = bytearray(whole[number % len(whole)])
        how = rng.integers(5)
        if how == 0:
            content = content[: rng.integers(len(content))]
        elif how == 1:
            for place in rng.integers(len(content), size=8):
                content[place] = rng.integers(256)
        elif how == 2:
            for place in rng.integers(64, size=4):  # the header
                content[place] = rng.integers(256)
        elif how == 3:
            content = content[: len(content) // 2] + content
        else:
            content = bytearray(rng.bytes(int(rng.integers(1, 4000))))
        path = folder / f"f{number}"
        path.write_bytes(content)
        try:
            found = read_audio(path, offset=float(rng.choice([0.0, 0.2])), duration=0.5, sample_rate=16000)
        except DecodingError:
            continue
        assert found.dtype == np.float32
        assert found.ndim == 1
        assert 0 < len(found) <= 2 * 16000
        assert np.isfinite(found).all()
        read += 1
    assert 0 < read < files


def test_validation_and_guard_rows_with_broken_audio_are_left_out_under_skip(tmp_path: Path) -> None:
    from nemo_llm_feedback.training.inputs import labelled_rows

    path = write_manifest(tmp_path / "m.json", ["a latte", "tea"])
    _broken(tmp_path / "wav" / "m_1.wav", "nan")
    with pytest.raises(ManifestError, match=r"m_1\.wav"):
        labelled_rows(str(path))
    assert [row.text for row in labelled_rows(str(path), skip=True)["m"]] == ["a latte"]


def test_measured_rows_that_break_during_training_are_left_out_of_both_measurements_under_skip(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was trained, and the second measurement ended the run without a checkpoint."""
    from helpers.runs import run

    from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping

    pool = write_manifest(tmp_path / "pool.json", [None] * 4)
    dev = write_manifest(tmp_path / "dev.json", ["a latte", "tea", "one mocha"])
    finish = HeldOutEarlyStopping.finish

    def breaking(*args: Any) -> None:
        finish(*args)
        _broken(tmp_path / "wav" / "dev_1.wav", "half")
        (tmp_path / "wav" / "pool_0.wav").unlink()

    monkeypatch.setattr(HeldOutEarlyStopping, "finish", breaking)
    more = (f"model.validation_ds.manifest_filepath={dev}", "feedback.on_bad_audio=skip", "llm.quantization=none")
    result = run(nemo_file("ctc_bpe"), pool, tiny_llm, tmp_path / "runs", *more)
    assert result.nemo.is_file()
    assert result.before["dev"].references == result.after["dev"].references == ("a latte", "one mocha")
    log = (result.log_dir / "log.txt").read_text()
    assert log.count("1 row(s) left out, broken in the middle of the run") == 2
    assert "dev_1.wav" in log
    assert "pool_0.wav" in log


def test_score_leaves_rows_with_broken_audio_out(nemo_file: Any, tmp_path: Path) -> None:
    from nemo_llm_feedback.cli.jobs.nbest_probe import NBestProbe
    from nemo_llm_feedback.core.config.compose import compose_config

    path = write_manifest(tmp_path / "m.json", [None] * 3)
    cfg = compose_config(["reward=rules"])
    for number in range(3):
        if number:
            assert len(NBestProbe(nemo_file("ctc_char"), path, cfg).rows) == 3 - number
        _broken(tmp_path / "wav" / f"m_{number}.wav", "half")
    with pytest.raises(ManifestError, match="3 row"):
        NBestProbe(nemo_file("ctc_char"), path, cfg)
