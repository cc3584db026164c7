"""A look at the pool before training: what the groups hold, the LLM's weight, and how strongly terms are boosted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from nemo.utils import logging

from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.hypotheses.reward_scale import component_spread, from_spread

if TYPE_CHECKING:
    from nemo_llm_feedback.training.setup import FeedbackState

# Utterances on which the strength of boosting is chosen.
_BOOSTING_UTTERANCES = 16


@dataclass(frozen=True)
class Survey:
    """What a look at the pool before training found.

    Attributes:
        utterances: unlabeled rows looked at.
        signal_fraction: share of their groups whose rewards differ.
        members: mean group size.
        spread: component → mean within-group standard deviation over judged members, in its unit; NaN = none has two.
        length_ratio: mean length of the best-rewarded members ÷ of those that the reference finds most probable.
        boosting_weight: of the boosting tree: the run's, or the one chosen of ``proposals.boosting_weights``.
        alpha, beta: of the reward: the run's, or with ``reward.alpha`` null those that the pool's spread gave, before
            the strength of boosting was chosen; None for a reward that has none.
    """

    utterances: int
    signal_fraction: float
    members: float
    spread: dict[str, float]
    length_ratio: float
    boosting_weight: float
    alpha: float | None = None
    beta: float | None = None


def survey(model: Any, state: FeedbackState) -> Survey:
    """Proposes and scores groups of unlabeled rows with the starting model, and sets the strength of boosting.

    All random states stay as they were. The result is also written to ``survey.json`` in the run's folder.

    Raises:
        TrainingError: the loader gives no unlabeled row.
    """
    with torch.random.fork_rng(), evaluation_mode(model), torch.no_grad():
        torch.manual_seed(0)
        audio = _some_audio(model, state)
        if state.config.reward.scaled_by_pool:
            _set_scale(model, state, audio)
        state.maker.proposer.boosting_weight = _boosting_weight(model, state, audio)
        groups = [group for part in audio for group in _groups(model, state, part)]
    first = state.heads[0].name
    spreads = [torch.tensor(g.rewards[first]) for g in groups]
    threshold = state.config.objective.min_spread
    signal = [bool(torch.isfinite(r).all()) and len(r) > 1 and float(r.max() - r.min()) > threshold for r in spreads]
    found = Survey(
        utterances=len(groups),
        signal_fraction=sum(signal) / len(groups),
        members=sum(len(g.group) for g in groups) / len(groups),
        spread=component_spread(groups),
        length_ratio=_best_length(groups, [g.rewards[first] for g in groups])
        / max(1.0, _best_length(groups, [g.ref_logp[first] for g in groups])),
        boosting_weight=state.maker.proposer.boosting_weight,
        alpha=state.config.reward.weights[0] if state.config.reward.weighed else None,
        beta=state.config.reward.weights[1] if state.config.reward.weighed else None,
    )
    state.work_dir.mkdir(parents=True, exist_ok=True)
    (state.work_dir / "survey.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return found


def apply_survey(state: FeedbackState) -> None:
    """Gives the run what its survey, perhaps another rank's or an earlier process's, has set."""
    found = state.survey
    assert found is not None
    state.maker.proposer.boosting_weight = found.boosting_weight
    if found.alpha is None or found.beta is None or state.maker.reward is None:
        return
    if (found.alpha, found.beta) != state.config.reward.weights:
        _weigh(state, found.alpha, found.beta)


def _set_scale(model: Any, state: FeedbackState, audio: Sequence[Audio]) -> None:
    """α, and β unless it is given, from the spread within groups that are proposed with the run's boosting weight."""
    config = state.config.reward
    spread = component_spread([group for part in audio for group in _groups(model, state, part)])
    part = config.weighed_part
    alpha, beta = from_spread(spread, factor=config.spread_factor, asr_weight=config.asr_weight, part=part)
    beta = beta if config.beta is None else config.beta
    logging.info(
        f"reward.alpha={alpha:g} reward.beta={beta:g}, by the spread within groups of the pool: {part} "
        f"{spread[part]:.2f} nat, recogniser {spread['asr']:.2f} nat, reward.spread_factor={config.spread_factor:g}."
    )
    _weigh(state, alpha, beta)


def _weigh(state: FeedbackState, alpha: float, beta: float) -> None:
    reward: Any = state.maker.reward
    state.maker.reward = reward.with_weights(alpha=alpha, beta=beta)
    state.config = replace(state.config, reward=replace(state.config.reward, alpha=alpha, beta=beta))


def fill_round(model: Any, state: FeedbackState, *, round: int) -> None:
    """Makes the groups of every unlabeled row of the pool, for runs that score in a phase of its own.

    The LLM's weights are in memory only meanwhile. Rows whose groups are of this round already are left alone. New
    groups remember the log p of the policy that proposed them now: at their first use it will have moved.
    """
    with torch.random.fork_rng(), evaluation_mode(model), torch.no_grad():
        torch.manual_seed(round)
        for audio in pool_audio(model, state):
            encoded, lengths = encode(model, audio.signal, audio.signal_len)
            groups = state.maker.get(audio, encoded, lengths, round=round)
            for head in state.heads:
                groups = model._with_old_logp(groups, model._group_logp(head, encoded, lengths, groups), head.name)
    if state.scorer is not None:
        state.scorer.unload()


def _boosting_weight(model: Any, state: FeedbackState, audio: Sequence[Audio]) -> float:
    """The strength whose groups have the best members by the reward, which holds the frozen ASR score and so turns
    down what is boosted against the audio; the weakest of equals."""
    config = state.config.proposals
    tried = sorted(config.boosting_weights)
    if not config.boosted or not tried or not any(c.terms for part in audio for c in part.contexts):
        return config.boosting_weight
    first, best = state.heads[0].name, {}
    few = list(itertools.takewhile(lambda part: part[0] < _BOOSTING_UTTERANCES, _counted(audio)))
    for weight in tried:
        state.maker.proposer.boosting_weight = weight
        rewards = [g.rewards[first] for _, part in few for g in _groups(model, state, part)]
        finite = [max(v for v in row if v == v) for row in rewards if any(v == v for v in row)]
        best[weight] = sum(finite) / max(1, len(finite))
    chosen = max(tried, key=lambda weight: round(best[weight], 1))
    listed = ", ".join(f"{weight}: {value:.2f}" for weight, value in best.items())
    logging.info(f"boosting weight {chosen}, by the mean best reward of {listed}.")
    return chosen


def _counted(audio: Sequence[Audio]) -> Iterator[tuple[int, Audio]]:
    """Each part with the number of utterances before it."""
    before = 0
    for part in audio:
        yield before, part
        before += len(part.utterances)


def _groups(model: Any, state: FeedbackState, audio: Audio) -> list[ScoredGroup]:
    return state.maker.make(audio, *encode(model, audio.signal, audio.signal_len))


def _some_audio(model: Any, state: FeedbackState) -> list[Audio]:
    """Unlabeled rows until the survey has enough."""
    found: list[Audio] = []
    for audio in pool_audio(model, state):
        found.append(audio)
        if sum(len(part.utterances) for part in found) >= state.config.feedback.pool_utterances:
            return found
    if not found:
        raise TrainingError(
            "the training loader gave no unlabeled row; check manifests, tar files and length filters."
        )
    return found


def pool_audio(model: Any, state: FeedbackState) -> Iterator[Audio]:
    """The pool's unlabeled rows, by a loader of its own."""
    for batch in model._setup_dataloader_from_config(state.train_ds):
        audio = state.reader.split([_to(item, model.device) for item in batch]).audio
        if audio is not None:
            yield audio


def _best_length(groups: Sequence[ScoredGroup], scores: Sequence[Sequence[float]]) -> float:
    """Total length of the members with the best score."""
    best = [torch.tensor(row).nan_to_num(nan=-torch.inf).argmax() for row in scores]
    return float(sum(text_length(g.group.texts[int(n)]) for g, n in zip(groups, best, strict=True)))


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item
