"""Proposes hypotheses by beams, boosted beams, term swaps and samples, and merges those with equal texts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head, Labels, Vocabulary
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.types import Context, Hypothesis
from nemo_llm_feedback.hypotheses.boosting import Boosting
from nemo_llm_feedback.hypotheses.spelling import spelled_terms, without_unknown, written_labels
from nemo_llm_feedback.hypotheses.term_swaps import swap_terms

# Term swaps: how often a swapped text is swapped again, from how many texts, and how many swaps of each are scored.
_SWAP_ROUNDS, _SWAP_SEEDS, _SWAP_TRIED = 2, 4, 8

# Encoded audio's label sequences → [B, N] log p; see ``Head.score``.
Scorer = Callable[[Sequence[Sequence[Labels]]], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A label sequence with the source that first proposed it, the others that did, and its log p by the scorer."""

    labels: Labels
    source: str
    also: tuple[str, ...] = ()
    logp: float = math.nan


class Proposer:
    """Proposes label sequences for encoded audio with one head.

    Args:
        head: the policy's head; eval mode and no gradient are the caller's.
        config: number of candidates from each source, and the strength of boosting.
        generator: random numbers of the sampler; its state belongs into checkpoints. One with seed 0 if None.
        copies: whether a text that was sampled several times is as many members, as estimates over samples need it;
            to others a copy is a member more that pulls at the same text.
    """

    def __init__(
        self,
        head: Head,
        config: ProposalConfig,
        *,
        generator: torch.Generator | None = None,
        copies: bool = False,
    ) -> None:
        self._head, self.config, self._copies = head, config, copies
        self._generator = generator or torch.Generator().manual_seed(0)
        self._boosting = Boosting(head.vocabulary, config)

    @property
    def sampled_only(self) -> bool:
        """Whether members are samples of the policy and nothing else: greedy is not inserted."""
        config = self.config
        return not (config.beam or config.boosted or config.term_swap or config.llm_correction)

    @property
    def keeps_copies(self) -> bool:
        """Whether the multiplicity of samples counts."""
        return self.sampled_only and self._copies

    def same_weights(self) -> AbstractContextManager[None]:
        """Inside, where no weight may change, the searches may be captured (``proposals.cuda_graphs``)."""
        return self._head.cuda_graphs() if self.config.cuda_graphs else nullcontext()

    def propose(
        self,
        encoded: Tensor,
        lengths: Tensor,
        contexts: Sequence[Context],
        *,
        extra: Sequence[Sequence[Candidate]] = (),
        scorer: Scorer | None = None,
    ) -> list[list[Candidate]]:
        """Proposes scored candidates for every row; repeated label sequences are removed unless copies count.

        Args:
            encoded: [B, D, T] encoder output.
            lengths: [B] frames.
            contexts: B contexts, whose terms are boosted in the checkpoint's letters.
            extra: B lists of more candidates, which stand behind greedy, so that a full group does not lose them.
            scorer: gives the candidates' log p, by which swaps are chosen, in one call; None: the proposing head.

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
            lists = [spelled_terms(context.terms, self._head.vocabulary) for context in contexts]
            with_terms = [b for b in rows if lists[b]]
            if with_terms:
                kept = [lists[b] for b in with_terms]
                add("boosted", with_terms, self._boosted(encoded[with_terms], lengths[with_terms], kept))
        swaps = [self._swaps(row, context) for row, context in zip(found, contexts, strict=True)]
        for row, more in zip(found, extra, strict=False):
            row[1:1] = more
        if config.samples:
            add("samples", rows, self._head.sample(encoded, lengths, size=config.samples, generator=self._generator))
        if self.sampled_only:
            bare = [b for b in rows if not found[b]]
            if bare:  # no sample of a transducer has ended: one member alone gives no gradient
                add("greedy", bare, [[y] for y in self._greedy(encoded[bare], lengths[bare])])
        else:
            found = [distinct(candidates) for candidates in found]
        return self._scored(found, swaps, scorer or functools.partial(self._head.score, encoded, lengths))

    def _greedy(self, encoded: Tensor, lengths: Tensor) -> list[Labels]:
        return self._head.greedy(encoded, lengths, max_symbols=self.config.max_symbols)

    def _scored(
        self, found: list[list[Candidate]], swaps: list[list[list[Candidate]]], scorer: Scorer
    ) -> list[list[Candidate]]:
        """All candidates with their log p; of each round of swaps the most probable ones, before the samples."""
        joined = [[*row, *(c for part in rounds for c in part)] for row, rounds in zip(found, swaps, strict=True)]
        result = []
        for row, before, rounds in zip(scored(joined, scorer), found, swaps, strict=True):
            left = iter(row)
            members = [next(left) for _ in before]
            swapped = [sorted((next(left) for _ in part), key=lambda c: -c.logp) for part in rounds]
            best = [c for part in swapped for c in part[: self.config.term_swap]]
            others = sum(c.source != "samples" for c in members)
            whole = [*members[:others], *best, *members[others:]]
            result.append(whole if self.keeps_copies else distinct(whole))
        return result

    def _swaps(self, found: Sequence[Candidate], context: Context) -> list[list[Candidate]]:
        """Rounds of swaps: of the first candidates, then of the likeliest swaps of each of these."""
        rounds: list[list[Candidate]] = []
        by_source = itertools.groupby(found, key=lambda c: c.source)
        tops = itertools.zip_longest(*(list(row) for _, row in by_source))  # the best of every source first
        known, seeds = {c.labels for c in found}, distinct([c for tier in tops for c in tier if c])[:_SWAP_SEEDS]
        for _ in range(_SWAP_ROUNDS if self.config.term_swap and context.terms else 0):
            # The likeliest swap of every seed, then the second likeliest, …
            ranked = itertools.zip_longest(*(self._swapped(seed, context) for seed in seeds))
            swapped = distinct([c for tier in ranked for c in tier if c is not None and c.labels not in known])
            rounds.append(swapped)
            known |= {c.labels for c in swapped}
            seeds = swapped[:_SWAP_SEEDS]
        return rounds

    def _swapped(self, seed: Candidate, context: Context) -> list[Candidate]:
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

    def _boosted(self, encoded: Tensor, lengths: Tensor, lists: Sequence[tuple[str, ...]]) -> list[list[Labels]]:
        c, boosting = self.config, (self._boosting.of(lists, encoded.device), self.config.boosting_weight)
        return self._head.beam(encoded, lengths, size=c.boosted, max_symbols=c.max_symbols, boosting=boosting)


def scored(rows: Sequence[Sequence[Candidate]], scorer: Scorer) -> list[list[Candidate]]:
    """The candidates of every row with their log p."""
    with torch.no_grad():
        scores = scorer([[c.labels for c in row] for row in rows]).tolist()
    return [
        [replace(c, logp=logp) for c, logp in zip(row, found, strict=False)]
        for row, found in zip(rows, scores, strict=True)
    ]


def build_members(
    candidates: Sequence[Candidate],
    *,
    vocabulary: Vocabulary,
    normalize: Callable[[str], str],
    max_members: int,
    distinct: bool,
) -> list[Candidate]:
    """Chooses which candidates become members of a group.

    Two candidates whose texts are equal after normalisation are one member, the better-scored spelling, which all
    their sources have supplied; case and punctuation do not fill a group. Infeasible candidates (log p −inf) are left
    out unless nothing else is there.

    Args:
        candidates: scored, greedy first.
        vocabulary: the head's vocabulary.
        normalize: the run's text normalisation.
        max_members: largest group.
        distinct: False keeps repetitions (samples).

    Returns:
        Candidates in their order, at least one, each with all its sources, the first to propose it first.
    """
    feasible = [c for c in candidates if c.logp > -math.inf] or list(candidates[:1])
    if not distinct:
        return feasible[:max_members]
    best: dict[str, Candidate] = {}  # keeps the order in which the texts were seen first
    for candidate in feasible:
        text = _normalized(candidate.labels, vocabulary, normalize)
        known = best.setdefault(text, candidate)
        if known is not candidate:
            source, *also = dict.fromkeys((known.source, *known.also, candidate.source, *candidate.also))
            better = candidate if candidate.logp > known.logp else known
            best[text] = replace(better, source=source, also=tuple(also))
    return list(best.values())[:max_members]


@functools.lru_cache(maxsize=1 << 14)  # members are compared by text, and keep it
def _normalized(labels: Labels, vocabulary: Vocabulary, normalize: Callable[[str], str]) -> str:
    return normalize(vocabulary.ids_to_text(labels))


def to_hypothesis(candidate: Candidate, vocabulary: Vocabulary, normalize: Callable[[str], str]) -> Hypothesis:
    """The member of a group that a candidate becomes."""
    text = _normalized(candidate.labels, vocabulary, normalize)
    return Hypothesis(text, candidate.labels, candidate.source, candidate.also)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without repeated label sequences; each has the sources of all its repetitions."""
    first: dict[Labels, Candidate] = {}
    for new in candidates:
        known = first.setdefault(new.labels, new)
        if known is not new:
            names = dict.fromkeys((known.source, *known.also, new.source, *new.also))
            first[new.labels] = replace(known, also=tuple(names)[1:])
    return list(first.values())
