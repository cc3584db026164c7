"""Static checks of an LLM's files: all that can be refused without loading a weight or importing transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.llm.prompts import read_template

_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # neither pickles nor code are fetched
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # the last: text part of multimodal models
_QUANTIZERS = {"nf4": "load_in_4bit", "int8": "load_in_8bit"}
_SAMPLE = 2**12  # bytes of each tensor's beginning, middle and end that enter the fingerprint …
_WHOLE = 2**22  # … of weight files larger than this


def check_llm_folder(config: LLMConfig) -> list[str]:
    """Returns every fault of the LLM's files, template and device that shows without loading weights.

    A hub id is checked by its form and by what the local hub cache has of it (all of it must be there when
    ``HF_HUB_OFFLINE`` is set); nothing is downloaded. Faults of the values are ``config.validate()``'s matter.
    """
    faults = []
    try:
        read_template(config.template, chat=False)
    except LLMError as error:
        faults.append(str(error))
    if config.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        faults.append(
            f"llm.quantization={config.quantization} needs bitsandbytes: pip install bitsandbytes, or set "
            "llm.quantization=none."
        )
    if config.device.startswith("cuda") and not _has_cuda():
        faults.append(f"llm.device={config.device}, but no CUDA device is visible: set llm.device=cpu or auto.")
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return faults + _folder_faults(folder, config)
    if not is_hub_id(config.model):
        kind = "is a file" if folder.is_file() else "does not exist"
        faults.append(
            f"llm.model={config.model} {kind} and is no hub id either: give a folder with config.json, safetensors "
            "and a tokenizer, or an id such as Qwen/Qwen2.5-7B-Instruct."
        )
        return faults
    try:
        cached = _snapshot(config, local_only=True)
    except LLMError as error:
        return [*faults, str(error)] if _offline() else faults
    if _offline():
        return faults + _folder_faults(cached, config)
    settings, _ = _read_json(cached / "config.json")  # files that the cache lacks will be fetched
    return faults + (_kind_faults(cached, settings, config) if settings else [])


def is_hub_id(model: str) -> bool:
    """Whether ``model`` has the form of a hub id, ``name`` or ``owner/name``."""
    return bool(_HUB_ID.fullmatch(model)) and not model.endswith((".nemo", ".bin", ".gguf", ".safetensors", ".json"))


def is_pinned(revision: str | None) -> bool:
    """Whether a revision names one commit for good: 40 hexadecimal digits. Branches and tags can move."""
    return bool(re.fullmatch(r"[0-9a-f]{40}", revision or ""))


def resolve_folder(config: LLMConfig) -> Path:
    """Returns the folder with the LLM's files, fetching a hub id's safetensors, tokenizer and configs if need be.

    Raises:
        LLMError: all faults of ``check_llm_folder``, or the hub could not deliver.
    """
    faults = config.validate() or check_llm_folder(config)
    if faults:
        raise LLMError(" ".join(faults))
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return folder
    folder = _snapshot(config, local_only=False)
    faults = _folder_faults(folder, config)
    if faults:
        raise LLMError(" ".join(faults))
    return folder


def fingerprint(folder: Path) -> str:
    """Returns a hash of all that decides the LLM's scores: configs, tokenizer, sizes, and samples of every tensor."""
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".json", ".model", ".txt", ".jinja", ".safetensors")
    ):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors" or size <= _WHOLE:
                digest.update(file.read())
                continue
            # Every tensor, since a merged adapter changes some of them only; the header tells where they are.
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            for entry in _safetensors_header(path).values():
                begin, end = entry.get("data_offsets", (0, 0))
                for start in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                    file.seek(8 + header + start)
                    digest.update(file.read(min(_SAMPLE, end - start)))
    return digest.hexdigest()[:16]


def estimate_memory(folder: Path, config: LLMConfig, *, compute_bytes: int) -> int:
    """Returns the bytes that the LLM's weights will take, from the safetensors headers.

    Args:
        folder: the LLM's folder.
        config: tells the quantisation. Matrices other than embeddings and output head take 0.52 bytes a weight in
            NF4 with double quantisation (4 bits, and 0.127 bits of scales) and 1 byte in int8.
        compute_bytes: bytes of one unquantised weight.
    """
    factor = {"nf4": 0.52, "int8": 1.0}.get(config.quantization, float(compute_bytes))
    total = 0.0
    for path in folder.glob("*.safetensors"):
        for name, entry in _safetensors_header(path).items():
            if name == "__metadata__":
                continue
            shape = entry["shape"]
            keeps = len(shape) < 2 or any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
            if entry["dtype"] in ("U8", "I8"):
                total += prod(shape)
            else:
                total += prod(shape) * (compute_bytes if keeps else factor)
    return round(total)


def _safetensors_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def _folder_faults(folder: Path, config: LLMConfig) -> list[str]:
    settings, fault = _read_json(folder / "config.json")
    if settings is None:
        return [f"llm.model={folder}: {fault} Give the folder of a causal LM saved by transformers."]
    faults = [*_weight_faults(folder), *_kind_faults(folder, settings, config)]
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        faults.append(f"llm.model={folder} has no tokenizer (tokenizer.json or tokenizer.model): copy it there.")
    return faults


def _weight_faults(folder: Path) -> list[str]:
    """Faults of the weight files: there must be safetensors, whole, and all of an index's shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content, fault = _read_json(index)
        if content is None:
            return [f"llm.model={folder}: {fault} Fetch the checkpoint anew."]
        missing = sorted({name for name in content.get("weight_map", {}).values() if not (folder / name).is_file()})
        if missing:
            return [f"llm.model={folder} lacks {', '.join(missing)}, which its index names: fetch the missing files."]
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        return [cut for path in weights if (cut := _truncation_fault(path))]
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        fault = f"llm.model={folder} has pickle weights only, which can run code when loaded"
        return [f"{fault}: convert them to safetensors (load them in a sandbox, then model.save_pretrained(folder))."]
    return [f"llm.model={folder} has no weights: put model.safetensors (or its shards and their index) there."]


def _truncation_fault(path: Path) -> str | None:
    """A safetensors file states where its last tensor ends; a shorter file is a broken copy (or a git-lfs pointer)."""
    try:
        header = _safetensors_header(path)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        with path.open("rb") as file:
            data_start = 8 + struct.unpack("<Q", file.read(8))[0]
    except (OSError, struct.error, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return f"{path} is no safetensors file (a git-lfs pointer?): fetch it anew."
    if data_start + max(ends, default=0) > path.stat().st_size:
        return f"{path} is cut short: fetch it anew."
    return None


def _kind_faults(folder: Path, settings: dict[str, Any], config: LLMConfig) -> list[str]:
    """Faults of what kind of model it is: custom code, not a causal LM, quantised otherwise than asked for."""
    faults = []
    tokenizer_settings, _ = _read_json(folder / "tokenizer_config.json")
    for name, content in (("config.json", settings), ("tokenizer_config.json", tokenizer_settings or {})):
        if "auto_map" in content:
            faults.append(
                f"llm.model={folder} asks for custom code (auto_map in {name}), which is never run: use a checkpoint "
                "of an architecture that transformers has, or, if it has this one, remove auto_map from that file."
            )
    names = settings.get("architectures") or []
    if settings.get("is_encoder_decoder") or (names and not any(name.endswith(_CAUSAL) for name in names)):
        faults.append(f"llm.model={folder} is no causal LM ({', '.join(names)}): give a decoder-only language model.")
    stored = settings.get("quantization_config")
    if stored is None:
        return faults
    method = stored.get("quant_method")
    if method != "bitsandbytes" and not (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        faults.append(f"llm.model={folder} is stored quantised by {method}: give the unquantised checkpoint.")
    elif not stored.get(_QUANTIZERS.get(config.quantization, "")) or (
        config.quantization == "nf4" and stored.get("bnb_4bit_quant_type", "fp4") != "nf4"
    ):
        kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4")
        faults.append(
            f"llm.model={folder} is stored in {kind}, llm.quantization={config.quantization} asks for something "
            "else: set llm.quantization to what is stored (nf4 or int8), or give the unquantised checkpoint."
        )
    return faults


def _read_json(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Returns a JSON object, or None and why there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"{path.name} is missing."
    except (OSError, ValueError) as error:
        return None, f"{path.name} cannot be read ({error})."
    return (content, "") if isinstance(content, dict) else (None, f"{path.name} is no JSON object.")


def _snapshot(config: LLMConfig, *, local_only: bool) -> Path:
    """Returns the hub cache's folder of a hub id, named after its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            config.model, revision=config.revision, allow_patterns=list(_HUB_FILES), local_files_only=local_only
        )
    except LocalEntryNotFoundError as error:
        raise LLMError(
            f"llm.model={config.model} (revision {config.revision or 'main'}) is not in the local hub cache and the "
            "hub cannot be reached: give a folder, or fetch it where there is a network "
            f"(hf download {config.model}) and set HF_HOME."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LLMError(
            f"The hub did not deliver llm.model={config.model}, revision {config.revision or 'main'} ({error}): "
            "check the id, the revision, and for gated models HF_TOKEN."
        ) from error
    return Path(path)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
