"""Measures the unlabeled pool before training, and scores all of it between steps where the LLM has to wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from nemo.utils import logging
from torch import Tensor
from torch.utils.data import IterableDataset

from nemo_llm_feedback.asr.heads import Labels
from nemo_llm_feedback.core import console
from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.text import text_length
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.hypotheses.nbest import NBestBatch, NBestCache
from nemo_llm_feedback.hypotheses.reward_scale import component_deviations, component_spread, from_spread
from nemo_llm_feedback.hypotheses.trust import Contest, SourceTrust, contests, rivals, source_trust, trust_text
from nemo_llm_feedback.training.distributed import CollectiveBlock, gather, num_ranks
from nemo_llm_feedback.training.group_math import signal
from nemo_llm_feedback.training.state import Feedback, PoolStatistics

# Utterances on which the strength of boosting is chosen.
_BOOSTING_UTTERANCES = 16


T = TypeVar("T")


class EncodedAudio(NamedTuple):
    """A batch of the pool: audio, [B, D, T] encoder output, [B] frames."""

    audio: Audio
    encoded: Tensor
    lengths: Tensor

    def select(self, rows: Sequence[int]) -> EncodedAudio:
        """The utterances at these positions, with the padding that they have."""
        chosen = list(rows)
        return EncodedAudio(self.audio.select(chosen), self.encoded[chosen], self.lengths[chosen])


class PoolShare:
    """A rank's rows of the pool. With a strength of boosting their groups are proposed once, and judged as asked.

    Args:
        parts: the batches.
        build: settings → what makes N-best lists by them.
    """

    def __init__(self, parts: Sequence[EncodedAudio], build: Callable[[RunConfig], NBestMaker]) -> None:
        self.parts, self._build = parts, build
        self._made: dict[float, list[NBestBatch]] = {}

    def groups(self, config: RunConfig, label: str, *, batches: int | None = None) -> list[NBestBatch]:
        """The groups of the first batches, or of all, by settings that differ in what the pool sets."""
        maker, made = self._build(config), self._made.setdefault(config.proposals.boosting_weight, [])
        pairs = zip(made[:batches], self.parts, strict=False)
        known = [maker.judged_anew(nbest, part.audio.texts) for nbest, part in pairs]
        missing = self.parts[len(known) : batches]
        if missing:
            with maker.proposer.same_weights():
                made += [maker.make(*part) for part in console.track(missing, label)]
        return known + made[len(known) : batches]

    def contests(self, config: RunConfig, batches: Sequence[NBestBatch], *, head: str) -> dict[str, list[Contest]]:
        """Other recogniser → the contests of its texts in the groups of all batches."""
        if not batches:
            return {}
        maker, nbest = self._build(config), NBestBatch.cat(batches)
        others = rivals(nbest, head=head)
        texts = [[text for of in others.values() for text in of[b]] for b in range(len(nbest))]
        logp: list[dict[Labels, float]] = []
        for part in self.parts:
            logp += maker.reference_scores(part.audio, texts[len(logp) : len(logp) + len(part.audio.utterances)])
        return contests(nbest, others, logp, head=head)


def measure_pool(
    pool: Iterable[EncodedAudio],
    build: Callable[[RunConfig], NBestMaker],
    config: RunConfig,
    *,
    head: str,
    keep: NBestCache | None = None,
) -> PoolStatistics:
    """Proposes and scores hypotheses of unlabeled rows with the starting model, and finds the scales of the run.

    Nothing is changed; :meth:`PoolStatistics.applied_to` gives the settings that follow. Every rank measures its
    share, and all get the same statistics, of all shares together.

    Args:
        pool: batches of this rank's share.
        build: settings → what makes N-best lists by them.
        config: the run's settings.
        head: the head whose rewards are read.
        keep: gets the groups by the settings that follow, for the first refresh.

    Raises:
        TrainingError: there is no unlabeled row.
        RewardError: no spread to set reward.alpha by.
    """
    with CollectiveBlock() as ranks:
        share = PoolShare(_enough(pool, most=-(-config.feedback.pool_utterances // num_ranks())), build)
        ranks.mine = sum(len(part.audio.utterances) for part in share.parts)
    if not sum(ranks.all):
        raise TrainingError("the training loader gave no unlabeled row; check manifests, tar files, length filters.")
    config, trusted = _with_weights(share, config, head=head)
    config = _with_boosting(share, config, head=head)
    with CollectiveBlock() as ranks:
        batches = share.groups(config, "measuring the pool")
        if keep is not None:
            for nbest in batches:
                keep.put(nbest.by_the_start())
        ranks.mine = _summary(batches, config, head=head)
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
        heard=None if trusted is None else {source: found.heard for source, found in trusted.items()},
        trust=config.reward.trust,
    )


def _enough(pool: Iterable[EncodedAudio], *, most: int) -> list[EncodedAudio]:
    """Batches until they hold enough utterances."""
    share: list[EncodedAudio] = []
    for part in pool:
        share.append(part)
        if sum(len(known.audio.utterances) for known in share) >= most:
            break
    return share


def _joined(deviations: Sequence[dict[str, list[T]]]) -> dict[str, list[T]]:
    """Component, or source → what was found in all batches or on all ranks."""
    names = dict.fromkeys(name for found in deviations for name in found)
    return {name: [value for found in deviations for value in found.get(name, [])] for name in names}


def _summary(batches: Sequence[NBestBatch], config: RunConfig, *, head: str) -> dict[str, Any]:
    """This rank's sums for the statistics."""
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


def _with_weights(
    share: PoolShare, config: RunConfig, *, head: str
) -> tuple[RunConfig, dict[str, SourceTrust] | None]:
    """α, β and trust where they are left to the pool, by groups that are proposed with the run's boosting weight."""
    settings = config.reward
    with CollectiveBlock() as ranks:
        ranks.mine = bool(config.proposals.external) and any(any(part.audio.external) for part in share.parts)
    others = settings.trusts_by_pool and any(ranks.all)
    if not (settings.scaled_by_pool or others):
        return config, None
    with CollectiveBlock() as ranks:
        batches = share.groups(config, "measuring the rewards")
        deviations = _joined([component_deviations(nbest) for nbest in batches])
        ranks.mine = deviations, share.contests(config, batches, head=head) if others else {}
    if settings.scaled_by_pool:
        spread, part = component_spread(_joined([found for found, _ in ranks.all])), settings.weighed_part
        alpha, beta = from_spread(spread, settings)
        logging.info(
            f"reward.alpha={alpha:g} reward.beta={beta:g}, by the spread within groups of the pool: {part} "
            f"{spread[part]:.2f} nat, recogniser {spread['asr']:.2f} nat, "
            f"reward.spread_factor={settings.spread_factor:g}."
        )
        settings = replace(settings, alpha=alpha, beta=beta)
    if not others:
        return replace(config, reward=settings), None
    trusted = {source: source_trust(found) for source, found in _joined([of for _, of in ranks.all]).items()}
    logging.info(f"reward.trust, by the pool: {trust_text(trusted)}.")
    settings = replace(settings, trust={source: found.trust for source, found in trusted.items()})
    return replace(config, reward=settings), trusted


def _with_boosting(share: PoolShare, config: RunConfig, *, head: str) -> RunConfig:
    """The strength of boosting whose groups have the best members by the reward; the weakest of equals.

    The reward holds the frozen ASR score and so turns down what is boosted against the audio.
    """
    settings, tried = config.proposals, sorted(config.proposals.boosting_weights)
    with CollectiveBlock() as ranks:
        ranks.mine = any(context.terms for part in share.parts for context in part.audio.contexts)
    if not settings.boosted or not tried or not any(ranks.all):
        return config
    counts = itertools.accumulate((len(part.audio.utterances) for part in share.parts), initial=0)
    few = sum(before < _BOOSTING_UTTERANCES for before, _ in zip(counts, share.parts, strict=False))
    by_weight = [replace(config, proposals=replace(settings, boosting_weight=weight)) for weight in tried]
    with CollectiveBlock() as ranks:
        ranks.mine = [
            _best_rewards(share.groups(changed, f"boosting by {weight}", batches=few), head=head)
            for weight, changed in zip(tried, by_weight, strict=True)
        ]
    joined = [[value for found in ranks.all for value in found[k]] for k in range(len(tried))]
    means = [sum(values) / max(1, len(values)) for values in joined]
    best = max(range(len(tried)), key=lambda k: round(means[k], 1))
    listed = ", ".join(f"{weight}: {value:.2f}" for weight, value in zip(tried, means, strict=True))
    logging.info(f"boosting weight {tried[best]}, by the mean best reward of {listed}.")
    return by_weight[best]


def _best_rewards(batches: Sequence[NBestBatch], *, head: str) -> list[float]:
    """The best reward of each utterance that has a judged member."""
    rows = [row[~row.isnan()] for nbest in batches for row in nbest.rewards[head]]
    return [float(row.max()) for row in rows if len(row)]


def pool_share(loader: Any, *, rank: int) -> Iterator[Any]:
    """The batches of a loader that are this rank's.

    Lhotse's samplers and the classic loader's tarred data are split over the ranks by NeMo; of other classic data and
    of Lhotse's tarred data every rank sees all.
    """
    split = (loader.batch_size is None) != isinstance(loader.dataset, IterableDataset)
    return itertools.islice(iter(loader), 0 if split else rank, None, 1 if split else num_ranks())


def fill_cache(feedback: Feedback, pool: Iterable[EncodedAudio], *, refresh: int) -> None:
    """Makes the N-best of every unlabeled row, for runs whose LLM works between the steps (``llm.phase=cached``).

    Every rank scores its share and gets those of the others. Rows that are known in this refresh are left alone. For
    ratios new members remember now the log p of the policy that proposed them: at their first use it will have moved.

    Args:
        feedback: the run's state.
        pool: batches of this rank's share.
        refresh: index of the refresh.
    """
    feedback.cache.start(refresh)  # also where this rank's share has no unlabeled row
    with CollectiveBlock(), feedback.maker.proposer.same_weights():
        for part in pool:
            nbest = feedback.nbest(*part, refresh=refresh)
            if not feedback.config.on_policy:
                continue
            feedback.cache.put(nbest.with_old_logp(feedback.policy_logp(part.encoded, part.lengths, nbest)))
    if num_ranks() > 1:
        for kept in gather(feedback.cache.to_plain()):
            feedback.cache.load_plain(kept)
    feedback.cache.filled = refresh
    feedback.release_llm()
