"""Keys, values, flags and commands that had another name; they are refused, with the new name in the message."""

from __future__ import annotations

# Old key, or old key=value, and what stands for it now. ``replay`` without a section is the key of a manifest row.
RENAMED = {
    "feedback.replay": "feedback.labelled (supervised, or replay where it was anchor)",
    "feedback.anchor_augment": "feedback.replay_augment",
    "feedback.survey_utterances": "feedback.pool_utterances",
    "objective.kl_anchor_weight": "objective.reference_kl_weight",
    "objective.correction=anchored": "objective.correction=kl_optimum",
    "guards.mix": "guards.interpolation",
    "llm.restore": "llm.truecasing",
    "reward.settings.dialect": "always vLLM's, without a key (the SGLang dialect is gone)",
    "reward.settings.restore": "reward.settings.truecasing",
    "replay=anchor": '"replay": "kl"',
    "--base-share": "--interpolation (the share of the run: 1 − the base's)",
    "--samples": "--resamples in evaluate (--samples of adapt and score are hypotheses)",
    "--rescoring": "--rescore with flags and --set (in Python transcribe(…, rescoring={…}))",
    "calibrate": "score --compare-quantization none",
    "tune": "score --tune",
}


def renamed(key: str, value: object = None) -> str | None:
    """A sentence with the new name of a key, or of this value of it; None where the name is not an old one."""
    old = next((name for name in (key, f"{key}={value}") if name in RENAMED), None)
    return None if old is None else f"{old} is now {RENAMED[old]}."
