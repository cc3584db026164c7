"""From encoded audio to scored groups: propose, score under the frozen reference, reward, and keep for a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head
from nemo_llm_feedback.asr.reference import FrozenReference
from nemo_llm_feedback.core.types import Audio, Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.hypotheses.proposals import Candidate, Proposer, build_members, to_hypothesis, written_labels
from nemo_llm_feedback.rewards import Reward


@dataclass(frozen=True)
class ScoredGroup:
    """A group with everything that an objective needs except the policy's moving log-probabilities.

    Attributes:
        group: members, context and, in ``ref_logp``, the first head's log p under the reference.
        rewards: head → reward of each member (each head has its own reference score in it), NaN = cannot judge.
        ref_logp: head → log p of each member under the frozen reference.
        old_logp: head → log p under the policy that proposed the group; empty until its first use.
        parts: reward component → value of each member (first head).
        round: number of the refresh round in which it was proposed.
    """

    group: HypothesisGroup
    rewards: dict[str, list[float]]
    ref_logp: dict[str, list[float]]
    old_logp: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    round: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Plain lists and dicts, for a training checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ScoredGroup:
        """The inverse of :meth:`to_plain`."""
        group = plain["group"]
        restored = HypothesisGroup(
            utterance=group["utterance"],
            hypotheses=tuple(Hypothesis(h["text"], tuple(h["tokens"]), h["source"]) for h in group["hypotheses"]),
            context=Context(
                group["context"]["description"],
                tuple(group["context"]["terms"]),
                tuple(group["context"].get("previous", ())),  # checkpoints of earlier versions have none
            ),
            ref_logp=tuple(group["ref_logp"]),
        )
        return cls(**{**plain, "group": restored})


class GroupMaker:
    """Makes scored groups and keeps them for the refresh round.

    Args:
        proposer: of the policy's first head.
        reference: the frozen reference, with the same heads in the same order.
        reward: judges groups; None for plain self-training, whose rewards are zeros.
        corrector: writes one more member a group from its best ones (contexts, their texts → a text or None each), or
            None; set later, when the LLM is loaded.
        normalize: the run's text normalisation.
        max_members: largest group.
    """

    def __init__(
        self,
        proposer: Proposer,
        reference: FrozenReference,
        reward: Reward | None,
        *,
        normalize: Callable[[str], str],
        max_members: int,
    ) -> None:
        self.proposer, self._reference = proposer, reference
        self.reward = reward
        self.corrector: Callable[[Sequence[Context], Sequence[Sequence[str]]], Sequence[str | None]] | None = None
        self._normalize, self._max_members = normalize, max_members
        self.kept: dict[str, ScoredGroup] = {}

    @property
    def generator(self) -> torch.Generator:
        """Of the sampler; its state belongs into checkpoints."""
        return self.proposer.generator

    def get(self, audio: Audio, encoded: Tensor, lengths: Tensor, *, round: int) -> list[ScoredGroup]:
        """The groups of a batch: those kept from this round, and fresh ones for the other rows.

        Args:
            audio: the rows.
            encoded: [B, D, T] the policy's encoder output.
            lengths: [B] frames.
            round: number of the refresh round; groups of another round are proposed anew.
        """
        # Groups of an older round are of no more use, and a large pool would fill the memory and every checkpoint.
        self.kept = {u: scored for u, scored in self.kept.items() if scored.round == round}
        stale = [b for b, u in enumerate(audio.utterances) if u not in self.kept]
        if stale:
            fresh = self.make(_select(audio, stale), encoded.detach()[stale], lengths[stale], round=round)
            self.kept.update({scored.group.utterance: scored for scored in fresh})
        return [self.kept[u] for u in audio.utterances]

    @torch.no_grad()
    def make(self, audio: Audio, encoded: Tensor, lengths: Tensor, *, round: int = 0) -> list[ScoredGroup]:
        """Proposes and scores groups; see :meth:`get`."""
        candidates = self.proposer.propose(encoded, lengths, audio.contexts)
        ref_encoded, ref_lengths = self._reference.encode(audio.signal, audio.signal_len)
        scores = {h.name: self._score(h, ref_encoded, ref_lengths, candidates) for h in self._reference.heads}
        first = self._reference.heads[0]
        if self.corrector is not None:
            self._add_corrections(audio.contexts, candidates, scores, ref_encoded, ref_lengths)
        groups, ref_logp = [], []
        for b, utterance in enumerate(audio.utterances):
            keep = build_members(
                candidates[b],
                scores[first.name][b],
                vocabulary=first.vocabulary,
                normalize=self._normalize,
                max_members=self._max_members,
                distinct=not self.proposer.sampled_only,
            )
            members = tuple(to_hypothesis(candidates[b][i], first.vocabulary, self._normalize) for i in keep)
            per_head = {name: [rows[b][i] for i in keep] for name, rows in scores.items()}
            groups.append(HypothesisGroup(utterance, members, audio.contexts[b], tuple(per_head[first.name])))
            ref_logp.append(per_head)
        return self._rewarded(groups, ref_logp, round)

    def _add_corrections(
        self,
        contexts: Sequence[Context],
        candidates: list[list[Candidate]],
        scores: dict[str, list[list[float]]],
        encoded: Tensor,
        lengths: Tensor,
    ) -> None:
        """Puts the LLM's rewrite of each row's best texts second, behind greedy, with its scores."""
        assert self.corrector is not None
        head = self._reference.heads[0]
        ranked = []
        for row, logp in zip(candidates, scores[head.name], strict=True):
            order = sorted(range(len(row)), key=lambda i: -logp[i])
            ranked.append([self._normalize(head.vocabulary.ids_to_text(row[i].labels)) for i in order])
        texts = self.corrector(contexts, ranked)
        labels = [written_labels(text, head.vocabulary, self._normalize) if text else None for text in texts]
        extra = [[Candidate(new, "llm_correction")] if new is not None else [] for new in labels]
        if not any(extra):
            return
        for head in self._reference.heads:
            for logp, new in zip(scores[head.name], self._score(head, encoded, lengths, extra), strict=True):
                logp[1:1] = new
        for row, members in zip(candidates, extra, strict=True):
            row[1:1] = members

    def _score(
        self, head: Head, encoded: Tensor, lengths: Tensor, candidates: Sequence[Sequence[Candidate]]
    ) -> list[list[float]]:
        """log p of every candidate under the reference's head."""
        scores = head.score(encoded, lengths, [[c.labels for c in row] for row in candidates]).tolist()
        return [logp[: len(row)] for logp, row in zip(scores, candidates, strict=True)]

    def _rewarded(
        self, groups: list[HypothesisGroup], ref_logp: list[dict[str, list[float]]], round: int
    ) -> list[ScoredGroup]:
        rewards: list[dict[str, list[float]]] = [{} for _ in groups]
        parts: list[dict[str, list[float]]] = [{} for _ in groups]
        for k, head in enumerate(self._reference.heads):
            if self.reward is None:
                for b, group in enumerate(groups):
                    rewards[b][head.name] = [0.0] * len(group)
                continue
            judged = [
                dataclasses.replace(g, ref_logp=tuple(r[head.name])) for g, r in zip(groups, ref_logp, strict=True)
            ]
            output = self.reward(judged)
            for b, group in enumerate(groups):
                rewards[b][head.name] = output.values[b, : len(group)].tolist()
                if k == 0:
                    parts[b] = {name: part[b, : len(group)].tolist() for name, part in output.parts.items()}
        return [
            ScoredGroup(group, rewards[b], ref_logp[b], parts=parts[b], round=round) for b, group in enumerate(groups)
        ]


def _select(audio: Audio, rows: Sequence[int]) -> Audio:
    return Audio(
        audio.signal[list(rows)],
        audio.signal_len[list(rows)],
        tuple(audio.utterances[b] for b in rows),
        tuple(audio.contexts[b] for b in rows),
    )
