"""`prepare`: speech of any format becomes rows that adapt takes; what cannot be read is listed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nemo_llm_feedback.cli.jobs import prepare as module
from nemo_llm_feedback.cli.jobs.prepare import prepare
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.cli.options import Segmenting
from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.data.audio import unreadable
from nemo_llm_feedback.data.manifests import read_manifest

SPEECH = sorted((Path(__file__).resolve().parents[1] / "helpers" / "speech").glob("*.ogg"))


def speech(count: int) -> list[np.ndarray]:
    """Synthetic speech of a few seconds, 16 kHz."""
    import librosa

    return [librosa.load(path, sr=16000)[0] for path in SPEECH[:count]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of four utterances with 2 s of silence between, in several formats, and files that are none."""
    import librosa

    root = tmp_path_factory.mktemp("recordings")
    parts = [part for utterance in speech(4) for part in (utterance, np.zeros(32000, dtype=np.float32))]
    long = np.concatenate(parts)
    soundfile.write(root / "long.wav", long, 16000)
    (root / "more").mkdir()
    telephone = librosa.resample(long, orig_sr=16000, target_sr=8000)
    soundfile.write(root / "more" / "telephone.mp3", telephone, 8000)
    stereo = librosa.resample(long, orig_sr=16000, target_sr=44100)
    soundfile.write(root / "more" / "stereo.flac", np.stack([stereo, np.zeros_like(stereo)], axis=1), 44100)
    soundfile.write(root / "silence.ogg", np.zeros(16000, dtype=np.float32), 16000)
    soundfile.write(root / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    (root / "broken.wav").write_bytes(b"RIFF nothing")
    (root / "notes.txt").write_text("no audio")
    return root


def test_recordings_become_rows_for_adapt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "pool.json"
    assert main(["prepare", str(folder), "--out", str(out), "--preview", "2"]) == 0
    rows = read_manifest(out)
    assert not any(row.text for row in rows)
    assert "text" not in rows[0].data
    assert not unreadable(rows)
    by_file: dict[str, list[Any]] = {}
    for row in rows:
        by_file.setdefault(Path(row.audio).name, []).append(row)
    assert set(by_file) == {"long.wav", "telephone.mp3", "stereo.flac"}
    lengths = [len(utterance) / 16000 for utterance in speech(4)]
    for own in by_file.values():
        assert len(own) == 4
        start = 0.0
        for row, length in zip(own, lengths, strict=True):
            assert row.offset == pytest.approx(start, abs=0.6)
            assert row.duration == pytest.approx(length, abs=0.9)
            start += length + 2.0
    printed = capsys.readouterr().out
    assert "segments      12" in printed
    assert "8000, 16000, 44100 Hz, 1 with several channels" in printed
    assert "silence.ogg" in printed
    assert "UNREADABLE    2 file(s)" in printed
    assert "broken.wav: neither soundfile nor librosa can read it" in printed
    assert "empty.wav: no audio in it" in printed
    assert "… and 10 more" in printed


def test_segments_keep_to_their_limits(folder: Path, tmp_path: Path) -> None:
    settings = Segmenting(min_duration=0.5, max_duration=1.5, merge_gap=0.1, padding=0.1)
    result = prepare(folder / "long.wav", out=tmp_path / "m.json", settings=settings)
    (recording,) = result.recordings
    assert len(recording.segments) > 4
    assert all(0.5 <= length <= 1.5 for _, length in recording.segments)
    ends = [start + length for start, length in recording.segments]
    assert all(end <= start + 1e-9 for end, (start, _) in zip(ends, recording.segments[1:], strict=False))
    assert ends[-1] <= recording.duration


def test_short_silences_do_not_cut_and_speech_is_padded(folder: Path, tmp_path: Path) -> None:
    """With a gap over the silences between all utterances the recording is one segment, up to the maximum."""
    joined = Segmenting(merge_gap=3.0, max_duration=60.0)
    (recording,) = prepare(folder / "long.wav", out=tmp_path / "m.json", settings=joined).recordings
    assert len(recording.segments) == 1
    (tight, wide) = (
        prepare(folder / "long.wav", out=tmp_path / "m.json", settings=Segmenting(padding=padding)).recordings[0]
        for padding in (0.0, 0.3)
    )
    for (_, short), (_, long) in zip(tight.segments, wide.segments, strict=True):
        assert 0.3 <= long - short <= 0.602


def test_files_that_only_librosa_reads_are_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import librosa

    samples, rate = soundfile.read(folder / "more" / "stereo.flac", dtype="float32")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "phone.m4a").write_bytes(b"an AAC stream")
    monkeypatch.setattr(librosa, "load", lambda *args, **kwargs: (samples.T, rate))
    for name in ("m.json", "m.json", "other.json"):  # no later run takes the copies of an earlier one for recordings
        result = prepare(tmp_path / "in", out=tmp_path / "in" / name)
        assert list(result.converted) == [tmp_path / "in" / "phone.m4a"]
    rows = read_manifest(tmp_path / "in" / "m.json")
    assert len(rows) == 4
    assert not unreadable(rows)
    copies = [path.relative_to(tmp_path / "in") for path in sorted((tmp_path / "in").rglob("*.flac"))]
    assert list(map(str, copies)) == ["m_audio/phone.flac", "other_audio/phone.flac"]  # none that no manifest names
    # A folder's own recordings are none, whatever lies beside them.
    (tmp_path / "in" / "m_audio" / "call.flac").write_bytes((folder / "more" / "stereo.flac").read_bytes())
    assert len(prepare(tmp_path / "in", out=tmp_path / "in" / "m.json").recordings) == 2
    (tmp_path / "in" / "m_audio" / "call.flac").unlink()
    # Of two recordings of one name each has a copy, in a folder whose list is damaged, too.
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "phone.m4a").write_bytes(b"another")
    for content, count in ((None, 2), ("[]", 4)):
        if content:
            (tmp_path / "in" / "m_audio" / "originals.json").write_text(content)
        result = prepare(tmp_path / "in", out=tmp_path / "in" / "m.json")
        assert len(set(result.converted.values())) == 2
        assert len(list((tmp_path / "in" / "m_audio").glob("*.flac"))) == count


def test_a_recording_is_never_written_over(folder: Path, tmp_path: Path) -> None:
    recording = tmp_path / "in" / "long.wav"
    recording.parent.mkdir()
    recording.write_bytes((folder / "long.wav").read_bytes())
    for given in (recording, recording.parent):
        with pytest.raises(ConfigError, match="would be written over, and this command reads it"):
            prepare(given, out=recording)
    assert recording.read_bytes() == (folder / "long.wav").read_bytes()


def test_bad_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.json"
    with pytest.raises(ManifestError, match="no such file or folder"):
        prepare(tmp_path / "absent", out=out)
    with pytest.raises(ManifestError, match="no audio in this folder"):
        prepare(tmp_path, out=out)
    with pytest.raises(ManifestError, match=r"none of 1 file\(s\) can be read"):
        prepare(folder / "broken.wav", out=out)
    with pytest.raises(ManifestError, match="no speech of at least"):
        prepare(folder / "silence.ogg", out=out)
    with pytest.raises(ConfigError, match=r"0 < min < max.*--threshold must be in \(0, 1\)"):
        prepare(folder, out=out, settings=Segmenting(min_duration=30.0, threshold=1.0))
    with pytest.raises(ConfigError, match="cannot be written"):  # before any recording is read
        prepare(folder, out=tmp_path)
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(ConfigError, match="pip install silero-vad"):
        prepare(folder, out=out)
    assert not out.exists()


def test_reading_by_blocks_is_reading_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module._load(folder / "more" / "stereo.flac")
    monkeypatch.setattr(module, "_BLOCK_SECONDS", 1)
    parts = module._load(folder / "more" / "stereo.flac")
    assert len(whole) == len(parts)
    assert np.abs(whole - parts).max() < 1e-4
