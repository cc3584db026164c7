"""Loads the LLM's tokenizer, and its frozen weights in 4 bit, 8 bit or unquantised, on this process's device."""

from __future__ import annotations

import logging
import os
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.text_files import parse_json, read_text
from nemo_llm_feedback.llm.folder import TOKENIZER_FILES, fingerprint, local_folder
from nemo_llm_feedback.llm.gguf import is_gguf

logger = logging.getLogger(__name__)

# Parts of the names of matrices that bitsandbytes leaves as they are: transformers holds all experts of a layer in one
# tensor, which is no linear layer.
_UNQUANTIZED = ("embed", "lm_head", "wte", "wpe", ".experts.")
_UNUSABLE = (Exception,)  # tokenizers raises it bare on bad files, transformers whatever a wrong value leads to


def pick_placement(config: LLMConfig) -> tuple[torch.device, torch.dtype]:
    """Returns this process's device for the LLM, and the dtype in which its matrices are applied there.

    Under DDP each rank has its GPU. ``auto`` is bfloat16 where the processor has it: on a CPU without AVX512-BF16 it
    is several times slower than float32. ``int8`` has kernels of its own, for which float32 is best on a CPU.

    Raises:
        LLMError: the machine has fewer CUDA devices.
    """
    device, dtype = torch.device("cpu"), torch.float32
    if config.quantization != "int8" and _has_fast_bfloat16():
        dtype = torch.bfloat16
    if config.device != "cpu" and torch.cuda.is_available():
        device = torch.device(config.device.replace("auto", "cuda"))
        if device.index is None:  # before Lightning has set this process's device, the launcher's LOCAL_RANK has it
            device = torch.device("cuda", torch.cuda.current_device() or int(os.environ.get("LOCAL_RANK", "0")))
        if (count := torch.cuda.device_count()) <= device.index:
            raise LLMError(f"llm.device={config.device} means {device}, but only {count} GPUs are visible.")
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return device, dtype if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)


def _has_fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, which torch and bitsandbytes use."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13
    return bool(capabilities.get("avx512_bf16", False))


def load_tokenizer(source: str, revision: str | None = None, *, key: str) -> tuple[Path, Any]:
    """Returns the folder of a tokenizer's files, fetched from the hub if need be, and the tokenizer.

    Args:
        source: folder, GGUF file or hub id.
        revision: branch, tag or commit of a hub id; None = main.
        key: the setting that names the tokenizer, for error messages.

    Raises:
        LLMError: the files cannot be fetched or used.
    """
    from transformers import AutoTokenizer

    folder = local_folder(source, revision, key=key, patterns=TOKENIZER_FILES)
    try:
        # Where mistral-common is installed it would take the place of the tokenizer that scores are made for.
        return folder, AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
    except _UNUSABLE as error:
        raise LLMError(f"{key}={source}: its tokenizer cannot be loaded ({error}): give the model's.") from error


def read_max_positions(folder: Path) -> int:
    """Returns the longest sequence that the LLM in a folder can read, in tokens.

    With LongRoPE it is the length up to which the LLM has one form of positions: beyond, transformers takes another
    for all sequences of a forward, so that a score would depend on what else is in its batch.

    Raises:
        LLMError: transformers does not know the model that the folder's config describes.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _UNUSABLE as error:
        raise LLMError(f"llm.model={folder} cannot be loaded as a causal LM ({error}).") from error
    text = config.get_text_config(decoder=True)
    found = getattr(text, "max_position_embeddings", None) or 2**20
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        name = "original_max_position_embeddings"
        found = min(found, rope.get(name) or getattr(text, name, None) or found)
    if not isinstance(found, int) or found < 16:
        raise LLMError(f"llm.model={folder}: max_position_embeddings={str(found)[:40]} is not a length.")
    return found


def checkpoint_name(config: LLMConfig, folder: Path) -> str:
    """Returns a name of the weights that holds on any machine: the hub id with its commit, or a hash of the files.

    Warns where the revision can move to another commit: branches and tags can, 40 hexadecimal digits cannot.
    """
    if Path(config.model).expanduser().is_dir() or is_gguf(config.model):  # a folder's name may look like a hub id
        return f"sha256:{fingerprint(folder)}"
    if not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
        logger.warning(
            "llm.model=%s is not pinned: revision %s may be another model tomorrow. This run uses commit %s; set "
            "llm.revision to it to keep it.",
            *(config.model, config.revision or "main", folder.name),
        )
    return f"{config.model}@{folder.name}"


def estimate_memory(folder: Path, config: LLMConfig) -> int:
    """Returns the bytes that the LLM's weights will take, from the safetensors headers.

    Args:
        folder: the LLM's folder.
        config: the LLM's settings, of which quantisation and dtype count. Matrices other than embeddings, output
            matrix and experts take 0.52 bytes per weight in NF4 with double quantisation (4 bits, and 0.127 bits of
            scales), 1 in int8.
    """
    size = _unquantized_dtype(config).itemsize
    factor = {"nf4": 0.52, "int8": 1.0}.get(config.quantization, float(size))
    total = 0.0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)
                shape = tensor.get_shape()
                keeps = len(shape) < 2 or any(part in name for part in _UNQUANTIZED)
                stored = tensor.get_dtype() in ("U8", "I8")
                total += prod(shape) * (1 if stored else size if keeps else factor)
    return round(total)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's LLM is loaded from: the one of that name, or those of the index."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and not whole.is_file():
        names = set(map(str, (parse_json(read_text(index)).get("weight_map") or {}).values()))
        return [folder / name for name in sorted(names) if (folder / name).is_file()]
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _unquantized_dtype(config: LLMConfig) -> torch.dtype:
    """The dtype of the weights that are not quantised, and of what lies between the matrices.

    On a CPU only the 4-bit layers compute in bfloat16: the rest costs little in float32, which keeps scores three
    times nearer to those of float32 alone.
    """
    device, dtype = pick_placement(config)
    return torch.float32 if device.type == "cpu" and config.quantization == "nf4" else dtype


def load_model(config: LLMConfig, folder: Path, tokenizer: Any) -> Any:
    """Returns the ``transformers`` model in a folder, frozen and in eval mode.

    Raises:
        LLMError: the model is not a causal LM, weights are missing, or the tokenizer is another model's.
    """
    from transformers import AutoModelForCausalLM

    device, dtype = pick_placement(config)
    try:
        # Making the modules draws random numbers; a run must not depend on whether it has an LLM.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            kept = {"dtype": _unquantized_dtype(config), "device_map": {"": device}}
            settings = {**kept, **_quantization(config, folder, dtype)}
            safe = {"trust_remote_code": False, "use_safetensors": True}
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **safe, **settings)
    except _UNUSABLE as error:
        raise LLMError(f"llm.model={config.model} cannot be loaded as a causal LM ({error}).") from error
    lacking = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if lacking:
        raise LLMError(
            f"llm.model={config.model} lacks {len(lacking)} weights, such as {', '.join(lacking[:3])}, which "
            "would be random: fetch the whole checkpoint."
        )
    # Added tokens beyond the model's vocabulary (a padding token, for one) are harmless: they never enter a row.
    ids = {*tokenizer.get_vocab().values()} - tokenizer.added_tokens_decoder.keys()
    largest = max(i for i in (*ids, tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if largest >= num_embeddings:
        raise LLMError(
            f"llm.model={config.model}: the tokenizer has ids up to {largest}, the model only {num_embeddings} "
            "tokens: put the tokenizer of the model there."
        )
    _freeze(model, dtype)
    large = [name for name, value in model.named_parameters() if value.ndim == 3 and value.is_floating_point()]
    if config.quantization != "none" and any(".experts." in name for name in large):
        logger.warning(
            "LLM %s: the experts of a mixture stay as they are, only its other matrices are in %s: it takes several "
            "times the memory of a dense LLM of its size.",
            *(config.model, config.quantization),
        )
    chosen = device.type == "cpu" and dtype == torch.bfloat16 and config.compute_dtype == "auto"
    why = ", as this CPU has AVX512-BF16 (llm.compute_dtype=float32 is exact and slower)" if chosen else ""
    logger.info("LLM %s: %s on %s, computing in %s%s.", config.model, config.quantization, device, dtype, why)
    return model


def _quantization(config: LLMConfig, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keyword arguments that make ``from_pretrained`` quantise while it loads."""
    from transformers import AutoConfig, BitsAndBytesConfig

    # At its import it misses a package that would bring one more kernel from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if int8 := config.quantization == "int8":  # its layers log at every call that they cast float32 to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    stored = getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), "quantization_config", None)
    if config.quantization == "none" or stored is not None:
        return {}  # a checkpoint that is stored quantised has its settings; passing any, even None, breaks it
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=int8, load_in_4bit=not int8, **nf4)}


def _freeze(model: Any, dtype: torch.dtype) -> None:
    """Eval mode, no gradients (embeddings and norms keep theirs after a 4-bit load), one compute dtype."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # A stored 4-bit checkpoint brings the compute dtype of the machine that made it.
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # On CPUs with AVX512-BF16 bitsandbytes computes in bfloat16 whatever the compute dtype, by a kernel that
            # takes these shapes only.
            fits = module.out_features % 32 == 0 and module.in_features % 64 == 0
            module.support_avx512bf16_for_cpu &= dtype == torch.bfloat16 and fits
