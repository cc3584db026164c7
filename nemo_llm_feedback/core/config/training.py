"""Settings of what is trained, and of the guards under which it may go on."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section

# Of a run that names no interval of looks: how many there are, and the fewest steps between two.
_LOOKS, _SHORTEST_INTERVAL = 16, 10


@dataclass(frozen=True, config=STRICT)
class ParametersConfig(Section):
    """Which parameters learn, and how. Learning rates a module are NeMo's ``model.optim_param_groups``.

    Attributes:
        freeze_encoder: train decoder, joint and CTC head only.
        freeze_batchnorm: keep BatchNorm's statistics in feedback steps, also in augmented self-training.
        lora_rank: rank of LoRA on the encoder's linear layers, which then learn instead of the encoder's weights, and
            are merged on export; 0 = none.
        lora_alpha: LoRA's scale: the update is lora_alpha / lora_rank · B·A.
        ema_decay: a step's decay of the moving average of the weights that is validated and exported; 0 = none.
        lr_candidates: where ``model.optim.lr`` is null: peak learning rates of which the run takes, after a
            short trial of each, the smallest with at least 0.8 of the greatest fall of the run's loss on held-out
            utterances.
        lr_trial_steps: batches of a trial.
        recompute_encoder: keep no activations inside the encoder's layers, compute them again in the backward.
    """

    freeze_encoder: bool = False
    freeze_batchnorm: bool = True
    lora_rank: NonNegativeInt = 0
    lora_alpha: PositiveInt = 16
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lr_candidates: tuple[PositiveFloat, ...] = (1e-5, 3e-5, 1e-4, 3e-4)
    lr_trial_steps: PositiveInt = 12
    recompute_encoder: bool = False

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        if self.freeze_encoder and self.lora_rank:
            return ["parameters.freeze_encoder and parameters.lora_rank both speak of the encoder: set one of them."]
        return []


@dataclass(frozen=True, config=STRICT)
class GuardConfig(Section):
    """Looks at utterances that training does not see; limits beyond which it is stopped. No label is needed.

    Attributes:
        every: optimizer steps between two looks; null = a sixteenth of the run, at least 10, so that ``patience``
            bears the plateaus of a long one; 0 = no looks, no guards but the one on non-finite steps.
        held_out: share of the unlabeled rows that is kept from training for the looks.
        held_out_utterances: largest number of them.
        patience: looks without a rise of the held-out reward after which training stops; 0 = never.
        max_length_ratio: largest r for which the greedy transcripts' length ÷ the starting model's may be in
            [1/r, r].
        max_empty_rise: largest rise of the share of empty transcripts.
        max_repetition_rise: largest rise of the share of repeated words.
        max_style_change: largest change of the share of upper-case letters or of punctuation among the characters.
        max_kl: largest mean of log p(transcript | policy) − log p(transcript | starting model), nats a label.
        manifest_filepath: labelled general-domain speech whose WER is watched; null = none.
        max_wer_rise: largest relative rise of that WER.
        max_nonfinite_steps: consecutive steps with a gradient that is not finite after which training stops; each is
            skipped.
        on_violation: ``rollback`` to the best weights that passed every guard and stop; ``stop`` with the weights as
            they are.
        interpolation: share λ of the update that is exported, start + λ·(adapted − start): 1 = the adapted weights;
            null = 1, and with a guard manifest the largest tenth at which its WER keeps ``max_wer_rise`` (Wortsman et
            al. 2022, arXiv 2109.01903).
    """

    every: NonNegativeInt | None = None
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    held_out_utterances: PositiveInt = 24
    patience: NonNegativeInt = 6
    max_length_ratio: Annotated[float, Field(gt=1)] = 1.5
    max_empty_rise: NonNegativeFloat = 0.2
    max_repetition_rise: NonNegativeFloat = 0.1
    max_style_change: NonNegativeFloat = 0.05
    max_kl: PositiveFloat = 4.0
    manifest_filepath: str | None = None
    max_wer_rise: NonNegativeFloat = 0.02
    max_nonfinite_steps: PositiveInt = 3
    on_violation: Literal["rollback", "stop"] = "rollback"
    interpolation: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def looks(self) -> bool:
        """Whether there are looks at all."""
        return self.every != 0

    def interval(self, steps: float) -> int:
        """Steps between two looks of a run of ``steps``; where ``every`` is null and the run endless (inf), 10."""
        if self.every is not None:
            return self.every
        return max(_SHORTEST_INTERVAL, round(steps / _LOOKS)) if math.isfinite(steps) else _SHORTEST_INTERVAL

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        if self.manifest_filepath and not self.looks:
            return ["guards.manifest_filepath needs looks: set guards.every above 0."]
        return []
