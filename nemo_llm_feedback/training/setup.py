"""Everything before the first step: settings, data, reference, reward, and a look at the pool that sets the scales."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.asr.heads import Head, heads_of
from nemo_llm_feedback.asr.likelihood import Band
from nemo_llm_feedback.asr.lora import choose_parameters
from nemo_llm_feedback.asr.reference import FrozenReference
from nemo_llm_feedback.core.config import RunConfig, parse_run_config
from nemo_llm_feedback.core.config.sections import AUGMENTED_OBJECTIVES
from nemo_llm_feedback.core.errors import ConfigError, LLMError, ManifestError, RewardError, TrainingError
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.data.batches import BatchReader, training_config
from nemo_llm_feedback.data.manifests import Staged, stage
from nemo_llm_feedback.data.resumable_loader import resumable, run_seed
from nemo_llm_feedback.hypotheses.groups import GroupMaker, ScoredGroup
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.llm import check_llm_folder, open_llm
from nemo_llm_feedback.rewards import Reward, corrector_from_config, reward_faults, reward_from_config
from nemo_llm_feedback.training.distributed import Together, broadcast, gather, local_lengths, num_ranks
from nemo_llm_feedback.training.resume import random_states, set_random_states
from nemo_llm_feedback.training.survey import Survey, apply_survey, survey

# Best-rewarded texts that are longer or shorter than the recogniser's own by more than this factor call for another β.
_LENGTH_TOLERANCE = 1.2


@dataclass
class FeedbackState:
    """All that the feedback needs beside the model; a plain holder, so no module in it is registered."""

    config: RunConfig
    staged: Staged
    reader: BatchReader
    reference: FrozenReference
    heads: list[Head]
    head_weights: dict[str, float]
    maker: GroupMaker
    work_dir: Path
    train_ds: DictConfig
    exact_supervision: bool = False
    survey: Survey | None = None
    llm_bytes: int = 0
    scorer: Any = None
    filled_round: int = -1
    last_groups: list[ScoredGroup] = field(default_factory=list)
    keep_alive: list[Any] = field(default_factory=list)
    random: list[dict[str, Any]] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data; the same on all ranks, each of which must call this."""
        groups = {name: scored.to_plain() for name, scored in self.maker.kept.items()}
        ranks = gather((groups, random_states([self.maker.generator])))
        return {
            "survey": asdict(self.survey) if self.survey else None,
            "groups": [groups for groups, _ in ranks],
            "random": [states for _, states in ranks],
        }

    def load_plain(self, plain: Mapping[str, Any], *, rank: int) -> None:
        """Takes back what :meth:`to_plain` gave; with another number of ranks, all take the groups of all."""
        self.survey = Survey(**plain["survey"]) if plain["survey"] else None
        own = plain["groups"][rank : rank + 1] if len(plain["groups"]) == num_ranks() else plain["groups"]
        self.maker.kept = {name: ScoredGroup.from_plain(scored) for kept in own for name, scored in kept.items()}
        self.random = plain["random"]

    def restore_random(self, *, rank: int) -> None:
        """Takes up the random states of a loaded checkpoint; with another number of ranks there is none to take up."""
        if len(self.random) == num_ranks():
            set_random_states(self.random[rank], [self.maker.generator])
        self.random = []


def prepare(model: Any, cfg: Any, *, work_dir: str | Path | None) -> FeedbackState:
    """Checks settings and data and builds the state; the LLM is loaded by :func:`start`, on its rank's device.

    Args:
        model: a model of :mod:`nemo_llm_feedback.training.models`, in its starting weights.
        cfg: mapping or OmegaConf config with ``model.train_ds`` and the plugin's sections.
        work_dir: folder of the run; a temporary one if None.

    Raises:
        ConfigError, LLMError, ManifestError: every fault found, before any work.
    """
    tree: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    config = parse_run_config(tree)
    config = _with_augmentation(config, model)
    if config.llm is not None and config.needs_llm:
        faults = check_llm_folder(config.llm)
        if faults:
            raise LLMError("the LLM cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))
    if config.needs_reward and (faults := reward_faults(config)):
        raise RewardError("the reward cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))
    train_ds = tree.get("model", {}).get("train_ds") or {}
    keep_alive: list[Any] = []
    if work_dir is None:
        temporary = tempfile.TemporaryDirectory(prefix="nemo_llm_feedback_")
        keep_alive.append(temporary)
        work_dir = temporary.name
    folder = Path(work_dir)
    staged = stage(
        train_ds,
        folder / "manifests",
        use_text=config.feedback.use_text,
        on_bad_audio=config.feedback.on_bad_audio,
        held_out=config.guards.held_out_utterances if config.guards.looks else 0,
        held_out_share=config.guards.held_out,
        progress=logging.info,
    )
    _check_rows(staged, config)
    local_lengths(model)
    limits: dict[str, Any] = {
        "which": config.feedback.heads,
        "memory_budget_mb": config.feedback.memory_budget_mb,
        "band": Band(config.feedback.band_tolerance) if config.feedback.band_tolerance else None,
    }
    heads = heads_of(model, **limits)
    if config.wants_samples and len(heads) > 1:
        raise ConfigError(
            f"objective.name={config.objective.name} estimates over a head's own samples, and the groups of a hybrid "
            "are sampled from one head only: set feedback.heads=transducer or feedback.heads=ctc."
        )
    reference = FrozenReference(model, **limits)
    choose_parameters(model, config.parameters)
    nemo_ds = training_config(
        train_ds,
        manifest_filepath=staged.manifest_filepath,
        global_rank=model.global_rank,
        world_size=model.world_size,
        seed=run_seed(),
    )
    reader = BatchReader(
        config.context.load(),
        use_text=config.feedback.use_text,
        labelled=config.feedback.labelled,
        rows=staged.rows,
    )
    model.setup_training_data(nemo_ds)
    reader.attach(model._train_dl)
    model._train_dl = resumable(
        model._train_dl,
        rank=model.global_rank,
        num_ranks=model.world_size,
        shuffle=bool(train_ds.get("shuffle")),
    )
    # The model's own config keeps the user's paths: the staged ones are gone when somebody reads the exported file.
    model._update_dataset_config("train", OmegaConf.create(train_ds))
    maker = _group_maker(heads[0], reference, config)
    weights = _head_weights(model, heads)
    return FeedbackState(
        config, staged, reader, reference, heads, weights, maker, folder, nemo_ds, keep_alive=keep_alive
    )


def _with_augmentation(config: RunConfig, model: Any) -> RunConfig:
    """Settles whether the audio that is learned from is augmented."""
    masks = getattr(model, "spec_augmentation", None) is not None
    asked = [key for key in ("augment", "replay_augment") if getattr(config.feedback, key)]
    if asked and not masks:
        raise ConfigError(f"feedback.{asked[0]} needs a checkpoint with a spec_augment section; this one has none.")
    if config.feedback.augment is not None:
        return config
    augment = masks and config.objective.name in AUGMENTED_OBJECTIVES
    return replace(config, feedback=replace(config.feedback, augment=augment))


def _group_maker(head: Head, reference: FrozenReference, config: RunConfig) -> GroupMaker:
    """The maker of the run's groups; the reward comes to it when the run starts."""
    seed = torch.initial_seed() % 2**31
    return GroupMaker(
        Proposer(head, config.proposals, seed=seed),
        reference,
        None,
        normalize=get_normalizer(config.feedback.normalizer),
        max_members=config.proposals.max_members,
    )


def check_starts(checkpoint: str | Path | None) -> None:
    """Raises a TrainingError on every rank unless all go on from the same checkpoint, or none does."""
    starts = {Path(path).name if path else "none" for path in gather(checkpoint)}
    if len(starts) > 1:
        raise TrainingError(
            f"the ranks start from different checkpoints ({', '.join(sorted(starts))}): name the run to go on with by "
            "exp_manager.explicit_log_dir=FOLDER exp_manager.resume_if_exists=true."
        )


def start(model: Any, state: FeedbackState) -> None:
    """Places the reference, loads the LLM, and surveys the pool unless a resumed run already has."""
    state.reference.to(model.device)
    tdt = any(getattr(head, "durations", ()) for head in heads_of(model))
    state.exact_supervision = tdt and model.device.type == "cpu"
    if state.exact_supervision and (state.staged.num_labelled or state.config.objective.name == "self_training"):
        logging.warning(
            "NeMo has no TDT loss on the CPU: labelled rows use the exact log-likelihood (no sigma, no omega)."
        )
    config = state.config
    if not (config.needs_reward or config.needs_llm):
        return
    known = state.survey is not None or not config.needs_reward
    with Together():  # an LLM that one rank cannot load must not leave the others waiting
        scorer = None
        if config.needs_llm:
            assert config.llm is not None
            scorer = open_llm(config.llm)  # its weights are loaded at the first score that the cache lacks …
            if known and num_ranks() > 1:
                scorer.load()  # … but a rank that fails to load in mid-training would leave the others waiting
        if config.proposals.llm_correction:
            state.maker.corrector = corrector_from_config(config, scorer)
        if config.needs_reward:
            state.maker.reward = make_reward(_with_cache(config, state.work_dir), scorer)
        if not known:
            state.survey = survey(model, state)
        if scorer is not None:
            state.llm_bytes = scorer.memory_bytes
            state.scorer = scorer
            logging.info(_cache_line(scorer.loaded, state.maker.reward))
    # Rank 0's: all must train with the same scales.
    state.survey = broadcast(state.survey)
    if state.survey is not None:
        apply_survey(state)
    if not known:
        assert state.survey is not None
        logging.info(f"survey of the pool: {state.survey}")
        if not 1 / _LENGTH_TOLERANCE <= state.survey.length_ratio <= _LENGTH_TOLERANCE:
            way = "lower" if state.survey.length_ratio > 1 else "raise"
            now = "" if state.survey.beta is None else f" (now {state.survey.beta:g})"
            logging.warning(
                f"the best-rewarded texts have {state.survey.length_ratio:.2f} times the recogniser's length: "
                f"{way} reward.beta{now}, or the model will learn to change its length."
            )
        if state.survey.signal_fraction == 0:
            raise TrainingError(
                "no group of the surveyed pool has a reward signal: all hypotheses are equal or equally rewarded. "
                "Raise proposals.beam or proposals.boosted, add context.terms, or lower objective.min_spread."
            )


def make_reward(config: RunConfig, scorer: Any) -> Reward:
    """The reward that the configuration names; ``scorer`` is the loaded LLM, or None where none is needed."""
    return reward_from_config(config, scorer)


def _with_cache(config: RunConfig, folder: Path) -> RunConfig:
    """Scores are kept in the run's folder unless the configuration names another place."""
    cache = config.reward.cache or str(folder / "llm_scores.sqlite")
    return replace(config, reward=replace(config.reward, cache=cache))


def _cache_line(loaded: bool, reward: Any) -> str:
    rate = float(getattr(reward, "hit_rate", float("nan")))
    known = f"{100 * rate:.1f} % of the scores came from the cache; " if rate == rate else ""
    return known + ("the LLM is loaded." if loaded else "the LLM is not loaded until a score is not in the cache.")


def _check_rows(staged: Staged, config: RunConfig) -> None:
    """Refuses a training set that has nothing to learn from, and lists what was left out."""
    if staged.num_unlabeled == 0 and config.feedback.weight > 0:
        raise ManifestError(
            f"all {len(staged.rows)} rows of the training manifest have text or hold the model where it was, so none "
            "is unlabeled. Set feedback.use_text=false to learn from the audio of rows with text alone, or add rows "
            "without."
        )
    if config.needs_context:
        bare = [r for r in staged.rows if r.unlabeled and not (config.context.load() or r.context)]
        if bare:
            raise ConfigError(
                f"{len(bare)} unlabeled rows have no context, e.g. {bare[0].origin}; set context.description."
            )
    for what, rows in (("over max_duration", staged.too_long), ("under min_duration", staged.too_short)):
        if rows:
            listed = "".join(f"\n  {row.origin}: {row.duration:.2f} s" for row in rows)
            logging.warning(f"{len(rows)} row(s) {what} are left out:{listed}")
    if staged.bad_audio:
        listed = "".join(f"\n  {reason}" for reason in staged.bad_audio)
        logging.warning(f"{len(staged.bad_audio)} row(s) with unreadable audio are left out:{listed}")


def _head_weights(model: Any, heads: Sequence[Head]) -> dict[str, float]:
    """A hybrid's two heads are mixed as its supervised loss mixes them."""
    if len(heads) == 1:
        return {heads[0].name: 1.0}
    ctc = float(model.ctc_loss_weight)
    return {"transducer": 1.0 - ctc, "ctc": ctc}
