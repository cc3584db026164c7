"""Proposes hypotheses by beams, boosted beams, term swaps and samples, and merges those with equal texts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head, Labels, Vocabulary
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.types import Context, Hypothesis
from nemo_llm_feedback.hypotheses.spelling import spelled_terms, without_unknown, written_labels
from nemo_llm_feedback.hypotheses.term_swaps import swap_terms

# Term swaps: how often a swapped text is swapped again, from how many texts, and how many swaps of each are scored.
_SWAP_ROUNDS, _SWAP_SEEDS, _SWAP_TRIED = 2, 4, 8

# Boosting trees kept in memory: one per distinct term list; a run with per-utterance lists goes through many.
_MAX_TREES = 256


@dataclass(frozen=True)
class Candidate:
    """A label sequence with the source that first proposed it, and the others that did."""

    labels: Labels
    source: str
    also: tuple[str, ...] = ()


class Proposer:
    """Proposes label sequences for encoded audio with one head.

    Args:
        head: the policy's head; eval mode and no gradient are the caller's.
        config: number of candidates from each source, and the strength of boosting.
        generator: random numbers of the sampler; its state belongs into checkpoints. One with seed 0 if None.
    """

    def __init__(self, head: Head, config: ProposalConfig, *, generator: torch.Generator | None = None) -> None:
        self._head, self.config = head, config
        self._generator = generator or torch.Generator().manual_seed(0)
        self._tree = functools.lru_cache(_MAX_TREES)(lambda terms: boosting_tree(head.vocabulary, terms, config))

    @property
    def sampled_only(self) -> bool:
        """Whether members are samples of the policy and nothing else: multiplicity counts, greedy is not inserted."""
        config = self.config
        return not (config.beam or config.boosted or config.term_swap or config.llm_correction)

    def propose(self, encoded: Tensor, lengths: Tensor, contexts: Sequence[Context]) -> list[list[Candidate]]:
        """Proposes candidates for every row; repeated label sequences are removed unless all are samples.

        Args:
            encoded: [B, D, T] encoder output.
            lengths: [B] frames.
            contexts: B contexts, whose terms are boosted in the checkpoint's letters.

        Returns:
            B lists, greedy first (unless sampled only), then the beam, the boosted beam, term swaps and samples.
        """
        config, rows = self.config, range(len(contexts))
        found: list[list[Candidate]] = [[] for _ in rows]

        def add(source: str, rows_of: Sequence[int], proposals: Sequence[Sequence[Labels]]) -> None:
            """Adds a source's label sequences to the rows that they are for."""
            for b, sequences in zip(rows_of, proposals, strict=True):
                found[b] += [Candidate(without_unknown(labels, self._head.vocabulary), source) for labels in sequences]

        if not self.sampled_only:
            add("greedy", rows, [[y] for y in self._greedy(encoded, lengths)])
        if config.beam:
            add("beam", rows, self._head.beam(encoded, lengths, size=config.beam, max_symbols=config.max_symbols))
        if config.boosted:
            for terms, members in self._rows_by_terms(contexts).items():
                add("boosted", members, self._boosted(encoded[members], lengths[members], terms))
        if config.term_swap:
            self._add_swaps(found, encoded, lengths, contexts)
        if config.samples:
            add("samples", rows, self._head.sample(encoded, lengths, size=config.samples, generator=self._generator))
        if not self.sampled_only:
            return [distinct(candidates) for candidates in found]
        bare = [b for b in rows if not found[b]]
        if bare:  # no sample of a transducer has ended: one member alone gives no gradient
            add("greedy", bare, [[y] for y in self._greedy(encoded[bare], lengths[bare])])
        return found

    def _greedy(self, encoded: Tensor, lengths: Tensor) -> list[Labels]:
        return self._head.greedy(encoded, lengths, max_symbols=self.config.max_symbols)

    def _add_swaps(
        self, found: list[list[Candidate]], encoded: Tensor, lengths: Tensor, contexts: Sequence[Context]
    ) -> None:
        """Adds the term swaps of each row's most probable candidates; a second round swaps a second term."""
        wanted = self.config.term_swap
        seeds = [distinct(row) for row in found]
        for _ in range(_SWAP_ROUNDS):
            top = self._best(seeds, encoded, lengths, keep=_SWAP_SEEDS)
            swapped = [
                distinct([new for seed in row for new in self._swaps(seed, context)])
                for row, context in zip(top, contexts, strict=True)
            ]
            seeds = self._best(swapped, encoded, lengths, keep=wanted)
            for row, new in zip(found, seeds, strict=True):
                row += new

    def _swaps(self, seed: Candidate, context: Context) -> list[Candidate]:
        """The seed with spans replaced by terms; texts that the vocabulary cannot write are left out."""
        vocabulary = self._head.vocabulary
        texts = swap_terms(
            vocabulary.ids_to_text(seed.labels),
            spelled_terms(context.terms, vocabulary),
            min_similarity=self.config.swap_similarity,
            limit=_SWAP_TRIED,
        )
        labels = [written_labels(text, vocabulary) for text in texts]
        return [Candidate(found, "term_swap") for found in labels if found is not None]

    def _best(
        self, candidates: list[list[Candidate]], encoded: Tensor, lengths: Tensor, *, keep: int
    ) -> list[list[Candidate]]:
        """The most probable candidates of every row under the policy, best first."""
        with torch.no_grad():
            scores = self._head.score(encoded, lengths, [[c.labels for c in row] for row in candidates]).tolist()
        return [best_first(row, logp)[:keep] for row, logp in zip(candidates, scores, strict=True)]

    def _rows_by_terms(self, contexts: Sequence[Context]) -> dict[tuple[str, ...], list[int]]:
        """Rows that share a term list are decoded together, so a group does not depend on its batch."""
        rows: dict[tuple[str, ...], list[int]] = {}
        for b, context in enumerate(contexts):
            if terms := spelled_terms(context.terms, self._head.vocabulary):
                rows.setdefault(terms, []).append(b)
        return rows

    def _boosted(self, encoded: Tensor, lengths: Tensor, terms: tuple[str, ...]) -> list[list[Labels]]:
        c, boosting = self.config, (self._tree(terms).to(encoded.device), self.config.boosting_weight)
        return self._head.beam(encoded, lengths, size=c.boosted, max_symbols=c.max_symbols, boosting=boosting)


def best_first(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[Candidate]:
    """The candidates by falling score; ``scores`` may go on behind the last candidate (padding)."""
    ranked = sorted(zip(scores, candidates, strict=False), key=lambda pair: -pair[0])
    return [candidate for _, candidate in ranked]


def boosting_tree(vocabulary: Vocabulary, terms: Sequence[str], config: ProposalConfig) -> Any:
    """NeMo's phrase boosting tree over the terms, for BPE and character models.

    Args:
        vocabulary: the head's vocabulary.
        terms: at least one.
        config: ``context_score`` and ``depth_scaling``.
    """
    from nemo.collections.asr.parts.context_biasing.boosting_graph_batched import (
        BoostingTreeModelConfig,
        GPUBoostingTreeModel,
    )

    settings = BoostingTreeModelConfig(
        key_phrases_list=list(terms),
        context_score=config.context_score,
        depth_scaling=config.depth_scaling,
        use_triton=torch.cuda.is_available(),
    )
    return GPUBoostingTreeModel.from_config(settings, tokenizer=vocabulary)


def build_members(
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    *,
    vocabulary: Vocabulary,
    normalize: Callable[[str], str],
    max_members: int,
    distinct: bool,
) -> dict[int, tuple[str, ...]]:
    """Chooses which candidates become members of a group.

    Two candidates whose texts are equal after normalisation are one member, the better-scored spelling, which all
    their sources have supplied; case and punctuation do not fill a group. Infeasible candidates (score −inf) are left
    out unless nothing else is there.

    Args:
        candidates: greedy first.
        scores: log p of each candidate under the frozen reference.
        vocabulary: the head's vocabulary.
        normalize: the run's text normalisation.
        max_members: largest group.
        distinct: False keeps repetitions (samples).

    Returns:
        Index into ``candidates`` → names of its sources, the first to propose it first; at least one.
    """
    feasible = [i for i, score in enumerate(scores) if score > float("-inf")] or [0]
    if not distinct:
        return {i: (candidates[i].source,) for i in feasible[:max_members]}
    best: dict[str, int] = {}  # keeps the order in which the texts were seen first
    sources: dict[str, dict[str, None]] = {}
    for i in feasible:
        text = normalize(vocabulary.ids_to_text(candidates[i].labels))
        if scores[i] > scores[best.setdefault(text, i)]:
            best[text] = i
        sources.setdefault(text, {}).update(dict.fromkeys((candidates[i].source, *candidates[i].also)))
    return {i: tuple(sources[text]) for text, i in itertools.islice(best.items(), max_members)}


def to_hypothesis(
    candidate: Candidate, sources: Sequence[str], vocabulary: Vocabulary, normalize: Callable[[str], str]
) -> Hypothesis:
    """The member of a group that a candidate becomes; ``sources`` are those that :func:`build_members` gave for it."""
    text = normalize(vocabulary.ids_to_text(candidate.labels))
    return Hypothesis(text, candidate.labels, sources[0], tuple(sources[1:]))


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without repeated label sequences; each has the sources of all its repetitions."""
    first: dict[Labels, Candidate] = {}
    for new in candidates:
        known = first.setdefault(new.labels, new)
        names = dict.fromkeys((known.source, *known.also, new.source, *new.also))
        first[new.labels] = replace(known, also=tuple(names)[1:])
    return list(first.values())
