"""Everything before the first step: settings, data, reference, reward, and a look at the pool that sets the scales."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.batches import BatchReader, training_config
from nemo_llm_feedback.config import RewardConfig, RunConfig, parse_run_config
from nemo_llm_feedback.errors import ConfigError, LLMError, ManifestError, TrainingError
from nemo_llm_feedback.groups import GroupMaker, ScoredGroup
from nemo_llm_feedback.heads import Head, heads_of
from nemo_llm_feedback.llm import check_llm_folder, load_llm
from nemo_llm_feedback.manifests import Staged, stage
from nemo_llm_feedback.normalize import get_normalizer, text_length
from nemo_llm_feedback.proposals import Proposer
from nemo_llm_feedback.reference import FrozenReference, encode, evaluation_mode
from nemo_llm_feedback.rewards import LLMReward, Reward, build_reward

# Best-rewarded texts that are longer or shorter than the recogniser's own by more than this factor call for another β.
_LENGTH_TOLERANCE = 1.2


@dataclass(frozen=True)
class Survey:
    """What a look at the pool before training found.

    Attributes:
        utterances: unlabeled rows looked at.
        signal_fraction: share of their groups whose rewards differ.
        members: mean group size.
        spread: component → mean within-group standard deviation, in its unit.
        length_ratio: mean length of the best-rewarded members ÷ of those that the reference finds most probable.
    """

    utterances: int
    signal_fraction: float
    members: float
    spread: dict[str, float]
    length_ratio: float


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
    last_groups: list[ScoredGroup] = field(default_factory=list)
    keep_alive: list[Any] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data."""
        return {
            "survey": asdict(self.survey) if self.survey else None,
            "groups": {name: scored.to_plain() for name, scored in self.maker.kept.items()},
        }

    def load_plain(self, plain: Mapping[str, Any]) -> None:
        """Takes back what :meth:`to_plain` gave."""
        self.survey = Survey(**plain["survey"]) if plain["survey"] else None
        self.maker.kept = {name: ScoredGroup.from_plain(scored) for name, scored in plain["groups"].items()}


def prepare(model: Any, cfg: Any, *, work_dir: str | Path | None) -> FeedbackState:
    """Checks settings and data and builds the state; the LLM is loaded by :func:`start`, on its rank's device.

    Args:
        model: a model of :mod:`nemo_llm_feedback.models`, in its starting weights.
        cfg: mapping or OmegaConf config with ``model.train_ds`` and the plugin's sections.
        work_dir: folder of the run; a temporary one if None.

    Raises:
        ConfigError, LLMError, ManifestError: every fault found, before any work.
    """
    tree: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    config = parse_run_config(tree)
    if config.llm is not None and config.needs_reward and config.reward.name == "llm":
        faults = check_llm_folder(config.llm)
        if faults:
            raise LLMError("the LLM cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))
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
        progress=logging.info,
    )
    _check_rows(staged, config)
    heads = heads_of(model, which=config.feedback.heads)
    reference = FrozenReference(model, which=config.feedback.heads)
    nemo_ds = training_config(
        train_ds,
        manifest_filepath=staged.manifest_filepath,
        global_rank=model.global_rank,
        world_size=model.world_size,
    )
    reader = BatchReader(config.context.load(), use_text=config.feedback.use_text, rows=staged.rows)
    model.setup_training_data(nemo_ds)
    reader.attach(model._train_dl)
    # The model's own config keeps the user's paths: the staged ones are gone when somebody reads the exported file.
    model._update_dataset_config("train", OmegaConf.create(train_ds))
    maker = GroupMaker(
        Proposer(
            heads[0],
            config.proposals,
            seed=torch.initial_seed() % 2**31,
            memory_budget_mb=config.feedback.memory_budget_mb,
        ),
        reference,
        None,
        normalize=get_normalizer(config.feedback.normalizer),
        max_members=config.proposals.max_members,
        memory_budget_mb=config.feedback.memory_budget_mb,
    )
    weights = _head_weights(model, heads)
    return FeedbackState(
        config, staged, reader, reference, heads, weights, maker, folder, nemo_ds, keep_alive=keep_alive
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
    if not config.needs_reward:
        return
    scorer = None
    if config.reward.name == "llm":
        assert config.llm is not None
        scorer = load_llm(config.llm)
        state.llm_bytes = scorer.memory_bytes
    state.maker.reward = make_reward(config, scorer)
    if state.survey is None:
        state.survey = _broadcast(_survey(model, state))
        logging.info(f"survey of the pool: {state.survey}")
        if not 1 / _LENGTH_TOLERANCE <= state.survey.length_ratio <= _LENGTH_TOLERANCE:
            way = "lower" if state.survey.length_ratio > 1 else "raise"
            logging.warning(
                f"the best-rewarded texts have {state.survey.length_ratio:.2f} times the recogniser's length: "
                f"{way} reward.beta (now {config.reward.beta}), or the model will learn to change its length."
            )
        if state.survey.signal_fraction == 0:
            raise TrainingError(
                "no group of the surveyed pool has a reward signal: all hypotheses are equal or equally rewarded. "
                "Raise proposals.beam or proposals.boosted, add context.terms, or lower objective.min_spread."
            )


def make_reward(config: RunConfig, scorer: Any) -> Reward:
    """The reward that the configuration names; ``scorer`` is the loaded LLM, or None where none is needed."""
    settings: RewardConfig = config.reward
    if settings.name == "llm":
        return LLMReward(
            scorer,
            alpha=settings.alpha,
            beta=settings.beta,
            normalize=settings.normalize,
            asr_weight=settings.asr_weight,
            allow_no_context=not config.context.required,
            cache=settings.cache,
        )
    return build_reward(settings.name, allow_dotted=True, **settings.settings)


def _survey(model: Any, state: FeedbackState) -> Survey:
    """Proposes and scores groups of unlabeled rows with the starting model; leaves all random states as they were."""
    wanted = state.config.feedback.survey_utterances
    groups: list[ScoredGroup] = []
    with torch.random.fork_rng(), evaluation_mode(model), torch.no_grad():
        torch.manual_seed(0)
        for batch in model._setup_dataloader_from_config(state.train_ds):
            _, audio = state.reader.split([_to(item, model.device) for item in batch])
            if audio is not None:
                encoded, lengths = encode(model, audio.signal, audio.signal_len)
                groups += state.maker.make(audio, encoded, lengths)
            if len(groups) >= wanted:
                break
    if not groups:
        raise TrainingError(
            "the training loader gave no unlabeled row; check manifests, tar files and length filters."
        )
    first = state.heads[0].name
    spreads = [torch.tensor(g.rewards[first]) for g in groups]
    threshold = state.config.objective.min_spread
    signal = [bool(torch.isfinite(r).all()) and len(r) > 1 and float(r.max() - r.min()) > threshold for r in spreads]
    parts = {
        name: sum(float(torch.tensor(g.parts[name]).std(correction=0).nan_to_num()) for g in groups) / len(groups)
        for name in groups[0].parts
    }
    survey = Survey(
        utterances=len(groups),
        signal_fraction=sum(signal) / len(groups),
        members=sum(len(g.group) for g in groups) / len(groups),
        spread=parts,
        length_ratio=_best_length(groups, [g.rewards[first] for g in groups])
        / max(1.0, _best_length(groups, [g.ref_logp[first] for g in groups])),
    )
    state.work_dir.mkdir(parents=True, exist_ok=True)
    (state.work_dir / "survey.json").write_text(json.dumps(asdict(survey), indent=1) + "\n", encoding="utf-8")
    return survey


def _best_length(groups: Sequence[ScoredGroup], scores: Sequence[Sequence[float]]) -> float:
    """Total length of the members with the best score."""
    best = [torch.tensor(row).nan_to_num(nan=-torch.inf).argmax() for row in scores]
    return float(sum(text_length(g.group.texts[int(n)]) for g, n in zip(groups, best, strict=True)))


def _check_rows(staged: Staged, config: RunConfig) -> None:
    """Refuses a training set that has nothing to learn from, and lists what was left out."""
    if staged.num_labelled == len(staged.rows) and config.feedback.weight > 0:
        raise ManifestError(
            f"all {len(staged.rows)} rows of the training manifest have text, so none is unlabeled. "
            "Set feedback.use_text=false to learn from their audio alone, or add rows without text."
        )
    if config.reward.name == "llm" and config.needs_reward and config.context.required:
        bare = [r for r in staged.rows if not r.text and not (config.context.load() or r.context)]
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


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item


def _broadcast(survey: Survey) -> Survey:
    """Rank 0's survey on every rank: all must train with the same scales."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return survey
    box = [survey]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
