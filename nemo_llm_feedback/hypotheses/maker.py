"""Makes N-best lists with rewards from encoded audio: propose, score under the frozen reference, reward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head, Labels
from nemo_llm_feedback.core.types import Audio, Context, Hypothesis, pad_groups
from nemo_llm_feedback.hypotheses.external import ExternalTexts
from nemo_llm_feedback.hypotheses.nbest import NBestBatch, hypothesis_groups
from nemo_llm_feedback.hypotheses.proposals import Candidate, Proposer, Scorer, build_members, scored, to_hypothesis
from nemo_llm_feedback.hypotheses.spelling import written_labels
from nemo_llm_feedback.hypotheses.trust import Trust, bonuses, trusted_sources
from nemo_llm_feedback.rewards import Reward

# Contexts and their texts, most probable first → a corrected text per utterance, or None.
Corrector = Callable[[Sequence[Context], Sequence[Sequence[str]]], Sequence[str | None]]


T = TypeVar("T")


class Reference(Protocol):
    """The frozen ASR model that scores hypotheses: a ``FrozenReference``, or a model that does not learn."""

    @property
    def heads(self) -> Sequence[Head]:
        """Its heads, in the policy's order."""
        ...

    def encode(self, signal: Tensor, signal_len: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] samples and [B] lengths → [B, D, T] encoder output and [B] frames."""
        ...


class Unjudged(NamedTuple):
    """Groups without their rewards: B utterances, contexts and member tuples, head → [B, N] log p under the frozen
    reference, and B normalised transcripts, or none."""

    utterances: tuple[str, ...]
    contexts: tuple[Context, ...]
    hypotheses: tuple[tuple[Hypothesis, ...], ...]
    ref_logp: dict[str, Tensor]
    texts: Sequence[str]


class NBestMaker:
    """Makes N-best lists with everything that an objective needs.

    Args:
        proposer: proposes with the policy's first head.
        reference: the frozen reference, with the same heads in the same order.
        normalize: the run's text normalisation.
        reward: judges them; None for plain self-training, whose rewards are zeros.
        corrector: writes one more member from the best ones, or None.
        trust: how members of other recognisers are judged; None = as any.
    """

    def __init__(
        self,
        proposer: Proposer,
        reference: Reference,
        *,
        normalize: Callable[[str], str],
        reward: Reward | None = None,
        corrector: Corrector | None = None,
        trust: Trust | None = None,
    ) -> None:
        self.proposer, self.reward, self._trust = proposer, reward, trust
        self._reference, self._corrector = reference, corrector
        self.external = ExternalTexts(reference.heads[0].vocabulary, normalize, proposer.config)
        self._normalize = normalize

    def make(self, audio: Audio, encoded: Tensor, lengths: Tensor) -> NBestBatch:
        """Proposes, scores and rewards.

        Args:
            audio: B utterances.
            encoded: [B, D, T] the policy's encoder output.
            lengths: [B] frames.
        """
        return self.judge(self.propose(audio, encoded, lengths))

    @torch.no_grad()
    def propose(self, audio: Audio, encoded: Tensor, lengths: Tensor) -> Unjudged:
        """The first part of :meth:`make`, with its arguments: what needs the recognisers."""
        reference = self._reference.encode(audio.signal, audio.signal_len)
        first, *others = self._reference.heads
        scorer = functools.partial(first.score, *reference)
        extra = self._external(audio, lengths)
        with self.proposer.same_weights():
            candidates = self.proposer.propose(encoded, lengths, audio.contexts, extra=extra, scorer=scorer)
        if self._corrector is not None:
            candidates = self._with_corrections(audio.contexts, candidates, scorer)
        spelled: Any = {"vocabulary": first.vocabulary, "normalize": self._normalize}
        options: Any = {"max_members": self.proposer.config.max_members, "distinct": not self.proposer.keeps_copies}
        kept = [build_members(row, **spelled, **options) for row in candidates]
        ref_logp = {first.name: pad_groups([[c.logp for c in row] for row in kept], fill=-math.inf)}
        for head in others:
            ref_logp[head.name] = head.score(*reference, [[c.labels for c in row] for row in kept]).float().cpu()
        members = tuple(tuple(to_hypothesis(c, **spelled) for c in row) for row in kept)
        texts = [self._normalize(text) for text in audio.texts]
        return Unjudged(audio.utterances, audio.contexts, members, ref_logp, texts)

    @torch.no_grad()
    def judge(self, unjudged: Unjudged) -> NBestBatch:
        """The second part of :meth:`make`: what needs the reward alone."""
        made = unjudged.utterances, unjudged.contexts, unjudged.hypotheses, unjudged.ref_logp
        return judged(*made, self.reward, self._trust, texts=unjudged.texts)

    @torch.no_grad()
    def reference_scores(self, audio: Audio, texts: Sequence[Sequence[Labels]]) -> list[dict[Labels, float]]:
        """Per utterance the log p of some label sequences under the reference's first head.

        Args:
            audio: B utterances.
            texts: B lists.
        """
        encoded, lengths = self._reference.encode(audio.signal, audio.signal_len)
        scores = self._reference.heads[0].score(encoded, lengths, texts).tolist()
        return [dict(zip(row, logp, strict=False)) for row, logp in zip(texts, scores, strict=True)]

    def judged_anew(self, nbest: NBestBatch, texts: Sequence[str]) -> NBestBatch:
        """The same members with this maker's rewards.

        Args:
            nbest: what a maker with other weights made.
            texts: B transcripts of its rows, or none, as ``Audio.texts``.
        """
        made = nbest.utterances, nbest.contexts, nbest.hypotheses, nbest.ref_logp
        return judged(*made, self.reward, self._trust, texts=[self._normalize(text) for text in texts])

    def _external(self, audio: Audio, lengths: Tensor) -> list[list[Candidate]]:
        """Other recognisers' texts of each utterance."""
        if self.proposer.sampled_only:
            return []
        pairs = zip(audio.external, lengths.tolist(), strict=True) if audio.external else ()
        return [[Candidate(*new) for new in self.external.labels(texts, frames=frames)] for texts, frames in pairs]

    def _with_corrections(
        self, contexts: Sequence[Context], candidates: list[list[Candidate]], scorer: Scorer
    ) -> list[list[Candidate]]:
        """The candidates with the LLM's rewrite of each utterance's best texts second, behind greedy."""
        assert self._corrector is not None
        first = self._reference.heads[0]
        ranked = [
            [self._normalize(first.vocabulary.ids_to_text(c.labels)) for c in sorted(row, key=lambda c: -c.logp)]
            for row in candidates
        ]
        texts = self._corrector(contexts, ranked)
        labels = [written_labels(text, first.vocabulary) if text else None for text in texts]
        if not any(labels):
            return candidates
        extra = scored([[Candidate(y, "llm_correction")] if y else [] for y in labels], scorer)
        return [[*row[:1], *new, *row[1:]] for row, new in zip(candidates, extra, strict=True)]


def judged(
    utterances: Sequence[str],
    contexts: Sequence[Context],
    hypotheses: tuple[tuple[Hypothesis, ...], ...],
    ref_logp: dict[str, Tensor],
    reward: Reward | None,
    trust: Trust | None = None,
    *,
    texts: Sequence[str] = (),
) -> NBestBatch:
    """The N-best with the reward's judgement; the reward is asked once, also for a model with two heads.

    Args:
        utterances, contexts, hypotheses: B names, contexts and member tuples.
        ref_logp: head → [B, N] log p under the frozen reference, the first head first.
        reward: None = zeros.
        trust: how members of other recognisers are judged: some are left out, others get the part ``trust``.
        texts: B normalised transcripts, "" where there is none; for rewards that read them.
    """
    first = next(iter(ref_logp))
    parts: dict[str, Tensor] = {}
    if trust is not None:
        hypotheses, ref_logp, bonus = _trusted(hypotheses, ref_logp, trust)
    if reward is None:
        zeros = pad_groups([[0.0] * len(row) for row in hypotheses])
        rewards = dict.fromkeys(ref_logp, zeros)
    else:
        output = reward(hypothesis_groups(utterances, contexts, hypotheses, ref_logp[first], texts=texts))
        parts = output.parts
        rewards = {name: output.values if name == first else output.with_reference(v) for name, v in ref_logp.items()}
    if trust is not None:
        rewards = {name: values + trust.weight * bonus[name] for name, values in rewards.items()}
        parts = {**parts, "trust": bonus[first].masked_fill(rewards[first].isnan(), math.nan)}
    return NBestBatch(tuple(utterances), tuple(contexts), hypotheses, ref_logp, rewards, parts=parts)


def _trusted(
    hypotheses: Sequence[tuple[Hypothesis, ...]], ref_logp: Mapping[str, Tensor], trust: Trust
) -> tuple[tuple[tuple[Hypothesis, ...], ...], dict[str, Tensor], dict[str, Tensor]]:
    """Members, [B, N] scores and [B, N] bonuses per head without the members that the first head does not trust."""
    logp = {
        name: [row[: len(of)] for row, of in zip(v.tolist(), hypotheses, strict=True)] for name, v in ref_logp.items()
    }
    first = next(iter(logp.values()))
    trusted = [trusted_sources(*row, trust.limits) for row in zip(hypotheses, first, strict=True)]

    def kept(rows: Iterable[Sequence[T]]) -> list[tuple[T, ...]]:
        """Per utterance the values of the members that stay."""
        return [
            tuple(value for value, sources in zip(row, of, strict=True) if sources is not None)
            for row, of in zip(rows, trusted, strict=True)
        ]

    members = kept(hypotheses)
    scores = {name: kept(rows) for name, rows in logp.items()}
    given = [[sources for sources in row if sources is not None] for row in trusted]
    bonus = {name: [bonuses(*row) for row in zip(members, rows, given, strict=True)] for name, rows in scores.items()}
    return (
        tuple(members),
        {name: pad_groups(rows, fill=-math.inf) for name, rows in scores.items()},
        {name: pad_groups(rows) for name, rows in bonus.items()},
    )
