"""Controls of the experiments."""

from __future__ import annotations

import hashlib
import math

from nemo_llm_feedback.rewards import CallableReward, Reward


def shuffled(spread: float = 10.0) -> Reward:
    """A reward without meaning: each text's value is drawn by its hash, uniform over ±``spread`` nats, and the frozen
    ASR score is added, as the real reward has it."""

    def judge(texts: list[str], ref_logp: list[float]) -> list[float | None]:
        values = []
        for text, logp in zip(texts, ref_logp, strict=True):
            draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
            values.append(spread * (2 * draw - 1) + logp if math.isfinite(logp) else None)
        return values

    return CallableReward(judge, name="shuffled")
