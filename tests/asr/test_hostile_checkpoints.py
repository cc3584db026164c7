"""Damaged and hostile ``.nemo`` files give one error that names the fault; nothing of them runs, leaks or grows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import CONFIG, hostile_files, pack, unpack, with_config, with_value
from helpers.runs import run
from helpers.tiny import build_nemo, make_tokenizer, write_manifest
from nemo.collections.asr.models import ASRModel

from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.jobs.export import export
from nemo_llm_feedback.cli.jobs.transcribe import transcribe
from nemo_llm_feedback.core.errors import CheckpointError
from nemo_llm_feedback.training.models import restore


@pytest.mark.slow
def test_every_hostile_file_is_refused_by_every_job(
    tmp_path: Path, nemo_file: Any, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NEMO_SECRET", "a secret")
    # An environment that lets PyTorch unpickle anything must not matter.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, files = tmp_path / "code has run", tmp_path / "files"
    files.mkdir()
    found = hostile_files(nemo_file("ctc_bpe"), files, marker)
    assert len(found) >= 50
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    jobs: dict[str, Callable[[Path], Any]] = {
        "adapt": lambda path: run(path, manifest, tiny_llm, tmp_path / "run"),
        "export": lambda path: export(path, output=tmp_path / "out.nemo"),
        "transcribe": lambda path: transcribe(path, manifest=manifest),
    }
    before = {path: path.stat().st_mtime for path in files.iterdir()}
    faults = []
    for name, (path, words) in found.items():
        for job, work in jobs.items():
            start = time.perf_counter()
            try:
                work(path)
                faults.append(f"{job}, {name}: accepted")
            except CheckpointError as error:
                if words not in str(error) and not (path.is_dir() and job == "adapt"):
                    faults.append(f"{job}, {name}: {error}")
            except Exception as error:
                faults.append(f"{job}, {name}: {type(error).__name__}: {error}")
            if time.perf_counter() - start > 10:
                faults.append(f"{job}, {name}: {time.perf_counter() - start:.0f} s")
    assert not faults, "\n".join(faults)
    assert not marker.exists()
    assert not (tmp_path / "out.nemo").exists()
    assert {path: path.stat().st_mtime for path in files.iterdir()} == before
    assert "Traceback" not in caplog.text
    restore(nemo_file("ctc_bpe"), map_location="cpu")  # NeMo's flags are as they were


def test_what_a_file_says_of_this_machine_is_not_exported(tmp_path: Path, nemo_file: Any) -> None:
    """A tokenizer's folder that exists here, of a file that lacks a part that NeMo would take from there."""
    local = make_tokenizer(tmp_path / "local")
    (local / "tokenizer.vocab").write_text("a secret\n")
    files = unpack(nemo_file("ctc_bpe"))

    def forget(config: dict[str, Any]) -> None:
        config["tokenizer"]["dir"] = str(local)
        config["tokenizer"].pop("spe_tokenizer_vocab")
        config["memory_profile"] = {"enabled": True, "output_path": str(tmp_path)}

    kept = {name: content for name, content in files.items() if not name.endswith("tokenizer.vocab")}
    path = export(pack(tmp_path / "m.nemo", with_config(kept, forget)), output=tmp_path / "out.nemo")
    assert not any(b"a secret" in content for content in unpack(path).values())
    assert "memory_profile" not in read_config(path)
    ASRModel.restore_from(str(path), map_location="cpu")


def test_old_archives_that_do_not_name_the_files_of_their_tokenizer_are_restored(
    tmp_path: Path, nemo_file: Any
) -> None:
    """NeMo 1.0 wrote gzipped archives with plain names."""
    files = unpack(nemo_file("ctc_bpe"))
    plain = {("./" + n.split("_", 1)[1] if "tokenizer." in n or "vocab" in n else n): c for n, c in files.items()}

    def forget(config: dict[str, Any]) -> None:
        config["tokenizer"] = {"dir": "/another/machine/tokenizer", "type": "bpe"}

    old = pack(tmp_path / "old.nemo", with_config(plain, forget), mode="w:gz")
    restore(old, map_location="cpu").save_to(str(tmp_path / "new.nemo"))
    ASRModel.restore_from(str(tmp_path / "new.nemo"), map_location="cpu")


def test_yaml_aliases_of_a_harmless_number_are_read(tmp_path: Path, nemo_file: Any) -> None:
    files = unpack(build_nemo("ctc_char", tmp_path / "base.nemo"))
    labels = list("abc")
    files = with_config(files, lambda config: config.update(labels=labels, again=labels))
    assert b"*id001" in files[CONFIG]
    path = pack(tmp_path / "m.nemo", files)
    assert read_config(path).labels == labels


@pytest.mark.parametrize("exists", [True, False])
def test_an_n_gram_model_of_a_beam_that_is_not_used_may_be_missing(
    exists: bool, tmp_path: Path, nemo_file: Any
) -> None:
    """A decoder's files are the user's; only devices, pipes and folders are refused."""
    (tmp_path / "lm.arpa").write_text("x")
    files = with_value(unpack(nemo_file("rnnt_bpe")), "decoding.beam.ngram_lm_model", str(tmp_path / "lm.arpa"))
    if not exists:
        (tmp_path / "lm.arpa").unlink()
    restore(pack(tmp_path / "m.nemo", files), map_location="cpu")


def test_nemo_is_heard_again_after_a_failed_restore(tmp_path: Path, nemo_file: Any) -> None:
    before = logging.getLogger("nemo_logger").level
    bad = pack(tmp_path / "m.nemo", with_value(unpack(nemo_file("ctc_bpe")), "encoder.d_model", -1))
    with pytest.raises(CheckpointError, match="cannot be restored"):
        restore(bad)
    assert logging.getLogger("nemo_logger").level == before
