"""The LLM's files: hub ids from a local cache, which files are refused, and what distinguishes two LLMs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.config.faults import build
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import check_llm_folder, estimate_memory, load_llm, open_llm
from nemo_llm_feedback.llm import folder as llm_folder
from nemo_llm_feedback.llm.folder import fetch
from nemo_llm_feedback.llm.loading import read_max_positions

HOME = Context("a voice command to an assistant")
TEXTS = ["turn on the light", "milk", ""]


def config(folder: Path | str, **settings) -> LLMConfig:
    return LLMConfig(model=str(folder), **{"quantization": "none", "device": "cpu", **settings})


@pytest.fixture(scope="module")
def scorer(tiny_llm):
    return load_llm(config(tiny_llm))


# ---------------------------------------------------------------- hub ids


@pytest.fixture
def hub(tmp_path, tiny_llm) -> tuple[Path, str]:
    """A hub cache as huggingface_hub lays it out, with one model at one commit."""
    commit = "a" * 40
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_llm, repo / "snapshots" / commit)
    return tmp_path, commit


def run_offline(home: Path, code: str) -> str:
    environment = {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_ids_load_from_the_local_cache(hub, scorer):
    home, commit = hub
    code = f"""
from nemo_llm_feedback.llm import check_llm_folder, load_llm
from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.types import Context
exact = {{"quantization": "none", "device": "cpu", "compute_dtype": "float32"}}
def config(model, **more): return LLMConfig(model=model, **exact, **more)
assert check_llm_folder(config("someone/tiny")) == []
assert "local hub cache" in check_llm_folder(config("someone/else"))[0]
assert "local hub cache" in check_llm_folder(config("someone/tiny", revision="v2"))[0]
llm = load_llm(config("someone/tiny", revision="{commit}"))
assert llm.identity.startswith("someone/tiny@{commit}:none:float32:"), llm.identity
print(llm.score([(Context("a test"), ["a latte"])])[0][0].logp)
"""
    expected = scorer.score([(Context("a test"), ["a latte"])])[0][0].logp
    assert float(run_offline(home, code).split()[-1]) == pytest.approx(expected, abs=1e-4)


def test_hub_ids_that_are_partly_cached_are_faults_only_offline(hub):
    home, commit = hub
    (home / "hub" / "models--someone--tiny" / "snapshots" / commit / "model.safetensors").unlink()
    code = """
import huggingface_hub
from nemo_llm_feedback.llm import check_llm_folder
from nemo_llm_feedback.core.config import LLMConfig
assert "has no safetensors weights" in check_llm_folder(LLMConfig(model="someone/tiny"))[0]
huggingface_hub.constants.HF_HUB_OFFLINE = False
assert check_llm_folder(LLMConfig(model="someone/tiny")) == []
"""
    run_offline(home, code)


def test_checks_import_neither_transformers_nor_bitsandbytes(tiny_llm):
    code = f"""
import sys
from nemo_llm_feedback.llm import check_llm_folder
from nemo_llm_feedback.core.config import LLMConfig
assert check_llm_folder(LLMConfig(model={str(tiny_llm)!r})) == []
assert not {{"transformers", "bitsandbytes"}} & set(sys.modules)
"""
    run_offline(tiny_llm, code)


# ---------------------------------------------------------------- refusals


def damaged(tiny_llm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llm, tmp_path / "llm"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path | str, match: str, **settings) -> None:
    """The static check names the fault, and loading stops with it."""
    assert any(match in fault for fault in check_llm_folder(config(folder, **settings)))
    with pytest.raises(LLMError, match=match.replace("(", r"\(")):
        load_llm(config(folder, **settings))


def test_folder_without_weights(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, "has no safetensors weights")


def test_folder_with_pickle_weights_only(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    refused(folder, "Pickle weights can run code")


def test_folder_with_cut_weights_or_a_pointer_file(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused(folder, "cut short")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "not a safetensors file")


def test_folder_with_a_missing_shard(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00001.safetensors"}}))
    refused(folder, "model-00001.safetensors")


def test_weights_that_the_config_asks_for_must_be_there(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    edit(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(LLMError, match="would be random"):
        load_llm(config(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_folder_with_custom_code(tiny_llm, tmp_path, file):
    folder = damaged(tiny_llm, tmp_path)
    edit(folder / "config.json", model_type="evil")
    edit(folder / file, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    refused(folder, "custom code")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_transformers_has_is_loaded_without_its_custom_code(tiny_llm, tmp_path, file, scorer):
    """Phi-4-mini and others bring code for older versions."""
    folder = damaged(tiny_llm, tmp_path)
    edit(folder / file, auto_map={"AutoModelForCausalLM": "modeling.Evil", "AutoTokenizer": ["modeling.Evil", None]})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    assert load_llm(config(folder)).score([(HOME, TEXTS)]) == scorer.score([(HOME, TEXTS)])


def test_a_multimodal_model_without_a_causal_lm_is_refused(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    edit(folder / "config.json", model_type="mistral3", architectures=["Mistral3ForConditionalGeneration"])
    refused(folder, "mistral3, which transformers cannot load as a causal LM")


def test_with_longrope_the_first_form_of_positions_is_the_window(tmp_path):
    """Phi-3.5, Phi-4-mini: beyond it a score would depend on what else is in its batch."""
    from transformers import Phi3Config

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    shape = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 512}
    Phi3Config(**shape, original_max_position_embeddings=64, rope_parameters=rope).save_pretrained(tmp_path)
    assert read_max_positions(tmp_path) == 64
    Phi3Config(**shape).save_pretrained(tmp_path)
    assert read_max_positions(tmp_path) == 512


def test_of_a_hub_id_the_configs_are_judged_before_the_weights_are_fetched(tiny_llm, tmp_path, monkeypatch):
    folder, asked = damaged(tiny_llm, tmp_path), []
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})

    def fetched(model, revision, *, key, patterns=("*.safetensors",)):
        asked.append(patterns)
        return folder

    monkeypatch.setattr(llm_folder, "fetch", fetched)
    with pytest.raises(LLMError, match="stored in awq"):
        llm_folder.resolve_folder(config("someone/tiny-AWQ"))
    assert asked == [llm_folder.TOKENIZER_FILES]


def test_folder_without_tokenizer(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, "has no tokenizer")


def test_folder_with_a_foreign_tokenizer(tiny_llm, tmp_path):
    folder = make_tiny_llm(tmp_path / "llm", vocab_size=128)
    with pytest.raises(LLMError, match="tokenizer of the model"):
        load_llm(config(folder))


def test_folder_without_config_or_of_another_kind(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    edit(folder / "config.json", architectures=["BertForMaskedLM"])
    refused(folder, "not a causal LM")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def test_checkpoint_stored_quantised_otherwise(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, "gptq")
    edit(folder / "config.json", quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"})
    refused(folder, "stored in fp4", quantization="nf4")


def test_checkpoint_stored_in_nf4_scores_the_same_in_the_machines_dtype(tiny_llm, tmp_path):
    fresh = load_llm(config(tiny_llm, quantization="nf4"))
    fresh.model.config.quantization_config.bnb_4bit_compute_dtype = torch.bfloat16
    fresh.model.save_pretrained(tmp_path)
    fresh.encoder._tokenizer.save_pretrained(tmp_path)
    stored = load_llm(config(tmp_path, quantization="nf4"))
    assert stored.model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    expected = [score.logp for score in fresh.score([(HOME, TEXTS)])[0]]
    assert [score.logp for score in stored.score([(HOME, TEXTS)])[0]] == pytest.approx(expected, abs=1e-4)
    refused(tmp_path, "stored in nf4", quantization="none")


@pytest.mark.parametrize("model", ["/no/such/folder", "a/b/c", "bad id", "owner/model.bin", "-x/y"])
def test_neither_folder_nor_hub_id(model):
    refused(model, "neither a folder nor a hub id")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tiny_llm):
    refused(tiny_llm, "no CUDA device", device="cuda")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("Say {description}: {hypothesis}", "a space before {hypothesis}"),
        ("Say {description}\t{hypothesis}", "a space before {hypothesis}"),
        ("Say {description}", "0 {hypothesis} slots"),
        ("{hypothesis}{hypothesis}", "2 {hypothesis} slots"),
        ("{hypothesis} is what was said", "goes on after"),
        ("{descriptoin}\n{hypothesis}", "did you mean {description}"),
    ],
)
def test_bad_templates(tiny_llm, tmp_path, text, match):
    template = tmp_path / "template.txt"
    template.write_text(text)
    refused(tiny_llm, match, template=str(template))


def test_missing_template(tiny_llm):
    refused(tiny_llm, "cannot be read", template="/no/such/template.txt")


def test_all_faults_are_reported_at_once(tiny_llm, tmp_path):
    folder = damaged(tiny_llm, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    edit(folder / "config.json", model_type="evil", auto_map={})
    assert len(check_llm_folder(config(folder, template="/no/such"))) == 4
    bad = {"quantization": "nf3", "device": "gpu", "compute_dtype": "half", "chat": "yes", "token_budget": 0}
    made, faults = build(LLMConfig, {"model": "x", **bad}, where="llm")
    assert made is None
    assert sorted(fault.split()[0] for fault in faults) == sorted(f"llm.{key}" for key in bad)
    with pytest.raises(LLMError, match=r"llm\.model is missing"):
        load_llm(LLMConfig(model=""))
    assert LLMConfig(model="x").validate() == []


# ---------------------------------------------------------------- identity and memory


def test_identity_tells_apart_what_changes_scores(tiny_llm, tmp_path, scorer):
    template = tmp_path / "t.txt"
    template.write_text("{description}\n{hypothesis}")
    other = make_tiny_llm(tmp_path / "other", seed=1)
    moved = damaged(tiny_llm, tmp_path)
    variants = [
        config(tiny_llm, quantization="nf4"),
        config(tiny_llm, compute_dtype="bfloat16"),
        config(tiny_llm, template=str(template)),
        config(tiny_llm, max_context_tokens=100),
        config(other),
    ]
    identities = [scorer.identity, *(load_llm(variant).identity for variant in variants)]
    assert len(set(identities)) == len(identities)
    assert load_llm(config(moved, token_budget=5)).identity == scorer.identity


def test_memory_estimate_is_close(tmp_path):
    folder = make_tiny_llm(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    for kind in ("none", "nf4", "int8"):
        settings = config(folder, quantization=kind)
        actual = load_llm(settings).model.get_memory_footprint()
        assert estimate_memory(folder, settings) == pytest.approx(actual, rel=0.1)


def test_weights_that_are_not_loaded_are_neither_counted_nor_fetched(tmp_path, monkeypatch):
    """Mistral's repositories hold all weights twice: ``consolidated.safetensors`` is for another library."""
    import huggingface_hub

    folder, settings = make_tiny_llm(tmp_path / "llm"), config(tmp_path / "llm", quantization="nf4")
    once = estimate_memory(folder, settings)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert estimate_memory(folder, settings) == once
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert estimate_memory(folder, settings) == once
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *name, **how: asked.update(how) or str(folder))
    fetch("mistralai/Mistral-7B-Instruct-v0.3", None, key="llm.model")
    assert asked["ignore_patterns"] == ["consolidated*"]


def test_the_experts_of_a_mixture_are_counted_and_said_to_stay_as_they_are(tmp_path, caplog):
    """transformers holds them in one tensor per layer, which bitsandbytes leaves alone."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "decoder_sparse_step": 1}
    folder = make_tiny_llm(tmp_path, architecture="qwen3_moe", hidden_size=128, norm_topk_prob=True, **sizes)
    settings = config(folder, quantization="nf4")
    actual = load_llm(settings).model.get_memory_footprint()
    assert estimate_memory(folder, settings) == pytest.approx(actual, rel=0.1)
    assert "the experts of a mixture stay as they are" in caplog.text


# ---------------------------------------------------------------- pinned revisions, and folders that look like hub ids


def test_hub_ids_without_a_commit_are_named_with_theirs(hub, monkeypatch, caplog):
    home, commit = hub
    snapshot = home / "hub" / "models--someone--tiny" / "snapshots" / commit
    monkeypatch.setattr("nemo_llm_feedback.llm.folder.fetch", lambda *_, **__: snapshot)
    for revision in (None, "v2", commit[:12]):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert open_llm(config("someone/tiny", revision=revision)).identity.startswith(f"someone/tiny@{commit}")
        expected = f"revision {revision or 'main'} may be another model tomorrow. This run uses commit {commit}"
        assert expected in caplog.text
    caplog.clear()
    open_llm(config("someone/tiny", revision=commit))
    assert "not pinned" not in caplog.text


def test_folders_are_told_apart_by_their_files_even_where_they_look_like_hub_ids(
    tiny_llm, tmp_path, monkeypatch, caplog
):
    for seed in (1, 2):
        make_tiny_llm(tmp_path / str(seed) / "someone" / "lm", seed=seed)
    identities = set()
    for seed in (1, 2):
        monkeypatch.chdir(tmp_path / str(seed))
        with caplog.at_level(logging.WARNING):
            identities.add(load_llm(config("someone/lm")).identity)
    assert len(identities) == 2
    assert all(identity.startswith("sha256:") for identity in identities)
    assert "not pinned" not in caplog.text


def test_generation_code_in_a_checkpoint_is_not_run(tiny_llm, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(tiny_llm, folder)
    (folder / "custom_generate").mkdir()
    marker = tmp_path / "ran"
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(marker)!r}, 'w')\ndef generate(*a, **k): ...\n"
    )
    with contextlib.suppress(LLMError):  # refusing it is as good as ignoring it
        load_llm(config(folder)).score([(HOME, ["milk"])])
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "extra.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "huge"])
def test_what_is_no_regular_file_or_too_large_is_a_fault_and_never_opened(tiny_llm, tmp_path, name, kind):
    folder = damaged(tiny_llm, tmp_path)
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**34)
    with pytest.raises(LLMError, match=rf"{name} is not a regular file, or has more than 256 MiB"):
        load_llm(config(folder))


def test_the_fingerprint_sees_a_change_in_any_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from nemo_llm_feedback.llm import folder

    monkeypatch.setattr(folder, "_WHOLE", 0)
    tensors = {f"layer.{k}": torch.zeros(5000) for k in range(5)}
    seen = set()
    for changed in (None, *tensors):
        values = {name: value + (name == changed) for name, value in tensors.items()}
        save_file(values, tmp_path / "model.safetensors")
        seen.add(folder.fingerprint(tmp_path))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer.json", "[]"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", '{"model_type": "llama", "max_position_embeddings": "long"}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", '{"model_type": "llama", "architectures": 3}'),
        ("config.json", '{"model_type": "llama", "architectures": [3]}'),
        ("config.json", '{"model_type": "llama", "quantization_config": [1]}'),
        ("config.json", '{"model_type": "\\ud800"}'),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
        ("tokenizer_config.json", "5"),
    ],
)
def test_a_broken_config_or_tokenizer_is_one_typed_error(tiny_llm, tmp_path, file, text):
    folder = damaged(tiny_llm, tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(LLMError):
        load_llm(config(folder))
