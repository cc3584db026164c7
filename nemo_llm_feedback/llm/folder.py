"""The LLM's files: checks them before weights are loaded, fetches those of a hub id, measures and hashes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.text_files import parse_json, read_text
from nemo_llm_feedback.llm.gguf import dequantize, gguf_faults, is_gguf
from nemo_llm_feedback.llm.prompts import read_template

TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_LLM_FILES = ("*.safetensors", *TOKENIZER_FILES)  # neither pickles nor code are fetched
_SETTINGS = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # the last: text part of multimodal models
_SAMPLE = 2**12  # bytes of each tensor's beginning, middle and end that enter the fingerprint …
_WHOLE = 2**22  # … of weight files larger than this
_LARGEST = 2**28  # bytes of a config or tokenizer; the largest vocabularies take a tenth


def check_llm_folder(config: LLMConfig) -> list[str]:
    """Returns every fault of the LLM's files, template and device that can be found without loading weights.

    A hub id is checked by its form and, where ``HF_HUB_OFFLINE`` is set, by its files in the local hub cache; nothing
    is downloaded, and no GGUF file is de-quantised. ``config.validate()`` finds the faults of the settings' values.
    """
    from huggingface_hub import is_offline_mode

    faults: list[str] = []
    try:
        read_template(config.template, chat=False)
    except LLMError as error:
        faults.append(str(error))
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        faults.append(f"llm.device={config.device}, but no CUDA device is visible: set llm.device=cpu or auto.")
    elif config.quantization != "none" and config.device != "cpu" and torch.cuda.is_available() and _no_kernels():
        faults.append(
            f"llm.quantization={config.quantization} needs the CUDA library of bitsandbytes, which it has not loaded "
            "(python -m bitsandbytes says why): install the bitsandbytes of constraints-cuda.txt, or set "
            "llm.quantization=none or llm.device=cpu."
        )
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return faults + _folder_faults(folder, config)
    if is_gguf(config.model):
        return faults + gguf_faults(config.model)
    if not is_hub_id(config.model):
        faults.append(
            f"llm.model={config.model} is neither a folder nor a hub id: give a folder with config.json, safetensors "
            "and a tokenizer, a GGUF file, or an id such as Qwen/Qwen2.5-7B-Instruct."
        )
    elif is_offline_mode():
        try:
            faults += _folder_faults(fetch(config.model, config.revision, key="llm.model"), config)
        except LLMError as error:
            faults.append(str(error))
    return faults


def _no_kernels() -> bool:
    """Whether bitsandbytes has found no library for this machine's CUDA; it then fails at its first call only."""
    try:
        from bitsandbytes.cextension import lib
    except (ImportError, OSError, RuntimeError):
        return True
    return not getattr(lib, "compiled_with_cuda", False)


def is_hub_id(model: str) -> bool:
    """Returns whether ``model`` has the form of a hub id, ``name`` or ``owner/name``."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return not model.endswith((".nemo", ".bin", ".gguf", ".safetensors", ".json"))


def resolve_folder(config: LLMConfig) -> Path:
    """Returns the folder with the LLM's files; what a hub id or a GGUF file lacks is fetched or de-quantised first.

    Raises:
        LLMError: all faults of ``check_llm_folder``, the hub could not deliver, or the file could not be de-quantised.
    """
    faults = config.validate() or check_llm_folder(config)
    folder = Path(config.model).expanduser()
    if not faults and not folder.is_dir():
        if not is_gguf(config.model):  # gigabytes are fetched for what can be loaded only
            settings = fetch(config.model, config.revision, key="llm.model", patterns=TOKENIZER_FILES)
            faults = _folder_faults(settings, config, weights=False)
        if not faults:
            folder = local_folder(config.model, config.revision, key="llm.model")
            faults = _folder_faults(folder, config)
    if faults:
        raise LLMError(" ".join(faults))
    return folder


def local_folder(source: str, revision: str | None = None, *, key: str, patterns: Sequence[str] = _LLM_FILES) -> Path:
    """Returns the folder that a folder's path, a GGUF file's path or a hub id stands for; see ``fetch``."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    return dequantize(source) if is_gguf(source) else fetch(source, revision, key=key, patterns=patterns)


def fetch(model: str, revision: str | None, *, key: str, patterns: Sequence[str] = _LLM_FILES) -> Path:
    """Returns the hub cache's folder of a hub id, named after its commit; what the cache lacks is fetched.

    Args:
        model: the hub id.
        revision: branch, tag or commit; None = main.
        key: the setting that names the model, for error messages.
        patterns: glob patterns of the files to fetch.

    Raises:
        LLMError: the hub cannot be reached or does not deliver.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Mistral's repositories hold all weights a second time, in a format of their own.
        twice = ["consolidated*"]
        found = snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=twice)
        return Path(found)
    except LocalEntryNotFoundError as error:
        raise LLMError(
            f"{key}={model} (revision {revision or 'main'}) is not in the local hub cache and the hub cannot be "
            f"reached: give a folder, or fetch it where there is a network (hf download {model}) and set HF_HOME."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise LLMError(
            f"The hub did not deliver {key}={model}, revision {revision or 'main'} ({error}): check the id, the "
            "revision, and for gated models HF_TOKEN."
        ) from error


def fingerprint(folder: Path) -> str:
    """Returns a hash of what decides the LLM's scores: configs, tokenizer, file sizes, and samples of every tensor."""
    digest = hashlib.sha256()
    suffixes = (".json", ".model", ".txt", ".jinja", ".safetensors")
    for path in sorted(p for p in folder.iterdir() if p.suffix in suffixes):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors" or size <= _WHOLE:
                digest.update(file.read())
                continue
            # Every tensor, since a merged adapter changes some of them only; the header tells where they are.
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(header)
            data = file.tell()
            for entry in json.loads(header).values():
                begin, end = entry.get("data_offsets", (0, 0))
                for start in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                    file.seek(data + start)
                    digest.update(file.read(min(_SAMPLE, end - start)))
    return digest.hexdigest()[:16]


def _folder_faults(folder: Path, config: LLMConfig, *, weights: bool = True) -> list[str]:
    """Faults of the files in an LLM's folder; without ``weights`` of the small ones, where these may still lack."""
    try:
        return list(_faults_in(folder, config, weights=weights))
    except (AttributeError, TypeError) as error:  # whatever a value of another type leads to
        return [f"llm.model={folder}: a config has a value of another type ({error}): fetch the model's files anew."]


def _faults_in(folder: Path, config: LLMConfig, *, weights: bool) -> Iterator[str]:
    odd = [path for pattern in _LLM_FILES for path in folder.glob(pattern) if not path.is_file()]
    odd += [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if _size(path) > _LARGEST]
    if odd:  # whoever opened a pipe would wait for ever
        listed = ", ".join(sorted(path.name for path in odd))
        yield f"llm.model={folder}: {listed} is not a regular file, or has more than {_LARGEST >> 20} MiB: remove it."
        return
    try:
        files = {name: _read_json(folder / name) for name in _SETTINGS}
    except LLMError as error:
        yield f"llm.model={folder}: {error} Give the folder of a causal LM saved by transformers."
        return
    settings, _, index = files.values()
    if weights:
        yield from _weight_faults(folder, index)
    yield from _architecture_faults(folder, files)
    stored = _stored_quantization(settings)
    if stored not in (None, config.quantization):
        yield (
            f"llm.model={folder} is stored in {stored}, but llm.quantization={config.quantization}: set "
            "llm.quantization to the stored one (nf4 or int8), or give the unquantised checkpoint."
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield f"llm.model={folder} has no tokenizer (tokenizer.json or tokenizer.model): copy it there."


def _architecture_faults(folder: Path, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Faults of what the configs say that the model is: transformers must have it as a causal LM, without its code."""
    settings = files["config.json"]
    names, kind = settings.get("architectures") or [], str(settings.get("model_type"))
    custom = [name for name, content in files.items() if "auto_map" in content]
    if settings.get("is_encoder_decoder") or (names and not any(name.endswith(_CAUSAL) for name in names)):
        yield f"llm.model={folder} is not a causal LM ({', '.join(names)}): give a decoder-only language model."
        return
    if not custom and not any(name.endswith(_CAUSAL[-1]) for name in names):
        return  # and transformers, whose import takes seconds, is not asked
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if custom and kind not in CONFIG_MAPPING_NAMES:
        yield (
            f"llm.model={folder} asks for custom code (auto_map in {', '.join(custom)}), which is never run: use a "
            "checkpoint of an architecture that transformers has."
        )
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield (
            f"llm.model={folder} is of the kind {kind}, which transformers cannot load as a causal LM "
            f"({', '.join(names)}): give a language model of texts alone."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _weight_faults(folder: Path, index: dict[str, Any]) -> Iterator[str]:
    """Faults of the weight files: they must be whole safetensors files, and all that the index names must be there."""
    missing = sorted({name for name in index.get("weight_map", {}).values() if not (folder / name).is_file()})
    weights = sorted(folder.glob("*.safetensors"))
    if missing:
        yield f"llm.model={folder} lacks {', '.join(missing)}, which its index names: fetch the missing files."
    elif not weights:
        yield (
            f"llm.model={folder} has no safetensors weights: put model.safetensors (or its shards and their index) "
            "there. Pickle weights can run code when loaded: convert them in a sandbox (load, save_pretrained)."
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # checks the file's length against its header
                pass
        except (OSError, SafetensorError) as error:
            yield f"{path} is cut short or not a safetensors file (a git-lfs pointer?) ({error}): fetch it anew."


def _stored_quantization(settings: dict[str, Any]) -> str | None:
    """How a checkpoint's weights are quantised, by its config: nf4, int8, another method, or None."""
    stored = settings.get("quantization_config") or {}
    if stored.get("load_in_8bit"):
        return "int8"
    return stored.get("bnb_4bit_quant_type", "fp4") if stored.get("load_in_4bit") else stored.get("quant_method")


def _read_json(path: Path) -> dict[str, Any]:
    """Returns a file's JSON object, an empty one where a file other than config.json is missing.

    Raises:
        LLMError: the file cannot be read, or config.json is missing.
    """
    try:
        if not path.exists():
            if path.name != "config.json":
                return {}
            raise LLMError(f"{path.name} is missing.")
        return dict(parse_json(read_text(path, max_mebibytes=_LARGEST >> 20)))
    except (ValueError, TypeError) as error:
        raise LLMError(f"{path.name} cannot be read as a JSON object ({error}).") from error
