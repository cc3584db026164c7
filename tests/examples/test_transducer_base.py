"""A hybrid with a CTC base's encoder (examples/experiments/transducer_base.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import open_dict

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "experiments"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import transducer_base

    return transducer_base


def _model(path: Path) -> Any:
    from nemo.collections.asr.models import ASRModel

    return ASRModel.restore_from(path, map_location="cpu").eval()


@pytest.mark.parametrize("kind", ["hybrid_bpe", "hybrid_tdt_bpe"])
def test_the_hybrid_hears_as_the_base_does(kind: str, module: Any, nemo_file: Any) -> None:
    base, hybrid = _model(nemo_file("ctc_bpe")), _model(nemo_file(kind))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1)  # fine-tuned since
    joint = {name: value.clone() for name, value in hybrid.joint.state_dict().items()}
    signal, length = torch.randn(1, 8000), torch.tensor([8000])
    with torch.no_grad():
        wanted = base(input_signal=signal, input_signal_length=length)[0]
        assert not torch.allclose(_ctc(hybrid, signal, length), wanted)
        assert torch.equal(_ctc(module.graft(base, hybrid), signal, length), wanted)
    assert all(torch.equal(value, joint[name]) for name, value in hybrid.joint.state_dict().items())


def test_a_hybrid_of_another_family_is_refused(module: Any, nemo_file: Any) -> None:
    base, hybrid = _model(nemo_file("ctc_bpe")), _model(nemo_file("hybrid_bpe"))
    with open_dict(hybrid.cfg):
        hybrid.cfg.encoder.n_layers += 1
    with pytest.raises(SystemExit, match="differ in their encoder"):
        module.graft(base, hybrid)


def _ctc(hybrid: Any, signal: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """[B, T, V] log p of the CTC head."""
    features, frames = hybrid.preprocessor(input_signal=signal, length=length)
    encoded, _ = hybrid.encoder(audio_signal=features, length=frames)
    return hybrid.ctc_decoder(encoder_output=encoded)
