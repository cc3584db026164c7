"""The state of a run beside the model: what ``setup_feedback`` builds, then what the start of training adds.

Plain holders, so that no module in them is registered with the model: neither the LLM nor the frozen reference reaches
a state dict or an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head
from nemo_llm_feedback.asr.reference import FrozenReference
from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.data.batches import BatchReader
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.data.staging import Staged
from nemo_llm_feedback.hypotheses.maker import NBestMaker, Unjudged
from nemo_llm_feedback.hypotheses.nbest import NBestBatch, NBestCache
from nemo_llm_feedback.rewards import Reward
from nemo_llm_feedback.training.distributed import gather, num_ranks
from nemo_llm_feedback.training.resume import random_states, set_random_states
from nemo_llm_feedback.training.weights import Weights


@dataclass(frozen=True)
class PoolStatistics:
    """What was measured on the pool before training.

    Attributes:
        utterances: unlabeled rows that were measured.
        signal_fraction: share of them whose rewards differ.
        members: mean number of hypotheses.
        spread: component of the reward → mean within-group standard deviation over judged members, in its unit; NaN =
            no utterance has two.
        length_ratio: mean length of the best-rewarded members ÷ of those that the reference finds most probable.
        boosting_weight: weight of the boosting tree: the run's, or the one chosen of ``proposals.boosting_weights``.
        heard, trust: other recogniser → share of its texts that it heard in the audio, and the trust in it (see
            ``hypotheses/trust.py``); None where they were not measured.
        alpha, beta: weights of the reward: the run's, or with ``reward.alpha`` null those that the pool's spread gave,
            before the strength of boosting was chosen; None for a reward without any.
        learning_rate: chosen by the trial; None where ``model.optim.lr`` is given.
    """

    utterances: int
    signal_fraction: float
    members: float
    spread: dict[str, float]
    length_ratio: float
    boosting_weight: float
    alpha: float | None = None
    beta: float | None = None
    heard: dict[str, float] | None = None
    trust: dict[str, float] | None = None
    learning_rate: float | None = None

    def applied_to(self, config: RunConfig) -> RunConfig:
        """The settings with what the pool has set."""
        proposals = replace(config.proposals, boosting_weight=self.boosting_weight)
        reward = config.reward
        if self.alpha is not None and (self.alpha, self.beta) != reward.weights:
            reward = replace(reward, alpha=self.alpha, beta=self.beta)
        if self.trust is not None:
            reward = replace(reward, trust=self.trust)
        return replace(config, proposals=proposals, reward=reward)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checked settings, with the labelled rows that they name.

    Attributes:
        config: the plugin's settings, as given.
        rates: learning rates to try; empty where the rate is given.
        guard_rows: labelled general speech whose WER is watched.
        validation: name → labelled rows, reported before and after.
        judge: a reward from Python in place of ``config.reward``.
    """

    config: RunConfig
    rates: tuple[float, ...] = ()
    guard_rows: tuple[Row, ...] = ()
    validation: Mapping[str, list[Row]] = field(default_factory=dict)
    judge: Reward | None = None


@dataclass(frozen=True, kw_only=True)
class FeedbackSetup(Settings):
    """What is known before the trainer has placed the model on its device.

    Attributes:
        staged: the rows of the training manifest.
        reader: splits batches by what their rows are for.
        reference: the frozen starting model.
        heads: the heads that learn, the one that proposes first.
        head_weights: name → weight in the loss.
        work_dir: folder of the run.
        train_ds: NeMo's settings of the training loader.
        generator: random numbers of the sampler.
        start: the weights that learn, as they were.
        everyday: whether ``guard_rows`` are the sentences that ship with the package.
        keep_alive: the run's temporary folder, which is removed with this; None where it has a folder.
    """

    staged: Staged
    reader: BatchReader
    reference: FrozenReference
    heads: list[Head]
    head_weights: dict[str, float]
    work_dir: Path
    train_ds: DictConfig
    generator: torch.Generator
    start: dict[str, Tensor]
    everyday: bool = False
    keep_alive: Any = None

    def held_out_rows(self) -> tuple[Row, ...]:
        """Rows that the guards watch: those kept from training, or, of a pool too small or tarred, some of it."""
        return self.staged.held_out or self.some_rows(self.config.guards.held_out_utterances)

    def generation_steps(self, max_steps: int) -> int:
        """Steps of a generation of a run of ``max_steps``; the last one may have fewer."""
        return -(-max_steps // self.config.feedback.generations)

    def general_speech(self, *, watched: bool = True) -> str:
        """How the run keeps or watches general speech, as a line of its plan.

        Args:
            watched: False where the guard set has turned out to be of another language.
        """
        kept = ["held by replay rows"] if self.reader.replays else []
        if watched and self.guard_rows and self.held_out_rows():
            what = f"{len(self.guard_rows)} English sentences that ship with the package (guards.everyday)"
            kept.append(f"watched on {what if self.everyday else 'guards.manifest_filepath'}")
        return " and ".join(kept) or (
            'neither held nor watched: give replay rows (manifest key "replay": "kl") or guards.manifest_filepath'
        )

    def some_rows(self, most: int) -> tuple[Row, ...]:
        """Unlabeled rows with audio files, evenly spaced over the pool."""
        rows = [row for row in self.staged.rows if row.unlabeled and Path(row.audio).is_file()]
        return tuple(rows[:: max(1, len(rows) // most)][:most])


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A part of a run with one teacher: the model whose scores are in the reward, and over which a gain is counted.

    Attributes:
        number: 1, 2 …
        began: the step behind which it began.
        weights: the teacher's, as :func:`~nemo_llm_feedback.training.weights.snapshot` has them; None = the starting
            model's.
    """

    number: int = 1
    began: int = 0
    weights: Weights | None = None


@dataclass(frozen=True, kw_only=True)
class Feedback(FeedbackSetup):
    """What the main path uses: the set-up, with what needed the device, the LLM and the pool.

    Attributes:
        config: the settings, with what the pool has set.
        maker: proposes and rewards.
        build: makes it, by settings that differ in the pool's scales only, with a teacher.
        teacher: the model whose scores are in the reward: the reference in the first generation.
        generation: the generation that the run is in.
        cache: the N-best of this refresh.
        statistics: statistics of the pool; None for a run without reward.
        scorer: the LLM, or None.
        exact_supervision: whether labelled rows need our likelihood, since NeMo has no TDT loss on a CPU.
        chat_date: what a chat template writes as today's date, that of the run's first step.
    """

    maker: NBestMaker
    build: Callable[[RunConfig, FrozenReference], NBestMaker]
    teacher: FrozenReference
    generation: Generation = field(default_factory=Generation)
    cache: NBestCache = field(default_factory=NBestCache)
    statistics: PoolStatistics | None = None
    scorer: Any = None
    exact_supervision: bool = False
    chat_date: str = ""

    def stale(self, audio: Audio, *, refresh: int) -> list[int]:
        """Positions of the utterances for which nothing is kept from this refresh."""
        self.cache.start(refresh)
        return [b for b, utterance in enumerate(audio.utterances) if utterance not in self.cache]

    def knows(self, refresh: int) -> Callable[[str], bool]:
        """Says by its name whether an utterance has kept hypotheses of a refresh."""
        return lambda utterance: self.cache.refresh == refresh and utterance in self.cache

    def nbest(self, audio: Audio, encoded: Tensor, lengths: Tensor, *, refresh: int) -> NBestBatch:
        """The hypotheses of a batch with their rewards: those kept from this refresh, and new ones for other rows.

        Args:
            audio: B utterances.
            encoded: [B, D, T] the policy's encoder output.
            lengths: [B] frames.
            refresh: index of the refresh; what was proposed in another one is proposed anew.
        """
        if stale := self.stale(audio, refresh=refresh):
            self.cache.put(self.maker.make(audio.select(stale), encoded.detach()[stale], lengths[stale]))
        return self.cache.get(audio.utterances)

    def policy_logp(self, encoded: Tensor, lengths: Tensor, nbest: NBestBatch | Unjudged) -> dict[str, Tensor]:
        """Head → [B, N] log p of the members under the policy, from [B, D, T] encoder output of [B] frames."""
        labels = [[member.tokens for member in row] for row in nbest.hypotheses]
        return {head.name: head.score(encoded, lengths, labels) for head in self.heads}

    def release_llm(self) -> None:
        """Takes the LLM out of memory where it works between the steps; the next score loads it again."""
        if self.scorer is not None and self.config.scores_in_phases:
            self.scorer.unload()

    def to_plain(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data; the same on all ranks, each of which must call this."""
        # After a pool is scored every rank has all of it: one copy is enough.
        shared = self.cache.filled == self.cache.refresh
        mine = self.cache.to_plain()
        ranks = gather((None if shared else mine, random_states([self.generator])))
        return {
            "statistics": asdict(self.statistics) if self.statistics else None,
            "generation": vars(self.generation),
            "nbest": [mine] if shared else [kept for kept, _ in ranks],
            "random": [states for _, states in ranks],
            "chat_date": self.chat_date,
        }

    def load_nbest(self, plain: Mapping[str, Any], *, rank: int) -> None:
        """Takes back the kept hypotheses; with another number of ranks, all take those of all."""
        same = len(plain["nbest"]) == num_ranks()
        for kept in plain["nbest"][rank : rank + 1] if same else plain["nbest"]:
            self.cache.load_plain(kept)

    def load_random(self, plain: Mapping[str, Any], *, rank: int) -> None:
        """Takes up the random states of a checkpoint; with another number of ranks they are left alone."""
        if len(plain["random"]) == num_ranks():
            set_random_states(plain["random"][rank], [self.generator])
