"""Tiny random causal LMs with a byte-level BPE tokenizer, built in code in well under a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "the following is a transcript of an order at a coffee shop",
    "terms that may occur latte cappuccino mocha espresso oat milk",
    "can i have a large iced latte with oat milk please",
    "turn the light in the kitchen on and play some music",
    "he had been a quiet man who read the paper in the morning",
)
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide enough that the logits are far from uniform: a wrong mask or position then changes a score visibly.
    "initializer_range": 0.3,
}
# Architecture → what its config class is called and needs beside the sizes above.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 8, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "mamba": ("MambaConfig", {"state_size": 4}),
}


def make_tiny_tokenizer(folder: Path, *, chat: bool = False, bos: bool = True) -> PreTrainedTokenizerFast:
    """Trains and saves a tokenizer: ``<s>`` 0 (if ``bos``), ``</s>`` 1, ``<pad>`` 2, chat tokens, then ~400 pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", **({"bos_token": "<s>"} if bos else {})}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if chat:
        wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        wrapped.add_tokens(["<tool_call>"])  # a control token that is not marked special, as Qwen has them
        wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return wrapped


def make_tiny_llm(
    folder: Path, *, seed: int = 0, architecture: str = "llama", chat: bool = False, bos: bool = True, **settings: Any
) -> Path:
    """Writes a random causal LM (safetensors) with its tokenizer to ``folder`` and returns it.

    Args:
        folder: made if it does not exist.
        seed: of the weights; torch's random state is left alone.
        architecture: a key of ``ARCHITECTURES``.
        chat: give the tokenizer a chat template (ChatML).
        bos: give the tokenizer a token that begins a text.
        settings: of the model's config, over the tiny ones.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder, chat=chat, bos=bos)
    config_class, extra = ARCHITECTURES[architecture]
    tokens = {"bos_token_id": 0 if bos else None, "eos_token_id": 1, "pad_token_id": 2}
    sizes = {} if architecture == "gpt2" else _SIZES
    config = getattr(transformers, config_class)(
        **{**sizes, "initializer_range": 0.3, **extra, "vocab_size": len(tokenizer), **tokens, **settings}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def train_tiny_llm(folder: Path, *, updates: int = 120) -> Path:
    """Teaches the LM of ``folder`` the sentences of its tokenizer, in two seconds, and returns the folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [torch.tensor([[0, *tokenizer.encode(text), 1]]) for text in _CORPUS]
    for update in range(updates):
        row = rows[update % len(rows)]
        optimizer.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def make_tiny_gguf(
    folder: Path, path: Path, *, architecture: str = "llama", more: Callable[[Any], None] = lambda _: None
) -> Path:
    """Writes the Llama in a folder of ``make_tiny_llm`` to a GGUF file, its weights as float32, and returns the path.

    Args:
        folder: of a Llama with one file of weights.
        path: the file to write.
        architecture: what the file calls itself.
        more: writes further fields and tensors with the ``GGUFWriter``.
    """
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    special = tokenizer.added_tokens_decoder
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([(3 if special[i].special else 4) if i in special else 1 for i in range(len(tokenizer))])
    writer.add_token_merges(
        [" ".join(m) for m in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if (part := name.split(".")[-2]) in ("q_proj", "k_proj"):  # GGUF interleaves the halves that rotate together
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            rows, columns = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor.float().numpy())
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
