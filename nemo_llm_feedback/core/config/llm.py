"""Settings of the scoring LLM."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section

NO_MODEL = "llm.model is missing: give a folder or hub id of a causal LM, e.g. Qwen/Qwen2.5-7B-Instruct."
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"must be one of auto, cpu, cuda, cuda:<number>, got {value!r}.")
    return value


@dataclass(frozen=True, config=STRICT)
class LLMConfig(Section):
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
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    device: Annotated[str, AfterValidator(_device)] = "auto"
    compute_dtype: ComputeDtype = "auto"
    template: str | None = None
    correction_template: str | None = None
    chat: Literal["auto", "on", "off"] = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_context_tokens: Annotated[int, Field(ge=8)] = 1024
    max_terms: PositiveInt = 200
    truecasing: Literal["none", "sentence", "english"] = "none"
    phase: Literal["inline", "cached"] = "inline"
    token_budget: PositiveInt = 8192

    def validate(self) -> list[str]:
        """Returns a fault if there is no model; its files are ``check_llm_folder``'s matter."""
        return [] if self.model.strip() else [NO_MODEL]
