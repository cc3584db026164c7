"""Drift of transcripts on held-out utterances, and which of it goes beyond the limits: pure functions of texts."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nemo_llm_feedback.core.config import GuardConfig
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.hypotheses.spelling import UNKNOWN_SIGNS
from nemo_llm_feedback.rewards.rules import repetition


@dataclass(frozen=True)
class HeldOutMetrics:
    """The policy's greedy transcripts of the held-out utterances against the starting model's.

    Attributes:
        step: optimizer steps done.
        gain: mean of R(policy's transcript) − R(teacher's), in the reward's unit; NaN without a reward.
        length_ratio: total length ÷ the starting model's.
        empty_rise: share of empty transcripts − the starting model's.
        repetition_rise: mean share of repeated words − the starting model's.
        style_change: the larger change of the shares of upper-case letters and of punctuation marks.
        kl: mean of log p(transcript | policy) − log p(transcript | starting model), nats per label: an estimate of
            KL(policy ‖ start) at the policy's mode.
        changed: share of transcripts that differ from the starting model's.
        wer_rise: relative rise of the guard set's WER; NaN without one.
        unknown_rise: share of transcripts with the sign of the unknown label (⁇) − the starting model's.
        gains: ``gain`` of each utterance; NaN = cannot be judged. Empty without a reward.
        generation: the generation of the run, over whose teacher the gain is counted.
    """

    step: int
    gain: float
    length_ratio: float
    empty_rise: float
    repetition_rise: float
    style_change: float
    kl: float
    changed: float
    wer_rise: float
    unknown_rise: float = 0.0
    gains: tuple[float, ...] = ()
    generation: int = 1

    def metrics(self) -> dict[str, float]:
        """Name → value for logs, those that were measured."""
        named = asdict(self).items()
        return {f"held_out/{k}": float(v) for k, v in named if k not in ("step", "gains", "generation") and v == v}


def gain_name(held_out_rows: int) -> str:
    """What ``gain`` is called for readers: where no row is kept from training it is measured on trained ones."""
    return "held-out gain" if held_out_rows else "gain on trained rows"


def as_good(found: Sequence[float], best: Sequence[float], *, standard_errors: float) -> bool:
    """Whether gains lie so little below the best ones that utterances drawn anew might turn the two around.

    The one-standard-error rule (Breiman et al. 1984), on differences of the same utterances: their mean is at most
    ``standard_errors`` · s / √n, with s their standard deviation over the n utterances that both can judge.

    Args:
        found: gain of each utterance; NaN = cannot be judged.
        best: those of the measurement with the highest mean.
        standard_errors: how many of them.
    """
    drops = [b - a for a, b in zip(found, best, strict=True) if a == a and b == b]
    return len(drops) > 1 and statistics.fmean(drops) <= standard_errors * statistics.stdev(drops) / math.sqrt(
        len(drops)
    )


def text_drift(now: Sequence[str], start: Sequence[str]) -> dict[str, float]:
    """The fields of :class:`HeldOutMetrics` that texts alone give.

    Args:
        now: the policy's transcripts as the model writes them, not normalised.
        start: the starting model's of the same utterances.
    """
    return {
        "length_ratio": sum(map(text_length, now)) / max(1, sum(map(text_length, start))),
        "empty_rise": (sum(not text_length(t) for t in now) - sum(not text_length(t) for t in start)) / len(now),
        "repetition_rise": (sum(map(repetition, now)) - sum(map(repetition, start))) / len(now),
        "unknown_rise": (sum(map(_unknown, now)) - sum(map(_unknown, start))) / len(now),
        "style_change": max(abs(a - b) for a, b in zip(_style(now), _style(start), strict=True)),
        "changed": sum(a != b for a, b in zip(now, start, strict=True)) / len(now),
    }


def violations(metrics: HeldOutMetrics, limits: GuardConfig) -> list[str]:
    """Every limit that is passed, as a phrase; the guard set's WER only where no interpolation can mend it."""
    found = []
    if not 1 / limits.max_length_ratio <= metrics.length_ratio <= limits.max_length_ratio:
        found.append(
            f"transcripts have {metrics.length_ratio:.2f} times their length (limit {limits.max_length_ratio})"
        )
    for value, limit, what in (
        (metrics.empty_rise, limits.max_empty_rise, "the share of empty transcripts rose by"),
        (metrics.repetition_rise, limits.max_repetition_rise, "the share of repeated words rose by"),
        (metrics.style_change, limits.max_style_change, "the share of capitals or punctuation changed by"),
        (metrics.kl, limits.max_kl, "the policy's distance from the starting model, nats per label, is"),
    ):
        if value > limit:
            found.append(f"{what} {value:.3f} (limit {limit})")
    if metrics.unknown_rise > 0:
        found.append(f"{100 * metrics.unknown_rise:.0f} % more transcripts have the unknown label's sign ⁇")
    if limits.interpolation is not None and metrics.wer_rise > limits.max_wer_rise:
        found.append(
            f"the guard set's WER rose by {100 * metrics.wer_rise:.1f} % (limit {100 * limits.max_wer_rise} %)"
        )
    return found


def _unknown(text: str) -> bool:
    return any(sign in text for sign in UNKNOWN_SIGNS)


def _style(texts: Sequence[str]) -> tuple[float, float]:
    """Shares of upper-case letters and of punctuation marks; apostrophes belong to words."""
    characters = [c for text in texts for c in text if not c.isspace()]
    total = max(1, len(characters))
    punctuation = sum(unicodedata.category(c)[0] == "P" and c not in "'’" for c in characters)
    return sum(c.isupper() for c in characters) / total, punctuation / total
