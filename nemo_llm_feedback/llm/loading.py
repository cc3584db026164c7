"""Loads the LLM's tokenizer, and its frozen weights in 4 bit, 8 bit or unquantised, on this process's device."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.llm.folder import TOKENIZER_FILES, fingerprint, local_folder
from nemo_llm_feedback.llm.gguf import is_gguf

logger = logging.getLogger(__name__)

_UNUSABLE = (ValueError, OSError, KeyError, ImportError, RuntimeError)  # what transformers raises on bad files


def pick_placement(config: LLMConfig) -> tuple[torch.device, torch.dtype]:
    """Returns this process's device for the LLM, and the dtype in which it computes there.

    Under DDP each rank has its GPU. ``auto`` is bfloat16 where a GPU has it, and float32 on a CPU, where bfloat16 is
    several times slower.

    Raises:
        LLMError: the machine has fewer CUDA devices.
    """
    device, dtype = torch.device("cpu"), torch.float32
    if config.device != "cpu" and torch.cuda.is_available():
        device = torch.device(config.device.replace("auto", "cuda"))
        if device.index is None:  # before Lightning has set this process's device, the launcher's LOCAL_RANK has it
            device = torch.device("cuda", torch.cuda.current_device() or int(os.environ.get("LOCAL_RANK", "0")))
        if (count := torch.cuda.device_count()) <= device.index:
            raise LLMError(f"llm.device={config.device} means {device}, but only {count} GPUs are visible.")
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return device, dtype if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)


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
        return folder, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except _UNUSABLE as error:
        raise LLMError(f"{key}={source}: its tokenizer cannot be loaded ({error}): give the model's.") from error


def read_max_positions(folder: Path) -> int:
    """Returns the longest sequence that the LLM in a folder can read, in tokens.

    Raises:
        LLMError: transformers does not know the model that the folder's config describes.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _UNUSABLE as error:
        raise LLMError(f"llm.model={folder} cannot be loaded as a causal LM ({error}).") from error
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20


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
            settings = {"dtype": dtype, "device_map": {"": device}, **_quantization(config, folder, dtype)}
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
    logger.info("LLM %s: %s on %s, computing in %s.", config.model, config.quantization, device, dtype)
    return model


def _quantization(config: LLMConfig, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keyword arguments that make ``from_pretrained`` quantise while it loads."""
    from transformers import AutoConfig, BitsAndBytesConfig

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
            if dtype == torch.float32:
                # On CPUs with AVX512-BF16 bitsandbytes computes in bfloat16 whatever the compute dtype: scores would
                # be a hundred times less exact than those of other machines.
                module.support_avx512bf16_for_cpu = False
