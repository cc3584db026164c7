"""Changes of groups and reward, one at a time, as overrides of `adapt`: to choose by, or to train with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

SETTINGS = {
    "as used": "",
    "no ASR term": "reward.asr_weight=0",
    "no LLM": "reward.alpha=0 reward.beta=0",
    "LLM not shown the terms": f"llm.template={Path(__file__).with_name('no_terms.txt')}",
    "no length term": "reward.beta=0",
    "N: 2 + 2 + 1 swap": "proposals.beam=2 proposals.boosted=2 proposals.term_swap=1",
    "N: 4 + 4 + 2 swaps": "proposals.beam=4 proposals.boosted=4 proposals.term_swap=2",
    "N: 16 + 16 + 8 swaps": "proposals.beam=16 proposals.boosted=16 proposals.term_swap=8 proposals.max_members=48",
    "source: beam alone": "proposals.beam=16 proposals.boosted=0 proposals.term_swap=0",
    "source: samples alone": "proposals.beam=0 proposals.boosted=0 proposals.term_swap=0 proposals.samples=16",
    "source: beam and swaps": "proposals.beam=16 proposals.boosted=0",
    "source: beam and boosted beam": "proposals.term_swap=0",
    "source: all and 8 samples": "proposals.samples=8 proposals.max_members=32",
    "LLM in 8 bit": "llm.quantization=int8",
    "LLM in 16 bit": "llm.quantization=none llm.compute_dtype=bfloat16",
    "LLM in 32 bit": "llm.quantization=none",
    "reward: entity tokens weigh double": "reward=entity",
    "reward: one price for all listed terms": "reward=entity reward.settings.weight=3 "
    "reward.settings.shared_price=true",
    "reward: each part normalised (z)": "reward=composite "
    "'reward.settings.components=[{name:llm,weight:2,normalize:z},{name:asr,weight:1,normalize:z}]'",
    "reward: listed terms found, no LLM": "reward=rules reward.settings.repetition=0 reward.settings.empty=0 "
    "reward.settings.edit_distance=0 reward.settings.entity_hits=10",
}


def ablation_rows() -> dict[str, list[str]]:
    """Rows that train as `feedback` does with one of the settings: `feedback_no_asr_term` and so on."""
    return {
        "feedback_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): shlex.split(overrides)
        for name, overrides in SETTINGS.items()
        if overrides
    }
