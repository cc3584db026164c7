"""The sections of a run's settings except reward and context, each key with its one default."""

from __future__ import annotations

import math
import re
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section

Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Members = Annotated[int, Field(ge=0, le=1000)]  # a beam of more needs memory that no machine has
NormalizerName = Literal["none", "lower", "basic"]
ObjectiveName = Literal["distill", "mwer", "reinforce", "grpo", "gspo", "dpo", "self_training"]
OBJECTIVE_NAMES: tuple[str, ...] = get_args(ObjectiveName)
AUGMENTED_OBJECTIVES = ("distill", "mwer", "grpo", "gspo", "dpo")
RATIO_OBJECTIVES = ("grpo", "gspo")  # they compare log p with that of the policy that made the group
SAMPLED_OBJECTIVES = ("reinforce",)
REPLAY_VALUES = ("supervised", "kl")
SOURCE_NAMES = ("beam", "boosted", "term_swap", "llm_correction", "samples")
LABELS = ("reference", "reward")
RESERVED_SOURCES = ("greedy", *SOURCE_NAMES, *LABELS, "policy")
"""What another recogniser cannot be called: our own sources, and what else names a member or a pseudo-label."""
NO_MODEL = "llm.model is missing: give a folder, hub id or GGUF file of a causal LM, e.g. Qwen/Qwen2.5-7B-Instruct."
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
# Held-out measurements of a run that names no interval: their number, and the fewest steps between two.
_MEASUREMENTS, _SHORTEST_INTERVAL = 16, 10


def language_faults(key: str, language: str) -> list[str]:
    """A sentence where num2words cannot read numbers in the language."""
    if language == ProposalConfig.language:
        return []  # without the import
    from num2words import CONVERTER_CLASSES

    known = ", ".join(sorted(CONVERTER_CLASSES))
    return [] if language in CONVERTER_CLASSES else [f"{key} must be one of {known}, got {language!r}."]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(f"must be one of auto, cpu, cuda, cuda:<number>, got {value!r}.")
    return value


@dataclass(frozen=True, config=STRICT)
class FeedbackConfig(Section):
    """How the feedback enters the training step.

    Attributes:
        weight: factor of the feedback loss; 0 leaves NeMo's step untouched.
        labelled: what rows with text are for. ``supervised``: they are learned by NeMo's loss. ``replay``: they are
            general speech on which the model shall stay what it is: the KL divergence from the starting model's
            outputs on them is held down (learning without forgetting, Li and Hoiem 2016, arXiv 1606.09282). A manifest
            row may choose for itself, under the key ``replay``: ``supervised`` or ``kl``; with ``kl`` it needs no
            text: CTC does not read it, and transducers are then compared along the alignments of what the starting
            model writes. ``reward``: they are learned by a reward against their text (minimum word error rate, GRPO …;
            ``reward=wer`` or a function that takes ``references``). null: ``reward`` with ``reward=wer``, else
            ``supervised``.
        supervised_weight: factor of NeMo's loss on the rows that are learned from their text.
        replay_weight: factor of the KL divergence on replay rows; 2 is meant for two of them per unlabeled row.
        heads: which head of the model learns: ``ctc``, ``transducer``, ``both`` (hybrids), ``auto`` = all it has.
        use_text: False treats every row of the training manifest as unlabeled and never reads its text.
        normalizer: text normalisation under which hypotheses of a group must differ and rewards read them.
        on_bad_audio: ``error`` lists unreadable audio and stops; ``skip`` lists it and goes on without.
        generations: parts of the run, each with a teacher, an optimizer and a schedule of its own; they share the
            trainer's ``max_steps``. The best weights that passed the guards become the next one's teacher: their
            scores stand in the reward, alpha and boosting are set anew, and gains are counted over them, as are the
            KL of ``grpo`` and of ``reference_kl_weight``. Replay and guards keep to the base.
        refresh_every: optimizer steps for which a proposed group is kept; 1 proposes anew at every step.
        pool_utterances: unlabeled rows that are measured before training, for scales and the share with signal.
        score_ahead: propose the next batch's groups before a step and have the reward judge them during it, so that
            the step does not wait for the LLM: worth it with ``reward=remote`` and perhaps on a GPU, where it has not
            run yet. The policy that proposes is then one step older, and the reward is called from a second thread.
        log_hypotheses_every: optimizer steps between two tables of hypotheses in the log; 0 = never.
        augment: learn from audio under the checkpoint's SpecAugment; hypotheses and rewards come from the clean audio.
            Not for ``reinforce`` and ``self_training``; null: where the checkpoint has SpecAugment. Fewer errors on
            the target domain, somewhat more on others unless those are replayed (docs/results/barista.md).
        replay_augment: compare the two models on replay rows under the checkpoint's SpecAugment, the same for both,
            so that they are held on more than the audio as it is; null: where the checkpoint has SpecAugment.
        look_ahead: of a streaming checkpoint with several attention contexts the one, such as ``[70, 13]``, that is
            learned and guarded; null: all of them, drawn as NeMo's training draws them. The export has all.
        memory_budget_mb: upper bound of the transducer joint's working memory in the feedback loss.
        band_tolerance: nat that log p of a hypothesis may lose by leaving improbable cells of the transducer lattice
            out; 0 = exact. null: 0.001, far below what learning feels, where the joint is large enough for it to pay
            (see docs/performance.md), else exact.
    """

    weight: NonNegativeFloat = 1.0
    labelled: Literal["supervised", "replay", "reward"] | None = None
    supervised_weight: NonNegativeFloat = 1.0
    replay_weight: NonNegativeFloat = 2.0
    heads: Literal["auto", "ctc", "transducer", "both"] = "auto"
    use_text: bool = True
    normalizer: NormalizerName = "basic"
    on_bad_audio: Literal["error", "skip"] = "error"
    generations: PositiveInt = 1
    refresh_every: PositiveInt = 50
    pool_utterances: PositiveInt = 64
    score_ahead: bool = False
    log_hypotheses_every: NonNegativeInt = 50
    augment: bool | None = None
    replay_augment: bool | None = None
    look_ahead: tuple[int, ...] | None = None
    memory_budget_mb: PositiveInt = 512
    band_tolerance: NonNegativeFloat | None = None

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        if self.labelled == "replay" and self.weight == 0:
            return ["feedback.labelled=replay with feedback.weight=0: nothing would be learned."]
        return []


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig(Section):
    """What is optimised over a group. Names and formulas are those of ``objectives.py``.

    Attributes:
        name: one of ``distill``, ``mwer``, ``reinforce``, ``grpo``, ``gspo``, ``dpo``, ``self_training``.
        min_spread: a group whose rewards spread less than this (max − min, nats) has no signal and is skipped; for
            ``dpo`` the smallest reward gap of a pair.
        temperature: all but ``dpo`` and ``reinforce``: softmax temperature of the reward's distribution, in its unit.
        correction: ``mwer``, ``grpo``, ``gspo``: how members count that nothing sampled: ``kl_optimum``, ``none``, or
            ``proposal`` for groups of samples.
        mixture: with kl_optimum: share of the reward's distribution in these weights, 0 to 1.
        clip: ``grpo``, ``gspo``: ratio clip ε, of the whole transcript or per label. A group that is clipped teaches
            nothing until it is made anew: a smaller ``feedback.refresh_every`` goes with a smaller clip. In bf16-mixed
            rounding alone moves log p of a long transcript by about as much as ``grpo``'s clip: train it with
            ``trainer.precision=32``, or take ``gspo``.
        kl_weight: ``grpo``, ``gspo``: weight of the KL to the reference: of the group, or k3 for samples.
        standardize: ``grpo``, ``gspo``: divide advantages by the group's standard deviation.
        std_floor: ``grpo``, ``gspo``: smallest such divisor, in the reward's unit.
        beta: ``dpo``: scale of the margin, per nat; with the reference, the strength of the implied KL to it.
        rejected: ``dpo``: the worse member of a pair: the reference's most ``probable``, or the ``worst`` by reward.
        reference_free: ``dpo``: leave the reference out of the margin.
        label: ``self_training``: the frozen model's best (``reference``), the best-rewarded (``reward``), or what the
            source of that name wrote under the manifest key ``hypotheses`` (of several readings of its numbers the one
            that the frozen model prefers).
        min_confidence: ``self_training``: smallest share of the pseudo-label in its group, 0 to 1.
        augment: ``self_training``: through NeMo's training step (SpecAugment, dropout); False: exact likelihood in
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
    rejected: Literal["probable", "worst"] = "probable"
    reference_free: bool = False
    label: str = "reference"
    min_confidence: Share = 0.0
    augment: bool = True
    pseudo_label_weight: NonNegativeFloat = 0.0
    mass_weight: NonNegativeFloat = 0.0
    reference_kl_weight: NonNegativeFloat = 0.0

    @property
    def source(self) -> str:
        """The other recogniser whose transcripts are learned; "" where none is."""
        return self.label if self.name == "self_training" and self.label not in LABELS else ""


@dataclass(frozen=True, config=STRICT)
class ProposalConfig(Section):
    """Where the members of a group come from.

    Attributes:
        beam: members from NeMo's batched beam decoder (0 = none).
        boosted: members from the same beam with NeMo's phrase boosting on the context's terms (0 = none; ignored for
            utterances without terms).
        term_swap: members in which a span is replaced by a context term that looks like it, the most probable ones of
            each of two rounds (0 = none).
        llm_correction: 1 adds the LLM's rewrite of the group's best members, for instruct models (0 = none).
        samples: members sampled from the model (0 = none).
        external: texts of each source under the manifest key ``hypotheses``, as listed; with their readings they are
            at most half of ``max_members`` (0 = none; a group of samples alone takes none).
        language: num2words' code of the language in which their numbers are read where the checkpoint has no digits.
        max_members: largest group after removing duplicates; the plain beam's members are kept first.
        boosting_weight: weight of the boosting tree in the beam.
        boosting_weights: weights of which training takes, before its first step, the one whose groups have the best
            members by the reward on a few utterances of the pool; empty = ``boosting_weight``.
        context_score: NeMo's ``context_score`` of the boosting tree.
        depth_scaling: NeMo's ``depth_scaling`` of the boosting tree.
        swap_similarity: smallest similarity of a span and the term that replaces it, 0 to 100.
        max_symbols: largest number of labels a transducer beam emits in one frame.
        cuda_graphs: on a GPU run NeMo's searches as CUDA graphs. They are captured once for all batches that are
            proposed with the same weights (the pool, the rounds of ``llm.phase=cached``, ``score``), and anew for each
            batch that a step proposes. Not yet run on a GPU.
    """

    beam: Members = 8
    boosted: Members = 8
    term_swap: Members = 4
    llm_correction: Annotated[int, Field(ge=0, le=1)] = 0
    samples: Members = 0
    external: Members = 8
    language: str = "en"
    max_members: Annotated[int, Field(ge=2)] = 24
    boosting_weight: NonNegativeFloat = 1.0
    boosting_weights: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    context_score: PositiveFloat = 1.0
    depth_scaling: PositiveFloat = 2.0
    swap_similarity: Annotated[float, Field(gt=0, le=100)] = 50.0
    max_symbols: PositiveInt = 10
    cuda_graphs: bool = False

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        if self.beam + self.boosted + self.samples < 2:
            return ["proposals.beam + boosted + samples must be at least 2: a group of one has nothing to prefer."]
        return language_faults("proposals.language", self.language)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PromptConfig(Section):
    """What an LLM reads, on this machine or on a server; :class:`LLMConfig` explains the keys."""

    template: str | None = None
    chat: Literal["auto", "on", "off"] = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_context_tokens: Annotated[int, Field(ge=8)] = 1024
    max_terms: PositiveInt = 200
    truecasing: Literal["none", "sentence", "english"] = "none"


@dataclass(frozen=True, config=STRICT)
class LLMConfig(PromptConfig):
    """Which LLM scores, how it is stored, and how it is prompted.

    Attributes:
        model: folder of a causal LM (``config.json``, safetensors, tokenizer), a hub id such as
            ``Qwen/Qwen2.5-7B-Instruct``, or a GGUF file (``model.gguf``), which is de-quantised to float16 once, into
            the hub's cache (``HF_ASSETS_CACHE``).
        revision: branch, tag or commit of a hub id; pin a commit for a run that others shall repeat.
        quantization: ``nf4`` (4 bit, double quantisation), ``int8`` or ``none``; all three work on CPU and on CUDA.
        device: ``auto`` (this process's GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``.
        compute_dtype: ``auto`` is what is fast on the processor at hand: bfloat16 on a GPU (float16 where it has
            none) and, for ``nf4`` and ``none``, on a CPU with AVX512-BF16; else float32, which is exact. The plan and
            the log name it. On a CPU only the 4-bit layers of ``nf4`` compute in it, the rest in float32.
        template: path of a prompt template file (those of the folder ``llm/templates`` are examples); null = the
            built-in one.
        correction_template: path of a template for ``correction`` rewards and proposals; null = the built-in one.
        chat: wrap the prompt in the tokenizer's chat template: ``auto`` = where it has one, ``on``, ``off``.
        chat_template_kwargs: extra variables of the chat template; ``enable_thinking`` is false unless given.
        max_context_tokens: longest prompt in tokens; a longer context loses terms from its end, with a warning.
        max_terms: a longer term list is cut for each group to the terms that look or sound most like something in its
            hypotheses, a quarter of them distractors; such groups no longer share one prompt (docs/rewards.md).
        truecasing: how the LLM sees hypotheses: ``none`` = as they are, ``sentence`` = listed terms in their listed
            spelling, first letter upper case, full stop; ``english`` = also the pronoun I.
        phase: ``inline`` scores groups when a step needs them; ``cached`` scores the whole pool at the start of every
            refresh round and keeps the LLM in memory only then (and for held-out measurements), so that it and the
            training step need not share a GPU.
        token_budget: hypothesis tokens that go through the LLM in one forward; halved by itself when memory runs out.
    """

    model: str
    revision: str | None = None
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    device: Annotated[str, AfterValidator(_device)] = "auto"
    compute_dtype: ComputeDtype = "auto"
    correction_template: str | None = None
    phase: Literal["inline", "cached"] = "inline"
    token_budget: PositiveInt = 8192

    def validate(self) -> list[str]:
        """Returns a fault if there is no model; its files are checked by ``check_llm_folder``."""
        return [] if self.model.strip() else [NO_MODEL]


@dataclass(frozen=True, config=STRICT)
class ParametersConfig(Section):
    """Which parameters learn, and how. Learning rates per module are NeMo's ``model.optim_param_groups``.

    Attributes:
        freeze_encoder: train decoder, joint and CTC head only.
        freeze_batchnorm: keep BatchNorm's statistics in feedback steps, also in augmented self-training.
        lora_rank: rank of LoRA on the encoder's linear layers, which then learn instead of the encoder's weights, and
            are merged on export; 0 = none.
        lora_alpha: LoRA's scale: the update is lora_alpha / lora_rank · B·A.
        ema_decay: a step's decay of the moving average of the weights that is measured on held-out rows and exported
            (NeMo's validation between is of the weights themselves); 0 = none.
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
    ema_decay: ShareBelowOne = 0.0
    lr_candidates: tuple[PositiveFloat, ...] = (1e-5, 3e-5, 1e-4, 3e-4)
    lr_trial_steps: PositiveInt = 12
    recompute_encoder: bool = False

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        if self.freeze_encoder and self.lora_rank:
            return ["parameters.freeze_encoder and parameters.lora_rank both are about the encoder: set one of them."]
        return []


@dataclass(frozen=True, config=STRICT)
class GuardConfig(Section):
    """Measurements of utterances that training does not see, and limits beyond which it stops; no label is needed.

    Attributes:
        every: optimizer steps between two measurements; null = a sixteenth of the run, at least 10, so that
            ``patience`` bears the plateaus of a long one; 0 = none, and no guards but the one on non-finite steps.
        held_out: share of the unlabeled rows that is kept from training for the measurements.
        held_out_utterances: largest number of them.
        patience: measurements without a rise of the held-out reward after which training stops, before the first gain
            those below the start by more than ``standard_errors``; 0 = never.
        standard_errors: of the weights whose held-out reward lies at most so many standard errors, of the difference
            over the utterances, below the highest, the latest are kept; 0 = those with the highest.
        max_length_ratio: largest r for which the greedy transcripts' length ÷ the starting model's may be in
            [1/r, r].
        max_empty_rise: largest rise of the share of empty transcripts.
        max_repetition_rise: largest rise of the share of repeated words.
        max_style_change: largest change of the share of upper-case letters or of punctuation among the characters.
        max_kl: largest mean of log p(transcript | policy) − log p(transcript | starting model), nats per label.
        manifest_filepath: labelled general-domain speech whose WER is watched; null = none.
        everyday: whether 60 English sentences that ship with the package stand in for it: ``en`` = yes; ``auto`` = in
            runs without a guard manifest and without replay rows, if the checkpoint has the letters of the sentences
            and transcribes them with a WER below 90 % (another language gives about 100 %); ``none`` = never. To keep
            measurements short they are transcribed at the start and at the end only.
        max_wer_rise: largest relative rise of that WER; for the sentences that ship, of a WER of at least 25 %, below
            which two wrong words would be a rise.
        max_nonfinite_steps: consecutive steps with a gradient that is not finite after which training stops; each is
            skipped.
        on_violation: ``rollback`` to the best weights that passed every guard and stop; ``stop`` with the weights as
            they are.
        interpolation: share λ of the update that is exported, start + λ·(adapted − start): 1 = the adapted weights;
            null = the largest tenth at which the guard set's WER keeps ``max_wer_rise``, 1 without a guard set
            (Wortsman et al. 2022, arXiv 2109.01903).
    """

    every: NonNegativeInt | None = None
    held_out: ShareBelowOne = 0.1
    held_out_utterances: PositiveInt = 24
    patience: NonNegativeInt = 6
    standard_errors: NonNegativeFloat = 1.0
    max_length_ratio: Annotated[float, Field(gt=1)] = 1.5
    max_empty_rise: NonNegativeFloat = 0.2
    max_repetition_rise: NonNegativeFloat = 0.1
    max_style_change: NonNegativeFloat = 0.05
    max_kl: PositiveFloat = 4.0
    manifest_filepath: str | None = None
    everyday: Literal["auto", "en", "none"] = "auto"
    max_wer_rise: NonNegativeFloat = 0.02
    max_nonfinite_steps: PositiveInt = 3
    on_violation: Literal["rollback", "stop"] = "rollback"
    interpolation: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def measures(self) -> bool:
        """Whether held-out utterances are measured at all."""
        return self.every != 0

    def interval(self, steps: float) -> int:
        """Steps between two measurements of ``steps``; 10 where ``every`` is null and the run endless (inf)."""
        if self.every is not None:
            return self.every
        return max(_SHORTEST_INTERVAL, round(steps / _MEASUREMENTS)) if math.isfinite(steps) else _SHORTEST_INTERVAL

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        faults = []
        named = [f"manifest_filepath={self.manifest_filepath}"] if self.manifest_filepath else []
        named += ["everyday=en"] if self.everyday == "en" else []
        if len(named) > 1:
            faults.append("guards.manifest_filepath and guards.everyday=en both name the guard set: leave one out.")
        if named and not self.measures:
            faults.append(f"guards.{named[0]} needs held-out measurements: set guards.every above 0.")
        return faults
