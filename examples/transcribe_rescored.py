"""Rescoring in Python: greedy and rescored transcripts of a few files, side by side, with the parts of the scores.

    python examples/transcribe_rescored.py BASE.nemo LLM_FOLDER "an order at a coffee shop" a.wav b.wav …

``nemo-llm-feedback transcribe BASE.nemo a.wav --rescore --llm …`` does it without a script.
"""

from __future__ import annotations

import argparse
import logging

from nemo.collections.asr.models import ASRModel
from nemo.utils import logging as nemo_logging

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import load_llm
from nemo_llm_feedback.rescoring import enable_rescoring
from nemo_llm_feedback.rewards import LLMReward


def main(checkpoint: str, llm: str, description: str, *audio: str) -> None:
    """Transcribes the files twice and prints what changed."""
    nemo_logging.setLevel(logging.ERROR)
    model = ASRModel.restore_from(checkpoint, map_location="cpu")
    greedy = model.transcribe(list(audio), verbose=False)

    reward = LLMReward(load_llm(LLMConfig(model=llm)), alpha=1.0, beta=2.0)
    enable_rescoring(model, reward, context=Context(description))
    rescored = model.transcribe(list(audio), verbose=False)

    for name, before, after in zip(audio, greedy, rescored, strict=True):
        print(f"{name}\n  greedy:   {before.text}\n  rescored: {after.text}")
        for member in after.n_best[:4]:
            parts = "  ".join(f"{part} {value:7.2f}" for part, value in member.parts.items())
            print(f"    {member.score:8.2f}  {parts}  {member.text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "llm", "description"):
        parser.add_argument(name)
    parser.add_argument("audio", nargs="+")
    given = parser.parse_args()
    main(given.checkpoint, given.llm, given.description, *given.audio)
