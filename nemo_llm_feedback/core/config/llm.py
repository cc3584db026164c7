"""Settings of the scoring LLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QUANTIZATIONS = ("nf4", "int8", "none")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
PHASES = ("inline", "cached")
CHAT_MODES = ("auto", "on", "off")
RESTORATIONS = ("none", "sentence", "english")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class LLMConfig:
    """Which LLM scores, how it is stored, and how it is prompted.

    Attributes:
        model: folder of a causal LM (``config.json``, safetensors, tokenizer), or a hub id such as
            ``Qwen/Qwen2.5-7B-Instruct``.
        revision: branch, tag or commit of a hub id; pin a commit for a run that others shall repeat.
        quantization: ``nf4`` (4 bit, double quantisation), ``int8`` or ``none``; all three work on CPU and on CUDA.
        device: ``auto`` (this process's GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``.
        compute_dtype: ``auto`` is bfloat16 on a GPU (float16 where the GPU has no bfloat16), float32 on a CPU.
        template: path of a prompt template file (see ``prompts.py``); null = the built-in one.
        correction_template: path of a template for ``correction`` rewards and proposals; null = the built-in one.
        chat: wrap the prompt in the tokenizer's chat template: ``auto`` = where it has one, ``on``, ``off``.
        chat_template_kwargs: extra variables of the chat template, e.g. ``{enable_thinking: false}``.
        max_context_tokens: longest prompt in tokens; a longer context loses terms from its end, with a warning.
        max_terms: a longer term list is cut for each group to the terms that look or sound most like something in its
            hypotheses, a quarter of them distractors; such groups no longer share one prompt (docs/rewards.md).
        truecasing: how the LLM sees hypotheses: ``none`` = as they are, ``sentence`` = listed terms in their listed
            spelling, first letter upper case, full stop; ``english`` = also the pronoun I.
        phase: ``inline`` scores groups when a step needs them; ``cached`` scores the whole pool at the start of every
            refresh round and keeps the LLM in memory only then (and for the guards' looks), so that it and the
            training step need not share a GPU.
        token_budget: hypothesis tokens that go through the LLM in one forward; halved by itself when memory runs out.
    """

    model: str
    revision: str | None = None
    quantization: str = "nf4"
    device: str = "auto"
    compute_dtype: str = "auto"
    template: str | None = None
    correction_template: str | None = None
    chat: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_context_tokens: int = 1024
    max_terms: int = 200
    truecasing: str = "none"
    phase: str = "inline"
    token_budget: int = 8192

    def validate(self) -> list[str]:
        """Returns every fault of the values as a sentence; the LLM's files are ``check_llm_folder``'s matter."""
        faults = []
        if not isinstance(self.model, str) or not self.model.strip():
            faults.append("llm.model is empty: give a folder or hub id of a causal LM, e.g. Qwen/Qwen2.5-7B-Instruct.")
        for name, allowed in (
            ("quantization", QUANTIZATIONS),
            ("phase", PHASES),
            ("compute_dtype", COMPUTE_DTYPES),
            ("chat", CHAT_MODES),
            ("truecasing", RESTORATIONS),
        ):
            if getattr(self, name) not in allowed:
                faults.append(f"llm.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            faults.append(f"llm.device={self.device!r} is not one of auto, cpu, cuda, cuda:<number>.")
        if not isinstance(self.chat_template_kwargs, Mapping):
            faults.append(f"llm.chat_template_kwargs={self.chat_template_kwargs!r} is not a mapping.")
        for name, least in (("max_context_tokens", 8), ("max_terms", 1), ("token_budget", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                faults.append(f"llm.{name}={value!r} is not a whole number of at least {least}.")
        return faults
