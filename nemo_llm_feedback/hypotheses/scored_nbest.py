"""Scored groups of a manifest for a model as it is, without training; for looks, rescoring, tuning and oracles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nemo_llm_feedback.asr.encoded_rows import encoded_rows
from nemo_llm_feedback.asr.heads import Head, heads_of
from nemo_llm_feedback.asr.reference import FrozenReference
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.core.types import Audio, Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.hypotheses.groups import GroupMaker, ScoredGroup
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.rewards import Reward

Corrector = Callable[[Sequence[Context], Sequence[Sequence[str]]], Sequence[str | None]]


@dataclass(frozen=True)
class NBestSettings:
    """How the groups of a manifest are made.

    Attributes:
        proposals: how many members from which source, and the largest group.
        run_context: merged under each row's own.
        head: ``ctc``, ``transducer``, or ``auto`` = the one that ``transcribe`` would use.
        normalizer: name of the text normalisation of the members.
        batch_size: rows a batch.
        memory_budget_mb: of the transducer likelihood.
        seed: of the sampler.
    """

    proposals: ProposalConfig
    run_context: Context
    head: str = "auto"
    normalizer: str = "basic"
    batch_size: int = 16
    memory_budget_mb: int = 512
    seed: int = 0


@dataclass(frozen=True)
class JudgedReference:
    """A row's own text as a further member of its group.

    Attributes:
        scored: the row's members followed by the reference, judged together.
        feasible: whether the audio is long enough for the reference; its rewards mean nothing otherwise.
    """

    scored: ScoredGroup
    feasible: bool


@torch.no_grad()
def scored_groups(
    model: Any,
    rows: Sequence[Row],
    *,
    settings: NBestSettings,
    reward: Reward | None,
    corrector: Corrector | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[ScoredGroup]:
    """Proposes, scores and judges the N-best of every row; the model's train/eval state is left as it was.

    Args:
        model: a NeMo CTC, transducer or hybrid model; it proposes and is its own reference (``parts["asr"]``).
        rows: manifest rows, not tarred.
        settings: how the groups are made.
        reward: judges them; None leaves rewards at 0 (for oracles).
        corrector: writes one more member a group, see ``GroupMaker``.
        on_batch: receives the number of rows done.

    Returns:
        One group a row, in the rows' order; greedy is the first member unless all are samples.

    Raises:
        RewardError, LLMError: the reward cannot work at all.
    """
    itself = _Itself(model, settings)
    maker = GroupMaker(
        Proposer(itself.heads[0], settings.proposals, seed=settings.seed),
        cast(FrozenReference, itself),
        reward,
        normalize=get_normalizer(settings.normalizer),
        max_members=settings.proposals.max_members,
    )
    maker.corrector = corrector
    found: dict[int, ScoredGroup] = {}
    for indices, audio, encoded, lengths in itself.batches(rows, settings):
        found.update(zip(indices, maker.make(audio, encoded, lengths), strict=True))
        on_batch(len(found))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def judged_references(
    model: Any,
    rows: Sequence[Row],
    groups: Sequence[ScoredGroup],
    *,
    settings: NBestSettings,
    reward: Reward,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[JudgedReference | None]:
    """Judges the rows' own texts beside the members of their groups: does the reward prefer the truth?

    Args:
        model, rows, settings, reward, on_batch: as in :func:`scored_groups`.
        groups: what it returned for these rows.

    Returns:
        One entry a row, None where it has no text. The reference's acoustic score is that of the better of its
        spellings as given and as normalised.
    """
    itself = _Itself(model, settings)
    head, normalize = itself.heads[0], get_normalizer(settings.normalizer)
    judged: list[JudgedReference | None] = [None] * len(rows)
    labelled = [i for i, row in enumerate(rows) if row.text]
    done = 0
    for positions, _, encoded, lengths in itself.batches([rows[i] for i in labelled], settings):
        indices = [labelled[p] for p in positions]
        references = _spelled(head, encoded, lengths, [rows[i].text for i in indices], normalize, settings)
        extended = [
            _extended(groups[i].group, reference, logp)
            for i, (reference, logp) in zip(indices, references, strict=True)
        ]
        output = reward(extended)
        for b, (i, group) in enumerate(zip(indices, extended, strict=True)):
            scored = ScoredGroup(
                group,
                rewards={head.name: output.values[b, : len(group)].tolist()},
                ref_logp={head.name: list(group.ref_logp)},
                parts={name: part[b, : len(group)].tolist() for name, part in output.parts.items()},
            )
            judged[i] = JudgedReference(scored, group.ref_logp[-1] > float("-inf"))
        done += len(indices)
        on_batch(done)
    return judged


class _Itself:
    """A model as its own frozen reference: nothing is copied, and audio is encoded once."""

    def __init__(self, model: Any, settings: NBestSettings) -> None:
        self._model = model
        self.heads: list[Head] = heads_of(model, which=settings.head, memory_budget_mb=settings.memory_budget_mb)[:1]
        self._encoded: tuple[Tensor, Tensor] | None = None

    def encode(self, signal: Tensor, signal_len: Tensor) -> tuple[Tensor, Tensor]:
        """What the batch's audio was encoded to; ``GroupMaker`` asks its reference for it."""
        assert self._encoded is not None
        return self._encoded

    def batches(
        self, rows: Sequence[Row], settings: NBestSettings
    ) -> Iterator[tuple[tuple[int, ...], Audio, Tensor, Tensor]]:
        """Yields positions among the rows, their audio, [B, D, T] encoder output and [B] frames."""
        for indices, audio, encoded, lengths in encoded_rows(
            self._model, rows, batch_size=settings.batch_size, run_context=settings.run_context
        ):
            self._encoded = encoded, lengths
            yield indices, audio, encoded, lengths


def _spelled(
    head: Head,
    encoded: Tensor,
    lengths: Tensor,
    texts: Sequence[str],
    normalize: Callable[[str], str],
    settings: NBestSettings,
) -> list[tuple[Hypothesis, float]]:
    """Each reference with the more probable of its two spellings' labels, and that log p."""
    spellings = [[tuple(head.vocabulary.text_to_ids(t)) for t in (text, normalize(text))] for text in texts]
    trie = PrefixTrie.build(
        [list(ids) for pair in spellings for ids in pair], [b for b, pair in enumerate(spellings) for _ in pair]
    )
    flat = head.log_prob(encoded, lengths, trie.to(encoded.device))
    logp = flat.view(-1, 2).tolist()
    return [
        (Hypothesis(normalize(text), pair[int(second > first)], "reference"), max(first, second))
        for text, pair, (first, second) in zip(texts, spellings, logp, strict=True)
    ]


def _extended(group: HypothesisGroup, reference: Hypothesis, logp: float) -> HypothesisGroup:
    return dataclasses.replace(group, hypotheses=(*group.hypotheses, reference), ref_logp=(*group.ref_logp, logp))
