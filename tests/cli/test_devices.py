"""What a run is told about its GPU before any work; torch.cuda and bitsandbytes are stubs, for lack of one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.cextension  # before torch.cuda is a stub: it looks for a device at its import
import pytest
import torch
from helpers.runs import arguments
from helpers.tiny import write_manifest
from omegaconf import OmegaConf

from nemo_llm_feedback.cli.jobs.devices import MemoryPlan, check_gpu, check_memory, memory_plan
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.llm import check_llm_folder
from nemo_llm_feedback.training.models import restore

CARD, GB = torch.device("cuda", 0), 2**30


def a_card(monkeypatch: pytest.MonkeyPatch, *, bf16: bool = True, kernels: bool = True, free: int = 0) -> None:
    """As if this machine had one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(bitsandbytes.cextension, "lib", SimpleNamespace(compiled_with_cuda=kernels))


def test_a_gpu_that_is_not_there_or_has_no_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(accelerator: str, precision: str = "32") -> Any:
        return OmegaConf.create({"trainer": {"accelerator": accelerator, "precision": precision}})

    check_gpu(trainer("auto", "bf16-mixed"))
    for accelerator in ("gpu", "cuda"):
        with pytest.raises(ConfigError, match="asks for a GPU and there is none; use trainer=cpu or trainer=auto"):
            check_gpu(trainer(accelerator))
    a_card(monkeypatch, bf16=False)
    for precision in ("bf16-mixed", "bf16-true"):
        with pytest.raises(ConfigError, match=r"Tesla T4 does not: set trainer.precision=32"):
            check_gpu(trainer("auto", precision))
    check_gpu(trainer("gpu"))
    check_gpu(trainer("cpu", "bf16-mixed"))
    a_card(monkeypatch)
    check_gpu(trainer("gpu", "bf16-mixed"))


def test_the_command_refuses_a_card_without_bfloat16_before_any_work(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    a_card(monkeypatch, bf16=False)
    manifest = write_manifest(tmp_path / "m.json", [None])
    given = arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "run")
    assert main(["adapt", *given, "trainer=gpu"]) == 1
    assert "set trainer.precision=32" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_bitsandbytes_without_its_cuda_library_is_refused_where_it_would_be_called(
    quantization: Any, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LLMConfig(model=str(tiny_llm), quantization=quantization)
    assert check_llm_folder(config) == []
    a_card(monkeypatch, kernels=False)
    (fault,) = check_llm_folder(config)
    assert f"llm.quantization={quantization} needs the CUDA library of bitsandbytes" in fault
    assert "set llm.quantization=none or llm.device=cpu" in fault
    assert check_llm_folder(LLMConfig(model=str(tiny_llm), quantization="none")) == []
    assert check_llm_folder(LLMConfig(model=str(tiny_llm), quantization=quantization, device="cpu")) == []
    a_card(monkeypatch)
    assert check_llm_folder(config) == []


@pytest.fixture
def prepared(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> tuple[Any, Any]:
    """A model after ``setup_feedback`` whose trainer is on a card, and the configuration."""
    manifest = write_manifest(tmp_path / "m.json", [None] * 4, seconds=2.0)
    cfg = compose_config(arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "run"))
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    model.setup_feedback(OmegaConf.to_container(cfg, resolve=True), work_dir=tmp_path / "w")
    model._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=CARD))
    return model, cfg


def test_too_little_memory_is_said_before_the_first_step_with_what_helps(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, cfg = prepared
    a_card(monkeypatch)
    plan = memory_plan(model, mixed=False, device=CARD)
    assert plan.trained == 16 * sum(p.numel() for p in model.parameters())
    assert min(plan.llm, plan.reference, plan.activations) > 0
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (plan.at_least - 1, plan.total))
    with pytest.raises(ConfigError, match=r"cuda:0 has .* GB free and the run needs about .*: set half the model"):
        check_memory(model, cfg)
    monkeypatch.setattr("nemo_llm_feedback.cli.jobs.devices.logging", logging.getLogger("nemo_llm_feedback.test"))
    for free, warnings in ((plan.total - 1, 1), (plan.total, 0)):
        caplog.clear()
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, free))
        check_memory(model, cfg)
        assert len(caplog.records) == warnings
    model._trainer.strategy.root_device = torch.device("cpu")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 0))
    check_memory(model, cfg)


def test_only_settings_that_lessen_the_need_are_named() -> None:
    plan = MemoryPlan(trained=10 * GB, reference=2 * GB, llm=6 * GB, joint=GB, activations=8 * GB, recomputed=GB // 2)
    assert plan.total == 28 * GB
    assert {setting.split()[0]: need // GB for setting, need in plan.ways_out().items()} == {
        "parameters.recompute_encoder=true": 20,
        "half": 24,
        "llm.phase=cached": 22,
        "reward=remote": 22,
    }
    waiting = replace(plan, reference=0, joint=0, activations=5 * GB, recomputed=5 * GB, waits=True)
    assert (waiting.at_least, waiting.total) == (11 * GB, 17 * GB)
    assert set(waiting.ways_out()) == {"reward=remote with a server on another GPU"}


def test_activations_are_about_what_autograd_keeps(prepared: Any) -> None:
    """The estimate is for released sizes; of the tiny model it is right within a factor of two."""
    from nemo_llm_feedback.asr.reference import encode, evaluation_mode

    model, _ = prepared
    batch = next(iter(model._train_dl))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if (place := value.untyped_storage().data_ptr()) not in parameters:
            kept[place] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), evaluation_mode(model):
        encode(model, batch[0], batch[1])
    counted = sum(value.untyped_storage().nbytes() for value in kept.values())
    estimate = memory_plan(model, mixed=False, device=torch.device("cpu")).activations
    assert 0.5 < estimate / counted < 2
