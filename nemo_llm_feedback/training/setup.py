"""Prepares training before the first step: settings, data, frozen reference, LLM, pool statistics, reward."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm_feedback.asr.heads import Head, Vocabulary, band_of, heads_of
from nemo_llm_feedback.asr.look_ahead import keep_look_ahead
from nemo_llm_feedback.asr.lora import choose_parameters
from nemo_llm_feedback.asr.reference import FrozenReference
from nemo_llm_feedback.core.config import ProposalConfig, RunConfig, parse_run_config
from nemo_llm_feedback.core.config.compose import with_defaults
from nemo_llm_feedback.core.config.faults import refuse
from nemo_llm_feedback.core.config.sections import AUGMENTED_OBJECTIVES
from nemo_llm_feedback.core.errors import (
    ConfigError,
    FeedbackError,
    LLMError,
    ManifestError,
    RewardError,
    TrainingError,
    list_faults,
)
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.data.batches import BatchReader, training_config
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.data.resumable_loader import run_seed
from nemo_llm_feedback.data.staging import Staged, stage
from nemo_llm_feedback.hypotheses.external import ExternalTexts
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.hypotheses.nbest import NBestCache
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.hypotheses.spelling import spelled, unwritable
from nemo_llm_feedback.hypotheses.trust import Trust
from nemo_llm_feedback.llm import check_llm_folder, open_llm
from nemo_llm_feedback.llm.chat import dated, today
from nemo_llm_feedback.rewards import Reward, corrector_from_config, reward_faults, reward_from_config
from nemo_llm_feedback.training.distributed import CollectiveBlock, gather, local_lengths, num_ranks
from nemo_llm_feedback.training.inputs import (
    everyday_rows,
    labelled_rows,
    nemo_faults,
    rates_to_try,
    set_optimizer,
    set_validation,
)
from nemo_llm_feedback.training.pool import EncodedAudio, measure_pool
from nemo_llm_feedback.training.state import Feedback, FeedbackSetup, Generation, PoolStatistics, Settings
from nemo_llm_feedback.training.weights import holding, snapshot

# Best-rewarded texts that are longer or shorter than the recogniser's by more than this factor call for another β.
_LENGTH_TOLERANCE = 1.2


def build_setup(model: Any, cfg: Any, *, work_dir: str | Path | None, judge: Reward | None = None) -> FeedbackSetup:
    """Checks settings and data, and gives the model its optimizer, parameters and loaders.

    Args:
        model: a model of :mod:`nemo_llm_feedback.training.models`, in its starting weights.
        cfg: mapping or OmegaConf config of the sections of ``adapt``; what is absent has its default.
        work_dir: folder of the run; a temporary one if None.
        judge: a reward from Python in place of the section ``reward``.

    Raises:
        ConfigError, LLMError, ManifestError: every fault found, before any work.
    """
    tree = with_defaults(cfg)
    settings = check_settings(tree, judge)
    config, rates = _with_augmentation(settings.config, model), settings.rates
    keep_alive = None
    if work_dir is None:
        keep_alive = tempfile.TemporaryDirectory(prefix="nemo_llm_feedback_")
        work_dir = keep_alive.name
    train_ds = tree["model"].get("train_ds") or {}
    train_ds = {**train_ds, "sample_rate": train_ds.get("sample_rate") or int(model.cfg.preprocessor.sample_rate)}
    local_lengths(model)
    model._skip_nan_grad = False  # NeMo's; it clears the gradients before the guard sees that they are not finite
    if config.feedback.look_ahead is not None:
        keep_look_ahead(model.encoder, config.feedback.look_ahead)
    band = band_of(model, config.feedback.band_tolerance)
    if band is not None:
        logging.info(
            f"improbable cells of the transducer lattice are left out: log p of a hypothesis loses at most "
            f"{band.tolerance:g} nat, which every call certifies (feedback.band_tolerance=0: exact)."
        )
    limits: dict[str, Any] = {
        "which": config.feedback.heads,
        "memory_budget_mb": config.feedback.memory_budget_mb,
        "band": band,
    }
    heads = heads_of(model, **limits)
    if config.wants_samples and len(heads) > 1:
        raise ConfigError(
            f"objective.name={config.objective.name} estimates over a head's samples, and the groups of a hybrid "
            "are sampled from one head only: set feedback.heads=transducer or feedback.heads=ctc."
        )
    vocabulary = heads[0].vocabulary
    staged = stage(
        train_ds,
        Path(work_dir) / "manifests",
        use_text=config.feedback.use_text,
        on_bad_audio=config.feedback.on_bad_audio,
        labelled=config.labelled,
        held_out=config.guards.held_out_utterances if config.guards.measures else 0,
        held_out_share=config.guards.held_out,
        spell=lambda text: spelled(text, vocabulary),
        progress=logging.info,
    )
    _check_rows(staged, config)
    warn_of_terms([*config.context.load().terms, *(t for row in staged.rows for t in row.context.terms)], vocabulary)
    warn_of_external(staged.rows, vocabulary, config.proposals, config.feedback.normalizer)
    set_optimizer(model, tree["model"], rates=rates)
    set_validation(model, tree["model"], settings.validation, Path(work_dir) / "validation")
    reference = FrozenReference(model, **limits)
    choose_parameters(model, config.parameters)
    reader, nemo_ds = _training_data(model, train_ds, staged, config)
    everyday = everyday_rows(config, heads[0].vocabulary, replays=reader.replays)
    setup = FeedbackSetup(
        **{**vars(settings), "config": config, "guard_rows": settings.guard_rows or everyday},
        everyday=bool(everyday),
        staged=staged,
        reader=reader,
        reference=reference,
        heads=heads,
        head_weights=_head_weights(model, heads),
        work_dir=Path(work_dir),
        train_ds=nemo_ds,
        generator=torch.Generator().manual_seed(torch.initial_seed() % 2**31),
        start=snapshot(model),
        keep_alive=keep_alive,
    )
    _check_held_out(setup)
    return setup


def check_precision(precision: Any) -> None:
    """Refuses precisions of Lightning's trainer in which a run cannot be right.

    Float16's gradient scaler overflows on purpose, and fails where all gradients of a step are gone; with weights in
    half precision the audio is rounded too, and is not the audio of the pool's statistics and of the frozen reference.

    Raises:
        ConfigError: such a precision.
    """
    if str(precision) in ("16", "16-mixed", "16-true", "bf16-true"):
        raise ConfigError(f"trainer.precision={precision} is not supported: use bf16-mixed, or 32.")


def check_settings(tree: Mapping[str, Any], judge: Reward | None = None) -> Settings:
    """Checks everything that needs neither the model nor the training manifest.

    Args:
        tree: all sections of ``adapt`` as plain mappings.
        judge: see :func:`build_setup`.

    Raises:
        ConfigError, LLMError, ManifestError, RewardError: every fault of its kind.
    """
    config = parse_run_config(tree if judge is None else {**tree, "reward": {"name": "python"}})
    refuse("the configuration has", nemo_faults(tree))
    rates = rates_to_try(tree["model"], config)
    check_judges(config, judge)
    skip = config.feedback.on_bad_audio == "skip"
    validation = labelled_rows((tree["model"].get("validation_ds") or {}).get("manifest_filepath"), skip=skip)
    guard_rows = [row for rows in labelled_rows(config.guards.manifest_filepath, skip=skip).values() for row in rows]
    return Settings(config=config, rates=rates, validation=validation, guard_rows=tuple(guard_rows), judge=judge)


def check_judges(config: RunConfig, judge: Reward | None) -> None:
    """Refuses an LLM or a reward that cannot be used, before anything is loaded.

    Args:
        config: the run's settings.
        judge: a reward from Python in place of the section ``reward``, which is then not checked.

    Raises:
        LLMError, RewardError: every fault found.
    """
    if config.llm is not None and config.needs_llm and (faults := check_llm_folder(config.llm)):
        raise LLMError(list_faults("the LLM cannot be used:", faults))
    if judge is None and config.needs_reward and (faults := reward_faults(config)):
        raise RewardError(list_faults("the reward cannot be used:", faults))


def _training_data(
    model: Any, train_ds: Mapping[str, Any], staged: Staged, config: RunConfig
) -> tuple[BatchReader, Any]:
    """Gives the model its training loader; returns what splits its batches, and the loader's settings."""
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
        labelled=config.labelled,
        rows=staged.rows,
        skip_bad_audio=config.feedback.on_bad_audio == "skip",
        train_ds=train_ds,
    )
    shown = OmegaConf.create(dict(train_ds))
    try:
        loader = model.set_training_data(nemo_ds, shown=shown, shuffle=bool(train_ds.get("shuffle")))
    except FeedbackError:
        raise
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"NeMo refuses model.train_ds: {' '.join(str(error).split())}") from None
    reader.attach(loader)
    return reader, nemo_ds


def _check_held_out(setup: FeedbackSetup) -> None:
    if setup.config.guards.measures and not setup.staged.held_out:
        logging.warning(
            "no rows are held out (tarred audio, or too few for guards.held_out="
            f"{setup.config.guards.held_out}): the guards watch {len(setup.held_out_rows())} rows that are trained on."
        )
    if setup.config.feedback.generations > 1 and not setup.held_out_rows():
        raise ConfigError(
            "no audio file can be read to choose a teacher by (tarred audio): set feedback.generations=1."
        )
    if setup.rates and not setup.held_out_rows():
        raise ConfigError("no audio file can be read to judge a trial by (tarred audio): set model.optim.lr.")


def _with_augmentation(config: RunConfig, model: Any) -> RunConfig:
    """Settles whether the audio that is learned from is augmented."""
    masks = getattr(model, "spec_augmentation", None) is not None
    asked = [key for key in ("augment", "replay_augment") if getattr(config.feedback, key)]
    if asked and not masks:
        raise ConfigError(f"feedback.{asked[0]} needs a checkpoint with a spec_augment section; this one has none.")
    settled: dict[str, Any] = {
        "augment": masks and config.objective.name in AUGMENTED_OBJECTIVES,
        "replay_augment": masks,
    }
    left_open = {key: value for key, value in settled.items() if getattr(config.feedback, key) is None}
    return replace(config, feedback=replace(config.feedback, **left_open))


def check_starts(checkpoint: str | Path | None) -> None:
    """Raises a TrainingError on every rank unless all go on from the same checkpoint, or none does."""
    starts = {Path(path).name if path else "none" for path in gather(checkpoint)}
    if len(starts) > 1:
        raise TrainingError(
            f"the ranks start from different checkpoints ({', '.join(sorted(starts))}): name the run to go on with by "
            "exp_manager.explicit_log_dir=FOLDER exp_manager.resume_if_exists=true."
        )


def start(
    model: Any, setup: FeedbackSetup, pool: Callable[[], Iterable[EncodedAudio]], known: Mapping[str, Any] | None
) -> Feedback:
    """Places the reference, opens the LLM, measures the pool, and makes proposer and reward by what was found.

    Args:
        model: the model, on its device.
        setup: what :func:`build_setup` gave.
        pool: gives the batches of this rank's share of the pool.
        known: what a checkpoint of a resumed run holds (``Feedback.to_plain``).
    """
    setup.reference.to(model.device)
    config = setup.config
    generation = Generation(**(known or {}).get("generation", {}))
    with holding(model, generation.weights):
        teacher = setup.reference.retaken(model) if generation.weights else setup.reference
    tdt = any(getattr(head, "durations", ()) for head in heads_of(model))
    exact = tdt and model.device.type == "cpu"
    if exact and (setup.staged.num_labelled or config.objective.name == "self_training"):
        logging.warning(
            "NeMo has no TDT loss on the CPU: labelled rows use the exact log-likelihood (no sigma, no omega)."
        )
    cache = NBestCache()
    statistics = PoolStatistics(**known["statistics"]) if known and known["statistics"] else None
    day = (known or {}).get("chat_date") or gather(today())[0]
    with CollectiveBlock(), dated(day):  # an LLM that one rank cannot load must not leave the others waiting
        build, scorer = _maker_builder(setup)
        if scorer is not None and num_ranks() > 1 and (statistics is not None or not config.needs_reward):
            scorer.load()  # a rank that fails to load in mid-training would leave the others waiting
    if statistics is None and config.needs_reward:
        statistics = measured(setup, pool(), lambda settings: build(settings, teacher), cache)
    if statistics is not None:
        config = statistics.applied_to(config)
    maker = build(config, teacher)
    if scorer is not None:
        rate = float(getattr(maker.reward, "hit_rate", float("nan")))
        cached = f"{100 * rate:.1f} % of the scores came from the cache; " if rate == rate else ""
        state = "loaded" if scorer.loaded else "not loaded until a score is not in the cache"
        logging.info(f"{cached}the LLM is {state}.")
    extra = {"maker": maker, "statistics": statistics, "scorer": scorer, "exact_supervision": exact}
    extra |= {"cache": cache, "chat_date": day, "build": build, "teacher": teacher, "generation": generation}
    return Feedback(**{**vars(setup), "config": config, **extra})


def measured(
    setup: FeedbackSetup, pool: Iterable[EncodedAudio], build: Callable[[RunConfig], NBestMaker], cache: NBestCache
) -> PoolStatistics:
    """Measures the pool by the run's settings.

    Args:
        setup: the run's set-up.
        pool: batches of this rank's share.
        build: settings → what makes N-best lists by them.
        cache: gets the groups, which are those of the first refresh.

    Raises:
        TrainingError, RewardError: no group has a signal to learn from.
    """
    config = setup.config
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        keep = None if config.on_policy else cache
        statistics = measure_pool(pool, build, config, head=setup.heads[0].name, keep=keep)
    _report(statistics, config)
    return statistics


def _maker_builder(setup: FeedbackSetup) -> tuple[Callable[[RunConfig, FrozenReference], NBestMaker], Any]:
    """What makes an N-best maker by settings that differ in the pool's scales only and a teacher, and the LLM."""
    given = setup.config
    scorer = None
    if given.needs_llm:
        assert given.llm is not None
        scorer = open_llm(given.llm)  # its weights are loaded at the first score that the cache lacks
    corrector = corrector_from_config(given, scorer) if given.proposals.llm_correction else None
    base: Any = setup.judge
    if base is None and given.needs_reward:
        # Scores are kept in the run's folder unless the configuration names another place.
        cache = given.reward.cache or str(setup.work_dir / "llm_scores.sqlite")
        base = reward_from_config(replace(given, reward=replace(given.reward, cache=cache)), scorer)
    normalize = get_normalizer(given.feedback.normalizer)

    def build(config: RunConfig, teacher: FrozenReference) -> NBestMaker:
        """The maker by these settings."""
        reward, proposals = base, config.proposals
        if config.objective.source:  # what is learned is the source's best text
            proposals = replace(proposals, external=1)
        if config.reward.weights != given.reward.weights:
            alpha, beta = config.reward.weights
            reward = base.with_weights(alpha=alpha, beta=beta)
        return NBestMaker(
            Proposer(setup.heads[0], proposals, generator=setup.generator, copies=given.wants_samples),
            teacher,
            normalize=normalize,
            reward=reward,
            corrector=corrector,
            trust=Trust.of(config.reward) if given.needs_reward else None,
        )

    return build, scorer


def _report(statistics: PoolStatistics, config: RunConfig) -> None:
    """Logs what was measured, and what it warns of.

    Raises:
        TrainingError: no group has a reward signal.
    """
    logging.info(f"statistics of the pool: {statistics}")
    if not (1 / _LENGTH_TOLERANCE <= statistics.length_ratio <= _LENGTH_TOLERANCE or config.reward.needs_text):
        way = "lower" if statistics.length_ratio > 1 else "raise"
        now = "" if statistics.beta is None else f" (now {statistics.beta:g})"
        logging.warning(
            f"the best-rewarded texts have {statistics.length_ratio:.2f} times the recogniser's length: "
            f"{way} reward.beta{now}, or the model will learn to change its length."
        )
    if statistics.signal_fraction == 0:
        raise TrainingError(
            "no utterance of the pool has a reward signal: all hypotheses are equal, equally rewarded, "
            "or one of the group cannot be judged (a warning above says why, such as a text too long for the LLM). "
            "Raise proposals.beam or proposals.boosted, add context.terms, or lower objective.min_spread."
        )


def _check_rows(staged: Staged, config: RunConfig) -> None:
    """Refuses a training set that has nothing to learn from, and lists what was left out."""
    if config.needs_reward and config.reward.needs_text:
        without = [r.origin for r in staged.rows if r.unlabeled and not r.text]
        if without:
            raise ManifestError(
                list_faults(
                    f"{len(without)} row(s) have no text, which reward={config.reward.name} compares with: take them "
                    'out, give them "replay": "kl" to hold the model there, or learn from them in a run of their own '
                    "with an LLM's reward:",
                    without,
                )
            )
    if staged.num_unlabeled == 0 and config.feedback.weight > 0:
        raise ManifestError(
            f"all {len(staged.rows)} rows of the training manifest have text or hold the model where it was, so none "
            "is unlabeled. Set feedback.use_text=false to learn from the audio of rows with text alone, or add rows "
            "without."
        )
    if config.objective.source and config.objective.source not in staged.sources:
        raise ConfigError(
            f"objective.label={config.objective.source}: no unlabeled row has `hypotheses` of this source "
            f"(there are {', '.join(staged.sources) or 'none at all'}); known are also reference and reward."
        )
    if config.needs_context:
        bare = [r for r in staged.rows if r.unlabeled and not (config.context.load() or r.context)]
        if bare:
            raise ConfigError(
                f"{len(bare)} unlabeled rows have no context, e.g. {bare[0].origin}; set context.description."
            )
    for why, rows in staged.left_out.items():
        logging.warning(list_faults(f"{len(rows)} row(s) {why} are left out:", rows))


def warn_of_terms(terms: Iterable[str], vocabulary: Vocabulary) -> None:
    """Names the terms that the checkpoint cannot write, in one warning; neither beam nor swaps will propose them."""
    if lost := unwritable(terms, vocabulary):
        head = f"{len(lost)} term(s) have characters that the checkpoint cannot write; list them as they are spoken:"
        logging.warning(list_faults(head, lost))


def warn_of_external(rows: Iterable[Row], vocabulary: Vocabulary, proposals: ProposalConfig, normalizer: str) -> None:
    """Names what other recognisers wrote and the checkpoint cannot write, in one warning."""
    given = [text for row in rows for text in row.external if proposals.external]
    if fault := ExternalTexts(vocabulary, get_normalizer(normalizer), proposals).fault(given):
        logging.warning(fault)


def _head_weights(model: Any, heads: Sequence[Head]) -> dict[str, float]:
    """A hybrid's two heads are mixed as its supervised loss mixes them."""
    ctc = float(getattr(model, "ctc_loss_weight", 0.0))
    return {"transducer": 1.0 - ctc, "ctc": ctc} if len(heads) > 1 else {heads[0].name: 1.0}
