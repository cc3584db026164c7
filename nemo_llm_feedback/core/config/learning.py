"""Settings of the training step: feedback and objective."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section, Share

HeadChoice = Literal["auto", "ctc", "transducer", "both"]
NormalizerName = Literal["none", "lower", "basic"]
ObjectiveName = Literal["distill", "mwer", "reinforce", "grpo", "dpo", "self_training"]
OBJECTIVE_NAMES: tuple[str, ...] = get_args(ObjectiveName)
AUGMENTED_OBJECTIVES = ("distill", "mwer")
SAMPLED_OBJECTIVES = ("reinforce",)
REPLAY_VALUES = ("supervised", "kl")


@dataclass(frozen=True, config=STRICT)
class FeedbackConfig(Section):
    """How the feedback enters the training step.

    Attributes:
        weight: factor of the feedback loss; 0 leaves NeMo's own step untouched.
        labelled: what rows with text are for. ``supervised``: they are learned by NeMo's loss. ``replay``: they are
            general speech on which the model shall stay what it is: the KL divergence from the starting model's
            outputs on them is held down (learning without forgetting, Li and Hoiem 2016, arXiv 1606.09282). A manifest
            row may choose for itself, under the key ``replay``: ``supervised`` or ``kl``; with ``kl`` it needs no
            text: CTC does not read it, and transducers are then compared along the alignments of what the starting
            model writes.
        supervised_weight: factor of NeMo's loss on the rows that are learned from their text.
        replay_weight: factor of the KL divergence on replay rows.
        heads: which head of the model learns: ``ctc``, ``transducer``, ``both`` (hybrids), ``auto`` = all it has.
        use_text: False treats every row of the training manifest as unlabeled and never reads its text.
        normalizer: text normalisation under which hypotheses of a group must differ and rewards read them.
        on_bad_audio: ``error`` lists unreadable audio and stops; ``skip`` lists it and goes on without.
        refresh_every: optimizer steps for which a proposed group is kept; 1 proposes anew at every step.
        pool_utterances: unlabeled rows looked at before training, for scales and the share with signal.
        log_hypotheses_every: optimizer steps between two tables of hypotheses in the log; 0 = never.
        augment: learn from audio under the checkpoint's SpecAugment; hypotheses and rewards come from the clean audio.
            For ``distill`` and ``mwer``; null: there, where the checkpoint has SpecAugment. Fewer errors on the target
            domain, somewhat more on others unless those are replayed (docs/results/barista.md).
        replay_augment: compare the two models on replay rows under the checkpoint's SpecAugment, the same for both,
            so that they are held on more than the audio as it is.
        memory_budget_mb: upper bound of the transducer joint's working memory in the feedback loss.
        band_tolerance: nat that log p of a hypothesis may lose by leaving improbable cells of the transducer lattice
            out; 0 = exact. Pays with a large joint (see docs/performance.md); 0.001 is far below what learning feels.
    """

    weight: NonNegativeFloat = 1.0
    labelled: Literal["supervised", "replay"] = "supervised"
    supervised_weight: NonNegativeFloat = 1.0
    replay_weight: NonNegativeFloat = 1.0
    heads: HeadChoice = "auto"
    use_text: bool = True
    normalizer: NormalizerName = "basic"
    on_bad_audio: Literal["error", "skip"] = "error"
    refresh_every: PositiveInt = 50
    pool_utterances: PositiveInt = 64
    log_hypotheses_every: NonNegativeInt = 50
    augment: bool | None = None
    replay_augment: bool = False
    memory_budget_mb: PositiveInt = 512
    band_tolerance: NonNegativeFloat = 0.0

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        if self.labelled == "replay" and self.weight == 0:
            return ["feedback.labelled=replay with feedback.weight=0: nothing would be learned."]
        return []


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig(Section):
    """What is optimised over a group. Names and formulas are those of ``objectives.py``.

    Attributes:
        name: one of ``distill``, ``mwer``, ``reinforce``, ``grpo``, ``dpo``, ``self_training``.
        min_spread: a group whose rewards spread less than this (max − min, nats) has no signal and is skipped; for
            ``dpo`` the smallest reward gap of a pair.
        temperature: ``distill``, ``mwer``: softmax temperature of the reward's distribution, in nats.
        correction: ``mwer``: ``none``, ``kl_optimum`` or ``proposal``.
        mixture: ``mwer`` kl_optimum: share of the reward's distribution in the weights, 0 to 1.
        clip: ``grpo``: ratio clip ε.
        kl_weight: ``grpo``: weight of the k3 KL to the reference.
        standardize: ``grpo``: divide advantages by the group's standard deviation.
        std_floor: ``grpo``: smallest such divisor, nats.
        beta: ``dpo``: strength of the implied KL to the reference, per nat.
        label: ``self_training``: the frozen model's best (``reference``) or the best-rewarded (``reward``).
        min_confidence: ``self_training``: smallest share of the pseudo-label in its group, 0 to 1.
        augment: ``self_training``: through NeMo's own training step (SpecAugment, dropout); False: exact likelihood in
            eval mode.
        pseudo_label_weight: weight of −log p(best-rewarded member) added to the objective.
        mass_weight: weight of −log Σ p(members) in the sum, which keeps probability from leaking out of the group;
            ``conf/objective/distill.yaml`` sets 1, which makes the sum the cross-entropy of soft labels.
        reference_kl_weight: weight of KL(reference ‖ policy) over the group in the sum.
    """

    name: ObjectiveName = "distill"
    min_spread: NonNegativeFloat = 0.01
    temperature: PositiveFloat = 1.0
    correction: Literal["none", "kl_optimum", "proposal"] = "kl_optimum"
    mixture: Share = 0.5
    clip: PositiveFloat = 0.2
    kl_weight: NonNegativeFloat = 0.04
    standardize: bool = True
    std_floor: PositiveFloat = 0.1
    beta: PositiveFloat = 0.1
    label: Literal["reference", "reward"] = "reference"
    min_confidence: Share = 0.0
    augment: bool = True
    pseudo_label_weight: NonNegativeFloat = 0.0
    mass_weight: NonNegativeFloat = 0.0
    reference_kl_weight: NonNegativeFloat = 0.0
