"""Scores of an N-best: exact log p(y|x), the reward's judgement, and which hypothesis wins. It knows no decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head, Labels
from nemo_llm_feedback.core.config import ProposalConfig, RewardConfig, RunConfig
from nemo_llm_feedback.core.config.rescoring import RescoringConfig
from nemo_llm_feedback.core.errors import ConfigError, RewardError
from nemo_llm_feedback.core.text import get_normalizer, text_length
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.data.manifests import merge_context
from nemo_llm_feedback.hypotheses.proposals import Candidate, Proposer, build_members, to_hypothesis
from nemo_llm_feedback.llm import open_llm
from nemo_llm_feedback.rewards import LLMReward, Reward
from nemo_llm_feedback.rewards.from_config import reward_faults, reward_from_config


@dataclass(frozen=True)
class ScoredHypothesis:
    """One member of a rescored N-best.

    Attributes:
        labels: label ids without blank.
        text: as the reward saw it, i.e. after the text normalisation.
        score: what the N-best is ordered by; NaN where the reward could not judge the member.
        parts: ``asr`` = exact log p(y|x) in nats, ``length``, and the reward's own parts, unweighted.
        source: ``beam``, or ``greedy``, ``boosted``, ``term_swap`` where those were asked for.
    """

    labels: Labels
    text: str
    score: float
    parts: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Utterances:
    """What is known about the rows of the batch that is decoded next."""

    names: tuple[str, ...]
    contexts: tuple[Context, ...]


@dataclass(eq=False)
class Rescorer:
    """Chooses among hypotheses by log p(y|x) + α·reward + β·length; not a module, nothing of it is ever saved.

    A reward whose parts include ``asr`` has weighed log p(y|x) itself (``LLMReward`` does: the one parameterisation),
    and its value is the score. A member that the reward cannot judge (NaN) loses against every one that it can; where
    it can judge none, log p(y|x) decides.

    Attributes:
        reward: the judge, or None for log p(y|x) + β·length.
        alpha, beta: of the formula; None = left to a reward that weighs log p(y|x) itself, otherwise those of
            ``settings.reward`` or its defaults (β = 0 without a reward).
        context: of all utterances; an utterance's own is merged over it.
        settings: sizes, normalisation and memory.
    """

    reward: Reward | None
    alpha: float | None = None
    beta: float | None = None
    context: Context = field(default_factory=Context)
    settings: RescoringConfig = field(default_factory=lambda: RescoringConfig(reward=None))
    _batch: Utterances | None = None

    def __post_init__(self) -> None:
        self._normalize = get_normalizer(self.settings.normalizer)
        given = [v for v in (self.alpha, self.beta) if v is not None]
        if not all(map(math.isfinite, given)):
            raise ConfigError(f"alpha={self.alpha} and beta={self.beta} must be finite numbers.")
        if isinstance(self.reward, LLMReward) and given:
            raise ConfigError("an LLMReward has its own alpha and beta: set them on it, not on enable_rescoring.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Rescorer:
        """A copied model (the frozen reference, for one) shares the rescorer: an LLM is not copied by accident."""
        return self

    @classmethod
    def from_settings(cls, settings: RescoringConfig, *, allow_dotted: bool = False) -> Rescorer:
        """Loads what the settings name.

        Args:
            settings: checked settings.
            allow_dotted: accept a path to code as ``reward.name``; True only for the user's own command line or file.

        Raises:
            LLMError, RewardError: the LLM or the reward cannot be used.
        """
        return cls(_build(settings, allow_dotted=allow_dotted), context=settings.context.load(), settings=settings)

    @contextmanager
    def utterances(self, names: Sequence[str], contexts: Sequence[Context]) -> Iterator[None]:
        """Within it, the rows of every decoded batch are these utterances, in this order.

        Args:
            names: one a row, stable over runs.
            contexts: each row's own context, merged here over the run's.
        """
        before = self._batch
        self._batch = Utterances(tuple(names), tuple(merge_context(self.context, own) for own in contexts))
        try:
            yield
        finally:
            self._batch = before

    def proposer(self, head: Head) -> Proposer | None:
        """What adds boosted hypotheses and term swaps to a head's N-best, or None where neither is asked for."""
        s = self.settings
        if not s.boosted and not s.term_swap:
            return None
        config = ProposalConfig(
            beam=0, boosted=s.boosted, term_swap=s.term_swap, samples=0, boosting_weight=s.boosting_weight
        )
        return Proposer(head, config)

    @torch.no_grad()
    def rescore(
        self,
        head: Head,
        encoded: Tensor,
        lengths: Tensor,
        nbest: Sequence[Sequence[Labels]],
        *,
        proposer: Proposer | None = None,
    ) -> list[list[ScoredHypothesis]]:
        """Orders the N-best of every row by score, best first; members of equal normalised text are one.

        Args:
            head: the decoding model's head, in eval mode.
            encoded: [B, D, T] its encoder output.
            lengths: [B] frames.
            nbest: the first pass's label sequences, B rows of any size; an empty row holds the empty text.
            proposer: of :meth:`proposer`.

        Raises:
            ConfigError: the utterances announced are not as many as the rows, or alpha or beta have no use.
            RewardError: the reward cannot work at all.
        """
        utterances = self._rows(len(nbest))
        candidates = [[Candidate(tuple(y), "beam") for y in row] or [Candidate((), "beam")] for row in nbest]
        boosted = [b for b, context in enumerate(utterances.contexts) if context.terms]
        if proposer is not None and boosted:
            contexts = [utterances.contexts[b] for b in boosted]
            more = proposer.propose(encoded[boosted], lengths[boosted], contexts)
            for b, found in zip(boosted, more, strict=True):
                candidates[b] += found
        trie = PrefixTrie.build(
            [list(c.labels) for row in candidates for c in row], [b for b, row in enumerate(candidates) for _ in row]
        )
        flat = iter(head.log_prob(encoded, lengths, trie.to(encoded.device)).tolist())
        groups = []
        for b, row in enumerate(candidates):
            logp = [next(flat) for _ in row]
            keep = build_members(
                row,
                logp,
                vocabulary=head.vocabulary,
                normalize=self._normalize,
                max_members=len(row),
                distinct=True,
            )
            members = tuple(to_hypothesis(row[i], head.vocabulary, self._normalize) for i in keep)
            ref_logp = tuple(logp[i] for i in keep)
            groups.append(HypothesisGroup(utterances.names[b], members, utterances.contexts[b], ref_logp))
        return [self._ordered(group, scores) for group, scores in zip(groups, self._scores(groups), strict=True)]

    def _rows(self, count: int) -> Utterances:
        if self._batch is None:
            return Utterances(tuple(f"row {b}" for b in range(count)), (self.context,) * count)
        if len(self._batch.names) != count:
            raise ConfigError(
                f"{len(self._batch.names)} utterances were announced but {count} rows are decoded: announce every "
                "batch with its own names and contexts."
            )
        return self._batch

    def _scores(self, groups: Sequence[HypothesisGroup]) -> list[list[tuple[float, dict[str, float]]]]:
        """(score, parts) of every member."""
        output = self.reward(groups) if self.reward is not None else None
        weighed = output is not None and "asr" in output.parts
        if weighed and (self.alpha is not None or self.beta is not None):
            assert self.reward is not None
            raise ConfigError(
                f"the reward {self.reward.name!r} weighs log p(y|x) itself: set alpha and beta on it, "
                "not on enable_rescoring."
            )
        own_alpha, own_beta = (self.settings.reward or RewardConfig()).weights
        alpha = own_alpha if self.alpha is None else self.alpha
        beta = self.beta if self.beta is not None else own_beta if output is not None else 0.0
        scored = []
        for b, group in enumerate(groups):
            row = []
            for n, (text, asr) in enumerate(zip(group.texts, group.ref_logp, strict=True)):
                parts = {"asr": asr, "length": float(text_length(text))}
                score = asr + beta * parts["length"]
                if output is not None:
                    value = float(output.values[b, n])
                    parts |= {name: float(part[b, n]) for name, part in output.parts.items()} | {"asr": asr}
                    score = value if weighed else score + alpha * value
                row.append((score, parts))
            scored.append(row)
        return scored

    @staticmethod
    def _ordered(group: HypothesisGroup, scores: Sequence[tuple[float, dict[str, float]]]) -> list[ScoredHypothesis]:
        members = [
            ScoredHypothesis(h.tokens, h.text, score, parts, h.source)
            for h, (score, parts) in zip(group.hypotheses, scores, strict=True)
        ]

        def rank(member: ScoredHypothesis) -> tuple[bool, float]:
            judged = not math.isnan(member.score)
            return judged, member.score if judged else member.parts["asr"]

        return sorted(members, key=rank, reverse=True)


def _build(settings: RescoringConfig, *, allow_dotted: bool) -> Reward | None:
    reward = settings.reward
    if reward is None:
        return None
    if reward.code_paths and not allow_dotted:
        raise RewardError(
            f"reward {', '.join(reward.code_paths)}: a path to code is accepted from your own command line or YAML "
            "file only, not from a decoding configuration."
        )
    config = RunConfig(reward=reward, llm=settings.llm, context=settings.context)
    if faults := reward_faults(config):
        raise RewardError("the reward cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))
    scorer = open_llm(settings.llm) if reward.needs_llm and settings.llm is not None else None
    return reward_from_config(config, scorer)
