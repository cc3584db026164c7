"""Files with several channels: every reader mixes them to one in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers.fits import config
from helpers.tiny import write_manifest

from nemo_llm_feedback.data.audio import load_audio
from nemo_llm_feedback.data.manifests import read_manifest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same two recordings with two channels that differ, and mixed to one; the texts are the same, too."""
    folder = tmp_path_factory.mktemp("stereo")
    stereo = write_manifest(folder / "stereo.json", ["a latte", "tea"])
    mono = folder / "mono.json"
    lines = [json.loads(line) for line in stereo.read_text().splitlines()]
    for line in lines:
        left, rate = soundfile.read(folder / line["audio_filepath"], dtype="float32")
        right = np.roll(left, 4000) * 0.5
        soundfile.write(folder / line["audio_filepath"], np.stack([left, right], axis=1), rate, subtype="FLOAT")
        line["audio_filepath"] = line["audio_filepath"].replace("stereo", "mono")
        soundfile.write(folder / line["audio_filepath"], (left + right) / 2, rate, subtype="FLOAT")
    mono.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return stereo, mono


def test_stereo_audio_is_mixed_to_one_channel_by_our_reader(manifests: tuple[Path, Path]) -> None:
    stereo, mono = (load_audio(read_manifest(path), sample_rate=16000, device=CPU) for path in manifests)
    assert stereo.signal.shape == mono.signal.shape
    torch.testing.assert_close(stereo.signal, mono.signal)


@pytest.mark.parametrize("lhotse", [False, True])
@pytest.mark.parametrize("selector", [None, "average"])
def test_stereo_audio_is_mixed_to_one_channel_by_the_training_loader(
    nemo_file: Any, manifests: tuple[Path, Path], tmp_path: Path, lhotse: bool, selector: str | None
) -> None:
    from nemo_llm_feedback.training.models import restore

    mixed = load_audio(read_manifest(manifests[1]), sample_rate=16000, device=CPU)
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    cfg = config(manifests[0], feedback={"use_text": False}, objective={"name": "self_training"})
    cfg["model"]["train_ds"] |= {"use_lhotse": lhotse, "use_bucketing": False, "channel_selector": selector}
    model.setup_feedback(cfg, work_dir=tmp_path)
    parts = model.feedback_setup.reader.split(next(iter(model._train_dl)))
    order = parts.unlabeled.signal_len.argsort()
    torch.testing.assert_close(parts.unlabeled.signal[order], mixed.signal, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lhotse", [False, True])
def test_stereo_audio_is_mixed_to_one_channel_by_the_validation_loader(
    nemo_file: Any, manifests: tuple[Path, Path], tmp_path: Path, lhotse: bool
) -> None:
    from nemo_llm_feedback.training.inputs import set_validation
    from nemo_llm_feedback.training.models import restore

    mixed = load_audio(read_manifest(manifests[1]), sample_rate=16000, device=CPU)
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    validation = {"manifest_filepath": str(manifests[0]), "use_lhotse": lhotse, "batch_size": 2, "num_workers": 0}
    rows = {"stereo": read_manifest(manifests[0])}
    settings = {"validation_ds": {**validation, "shuffle": False, "use_bucketing": False}}
    set_validation(model, settings, rows, tmp_path)
    signal, signal_len = next(iter(model._validation_dl))[:2]
    torch.testing.assert_close(signal[signal_len.argsort()], mixed.signal, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lhotse", [False, True])
def test_stereo_audio_is_mixed_to_one_channel_where_the_pool_is_measured(
    nemo_file: Any, manifests: tuple[Path, Path], tmp_path: Path, lhotse: bool
) -> None:
    """The pool has a loader of its own, whose batches of stereo files alone ended in "Input shape mismatch"."""
    from nemo_llm_feedback.training.models import restore

    mixed = load_audio(read_manifest(manifests[1]), sample_rate=16000, device=CPU)
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    cfg = config(manifests[0], feedback={"use_text": False}, objective={"name": "self_training"})
    cfg["model"]["train_ds"] |= {"use_lhotse": lhotse, "use_bucketing": False}
    model.setup_feedback(cfg, work_dir=tmp_path)
    (batch,) = model.pool_batches()
    torch.testing.assert_close(batch[0][batch[1].argsort()], mixed.signal, atol=1e-6, rtol=0)


def test_stereo_audio_is_evaluated_as_the_same_audio_mixed_to_one_channel(
    nemo_file: Any, manifests: tuple[Path, Path], shared: Path
) -> None:
    from nemo_llm_feedback.cli.jobs.evaluate import evaluate

    texts = [evaluate(nemo_file("ctc_char"), path).comparison.systems[0].texts for path in manifests]
    assert texts[0] == texts[1]
    case = evaluate(nemo_file("ctc_char"), shared / "cases" / "01-stereo" / "labelled.json")
    assert (len(case.comparison.rows), case.left_out) == (4, ())


@pytest.mark.parametrize("lhotse", [False, True])
def test_the_shared_case_is_read_alike_by_every_reader(
    nemo_file: Any, shared: Path, tmp_path: Path, lhotse: bool
) -> None:
    from nemo_llm_feedback.training.models import restore

    pool = shared / "cases" / "01-stereo" / "pool.json"
    rows = read_manifest(pool)
    mixed = load_audio(rows, sample_rate=16000, device=CPU)
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    cfg = config(pool, feedback={"use_text": False}, objective={"name": "self_training"})
    cfg["model"]["train_ds"] |= {"use_lhotse": lhotse, "use_bucketing": False, "batch_size": len(rows)}
    model.setup_feedback(cfg, work_dir=tmp_path)
    (batch,) = model.pool_batches()
    wanted = [row[:n] for row, n in zip(mixed.signal, mixed.signal_len.tolist(), strict=True)]
    for row, length in zip(batch[0], batch[1].tolist(), strict=True):
        assert any(len(own) == length and torch.allclose(row[:length], own, atol=1e-4) for own in wanted)
