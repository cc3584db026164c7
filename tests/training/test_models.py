"""Which checkpoint a name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nemo.collections.asr.models import ASRModel
from omegaconf import OmegaConf

from nemo_llm_feedback.cli.jobs.start import source
from nemo_llm_feedback.core.errors import CheckpointError
from nemo_llm_feedback.training.models import locate

RELEASED = [
    "nvidia/parakeet-tdt-0.6b-v2",
    "nvidia/parakeet-tdt-0.6b-v3",
    "nvidia/parakeet-tdt-1.1b",
    "nvidia/parakeet-tdt_ctc-110m",
    "nvidia/parakeet-tdt_ctc-0.6b-ja",
    "nvidia/parakeet-ctc-0.6b",
    "nvidia/parakeet-rnnt-1.1b",
    "nvidia/parakeet-unified-en-0.6b",
    "nvidia/nemotron-speech-streaming-en-0.6b",
    "nvidia/stt_en_fastconformer_transducer_large",
    "nvidia/stt_en_fastconformer_hybrid_large_streaming_multi",
    "nvidia/stt_en_conformer_ctc_small",
    "stt_en_citrinet_256_gamma_0_25",
    "QuartzNet15x5Base-En",
]


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names that NeMo was asked for; it gives a file for each."""
    asked: list[str] = []

    def fetch(name: str, **settings: Any) -> str:
        assert settings == {"return_model_file": True}
        asked.append(name)
        (tmp_path / "fetched.nemo").touch()
        return str(tmp_path / "fetched.nemo")

    monkeypatch.setattr(ASRModel, "from_pretrained", fetch)
    return asked


@pytest.mark.parametrize("name", RELEASED)
def test_names_of_released_checkpoints_are_fetched(name: str, download: list[str], tmp_path: Path) -> None:
    cfg = OmegaConf.create({"init_from_pretrained_model": name, "trainer": {"accelerator": "cpu"}})
    assert source(cfg) == tmp_path / "fetched.nemo"
    assert download == [name]


@pytest.mark.parametrize("name", ["absent.nemo", "folder/absent.nemo", "/some/where/else", "a/b/c-0.6b"])
def test_paths_are_not_asked_for(name: str, download: list[str]) -> None:
    assert locate(name) == Path(name)
    assert not download


def test_a_name_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **settings: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(ASRModel, "from_pretrained", fetch)
    with pytest.raises(CheckpointError, match=r"nvidia/parakeet-tdt-0\.6b-v2 is neither .* no network"):
        locate("nvidia/parakeet-tdt-0.6b-v2")
