"""Measures the unlabeled pool before training, and scores all of it between steps where the LLM has to wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from nemo.utils import logging
from torch import Tensor
from torch.utils.data import IterableDataset

from nemo_llm_feedback.core import console
from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.reward_scale import component_deviations, component_spread, from_spread
from nemo_llm_feedback.training.distributed import CollectiveBlock, gather, num_ranks
from nemo_llm_feedback.training.group_math import signal
from nemo_llm_feedback.training.state import Feedback, PoolStatistics

# Utterances on which the strength of boosting is chosen.
_BOOSTING_UTTERANCES = 16


class EncodedAudio(NamedTuple):
    """A batch of the pool: audio, [B, D, T] encoder output, [B] frames."""

    audio: Audio
    encoded: Tensor
    lengths: Tensor


def measure_pool(
    pool: Iterable[EncodedAudio], build: Callable[[RunConfig], NBestMaker], config: RunConfig, *, head: str
) -> PoolStatistics:
    """Proposes and scores hypotheses of unlabeled rows with the starting model, and finds the scales of the run.

    Nothing is changed; :meth:`PoolStatistics.applied_to` gives the settings that follow. Every rank measures its
    share, and all get the same statistics, of all shares together.

    Args:
        pool: batches of this rank's share.
        build: settings → what makes N-best lists by them.
        config: the run's settings.
        head: the head whose rewards are read.

    Raises:
        TrainingError: there is no unlabeled row.
        RewardError: no spread to set reward.alpha by.
    """
    with CollectiveBlock() as ranks:
        share = _enough(pool, most=-(-config.feedback.pool_utterances // num_ranks()))
        ranks.mine = sum(len(part.audio.utterances) for part in share)
    if not sum(ranks.all):
        raise TrainingError("the training loader gave no unlabeled row; check manifests, tar files, length filters.")
    if config.reward.scaled_by_pool:
        config = _with_scale(share, build(config), config)
    config = _with_boosting(share, build, config, head=head)
    with CollectiveBlock() as ranks:
        ranks.mine = _summary(share, build(config), config, head=head)
    found = [summary for summary in ranks.all if summary["utterances"]]
    total = {name: sum(s[name] for s in found) for name in ("utterances", "signal", "members", "best", "reference")}
    weights = config.reward.weights if config.reward.weighed else (None, None)
    return PoolStatistics(
        utterances=int(total["utterances"]),
        signal_fraction=total["signal"] / total["utterances"],
        members=total["members"] / total["utterances"],
        spread=component_spread(_joined([s["deviations"] for s in found])),
        length_ratio=total["best"] / max(1.0, total["reference"]),
        boosting_weight=config.proposals.boosting_weight,
        alpha=weights[0],
        beta=weights[1],
    )


def _enough(pool: Iterable[EncodedAudio], *, most: int) -> list[EncodedAudio]:
    """Batches until they hold enough utterances."""
    share: list[EncodedAudio] = []
    for part in pool:
        share.append(part)
        if sum(len(known.audio.utterances) for known in share) >= most:
            break
    return share


def _joined(deviations: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Component → the deviations of all batches or ranks."""
    names = dict.fromkeys(name for found in deviations for name in found)
    return {name: [value for found in deviations for value in found.get(name, [])] for name in names}


def _summary(share: Sequence[EncodedAudio], maker: NBestMaker, config: RunConfig, *, head: str) -> dict[str, Any]:
    """This rank's sums for the statistics."""
    batches = [maker.make(*part) for part in console.track(share, "measuring the pool")]
    spread = config.objective.min_spread
    return {
        "utterances": sum(map(len, batches)),
        "signal": sum(int(signal(b.rewards[head], b.mask, min_spread=spread).sum()) for b in batches),
        "members": sum(sum(b.sizes) for b in batches),
        "deviations": _joined([component_deviations(b) for b in batches]),
        "best": sum(_best_length(b, b.rewards[head]) for b in batches),
        "reference": sum(_best_length(b, b.ref_logp[head]) for b in batches),
    }


def _best_length(nbest: NBestBatch, scores: Tensor) -> int:
    """Total length of the members with the best of [B, N] scores."""
    best = scores.nan_to_num(nan=-torch.inf).masked_fill(~nbest.mask, -torch.inf).argmax(dim=1).tolist()
    return sum(text_length(texts[n]) for texts, n in zip(nbest.texts, best, strict=True))


def _with_scale(share: Sequence[EncodedAudio], maker: NBestMaker, config: RunConfig) -> RunConfig:
    """α, and β unless it is given, from the spread within groups that are proposed with the run's boosting weight."""
    settings = config.reward
    with CollectiveBlock() as ranks:
        ranks.mine = _joined(
            [component_deviations(maker.make(*part)) for part in console.track(share, "measuring the rewards")]
        )
    spread, part = component_spread(_joined(ranks.all)), settings.weighed_part
    alpha, beta = from_spread(spread, settings)
    logging.info(
        f"reward.alpha={alpha:g} reward.beta={beta:g}, by the spread within groups of the pool: {part} "
        f"{spread[part]:.2f} nat, recogniser {spread['asr']:.2f} nat, reward.spread_factor={settings.spread_factor:g}."
    )
    return replace(config, reward=replace(settings, alpha=alpha, beta=beta))


def _with_boosting(
    share: Sequence[EncodedAudio], build: Callable[[RunConfig], NBestMaker], config: RunConfig, *, head: str
) -> RunConfig:
    """The strength of boosting whose groups have the best members by the reward; the weakest of equals.

    The reward holds the frozen ASR score and so turns down what is boosted against the audio.
    """
    settings, tried = config.proposals, sorted(config.proposals.boosting_weights)
    with CollectiveBlock() as ranks:
        ranks.mine = any(context.terms for part in share for context in part.audio.contexts)
    if not settings.boosted or not tried or not any(ranks.all):
        return config
    counts = itertools.accumulate((len(part.audio.utterances) for part in share), initial=0)
    few = [part for part, before in zip(share, counts, strict=False) if before < _BOOSTING_UTTERANCES]
    by_weight = [replace(config, proposals=replace(settings, boosting_weight=weight)) for weight in tried]
    with CollectiveBlock() as ranks:
        ranks.mine = [
            _best_rewards(few, build(changed), head=head)
            for changed in console.track(by_weight, "choosing the boosting", unit="weights")
        ]
    joined = [[value for found in ranks.all for value in found[k]] for k in range(len(tried))]
    means = [sum(values) / max(1, len(values)) for values in joined]
    best = max(range(len(tried)), key=lambda k: round(means[k], 1))
    listed = ", ".join(f"{weight}: {value:.2f}" for weight, value in zip(tried, means, strict=True))
    logging.info(f"boosting weight {tried[best]}, by the mean best reward of {listed}.")
    return by_weight[best]


def _best_rewards(share: Sequence[EncodedAudio], maker: NBestMaker, *, head: str) -> list[float]:
    """The best reward of each utterance that has a judged member."""
    rows = [row[~row.isnan()] for part in share for row in maker.make(*part).rewards[head]]
    return [float(row.max()) for row in rows if len(row)]


def pool_share(loader: Any, *, rank: int) -> Iterator[Any]:
    """The batches of a loader that are this rank's.

    Lhotse's samplers and tarred data are split over the ranks by NeMo; of the classic loader every rank sees all.
    """
    split = loader.batch_size is None or isinstance(loader.dataset, IterableDataset)
    return itertools.islice(iter(loader), 0 if split else rank, None, 1 if split else num_ranks())


def fill_cache(feedback: Feedback, pool: Iterable[EncodedAudio], *, refresh: int) -> None:
    """Makes the N-best of every unlabeled row, for runs whose LLM works between the steps (``llm.phase=cached``).

    Every rank scores its share and gets those of the others. Rows that are known in this refresh are left alone. New
    members remember the log p of the policy that proposed them now: at their first use it will have moved.

    Args:
        feedback: the run's state.
        pool: batches of this rank's share.
        refresh: index of the refresh.
    """
    with CollectiveBlock():
        for part in pool:
            nbest = feedback.nbest(*part, refresh=refresh)
            logp = {h.name: h.score(part.encoded, part.lengths, nbest.labels) for h in feedback.heads}
            feedback.cache.put(nbest.with_old_logp(logp))
    if num_ranks() > 1:
        for kept in gather(feedback.cache.to_plain()):
            feedback.cache.load_plain(kept)
    feedback.cache.filled = refresh
    if feedback.scorer is not None:
        feedback.scorer.unload()
