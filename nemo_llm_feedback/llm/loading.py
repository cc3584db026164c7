"""Loads a frozen causal LM in 4 bit, 8 bit or as it is, on this process's device."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.llm.folder import fingerprint, is_pinned, resolve_folder

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # neither weights nor code


def pick_device(name: str) -> torch.device:
    """Returns the device that ``llm.device`` means in this process; under DDP each rank has its own GPU.

    Raises:
        LLMError: a CUDA device is asked for and there is none, or not so many.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LLMError(f"llm.device={name}, but no CUDA device is visible: set llm.device=cpu or auto.")
    if ":" in name:
        device = torch.device(name)
    else:  # before Lightning has set this process's device, the launcher's LOCAL_RANK tells it
        index = torch.cuda.current_device() or int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", index)
    if device.index >= torch.cuda.device_count():
        raise LLMError(f"llm.device={name} means {device}, but only {torch.cuda.device_count()} GPUs are visible.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the compute dtype: named, or by device (bfloat16 on a CPU is several times slower than float32)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass(frozen=True)
class LLMFiles:
    """What is known of an LLM before a weight is loaded.

    Attributes:
        folder: of its files.
        name: the id with its commit for a hub id, a hash of the files for a folder; device-independent.
        tokenizer: a ``transformers`` tokenizer.
        settings: the ``transformers`` config.
        device, dtype: where and in what it will compute.
    """

    folder: Path
    name: str
    tokenizer: Any
    settings: Any
    device: torch.device
    dtype: torch.dtype


def load_tokenizer(source: str, revision: str | None = None, *, key: str) -> tuple[Path, Any]:
    """Returns the folder of a tokenizer's files and the tokenizer; those of a hub id are fetched if need be.

    Args:
        source: folder or hub id.
        revision: branch, tag or commit of a hub id.
        key: of the setting, for the error.

    Raises:
        LLMError: the files cannot be had or used.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(_TOKENIZER_FILES)))
        return folder, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (HfHubHTTPError, ValueError, OSError, KeyError, ImportError) as error:
        raise LLMError(f"{key}={source}: its tokenizer cannot be loaded ({error}); give the model's own.") from error


def open_files(config: LLMConfig) -> LLMFiles:
    """Finds the LLM's files and reads its tokenizer and config, but no weights.

    Raises:
        LLMError: the files cannot be used; see ``check_llm_folder``.
    """
    from transformers import AutoConfig

    folder = resolve_folder(config)
    device = pick_device(config.device)
    _, tokenizer = load_tokenizer(str(folder), key="llm.model")
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise LLMError(f"llm.model={config.model} cannot be loaded as a causal LM ({error}).") from error
    from_hub = not Path(config.model).expanduser().is_dir()  # a folder may have a name that looks like a hub id
    if from_hub and not is_pinned(config.revision):
        logger.warning(
            "llm.model=%s is not pinned: revision %s may be another model tomorrow. This run uses commit %s; set "
            "llm.revision=%s to keep it.",
            config.model,
            config.revision or "main",
            folder.name,
            folder.name,
        )
    name = f"{config.model}@{folder.name}" if from_hub else f"sha256:{fingerprint(folder)}"
    return LLMFiles(folder, name, tokenizer, settings, device, pick_dtype(config.compute_dtype, device))


def load_model(config: LLMConfig, files: LLMFiles) -> nn.Module:
    """Loads the model, frozen and in eval mode.

    Raises:
        LLMError: it is no causal LM, or weights are missing, or the tokenizer is another model's.
    """
    from transformers import AutoModelForCausalLM

    folder, device, dtype = files.folder, files.device, files.dtype
    devices = [device] if device.type == "cuda" else []
    try:
        # Making the modules draws random numbers; a run must not depend on whether it has an LLM.
        with torch.random.fork_rng(devices=devices):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **({} if _is_quantized(folder) else _quantization(config.quantization, dtype)),
            )
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
        raise LLMError(f"llm.model={config.model} cannot be loaded as a causal LM ({error}).") from error
    model, info = loaded
    lacking = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if lacking:
        raise LLMError(
            f"llm.model={config.model} lacks weights that its config asks for ({', '.join(lacking[:3])}, "
            f"{len(lacking)} in all), which would be random: fetch the whole checkpoint."
        )
    # Added tokens beyond the model's vocabulary (a padding token, say) are harmless: they never enter a row.
    tokenizer = files.tokenizer
    ids = {*tokenizer.get_vocab().values()} - tokenizer.added_tokens_decoder.keys()
    largest = max(i for i in (*ids, tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    if largest >= model.get_input_embeddings().weight.shape[0]:
        raise LLMError(
            f"llm.model={config.model}: the tokenizer has ids up to {largest}, the model only "
            f"{model.get_input_embeddings().weight.shape[0]} tokens: put the model's own tokenizer there."
        )
    _freeze(model, dtype)
    logger.info("LLM %s: %s on %s, computing in %s.", config.model, config.quantization, device, dtype)
    return model


def _quantization(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keyword arguments that make ``from_pretrained`` quantise while it loads."""
    if kind == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def _is_quantized(folder: Path) -> bool:
    """Whether the checkpoint is stored quantised: then its own settings hold; passing any, even None, breaks it."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return settings.get("quantization_config") is not None


def _freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Eval mode, no gradients (embeddings and norms keep theirs after a 4-bit load), one compute dtype."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # A stored 4-bit checkpoint brings the compute dtype of the machine that made it.
            module.compute_dtype = dtype  # type: ignore[assignment]
            module.compute_type_is_set = True  # type: ignore[assignment]
            if dtype == torch.float32:
                # On CPUs with AVX512-BF16 bitsandbytes computes in bfloat16 whatever the compute dtype: scores would
                # be a hundred times less exact than those of other machines.
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
