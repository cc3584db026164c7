"""The records that the rooms hand to each other: contexts, hypotheses, groups of them, rewards and audio."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What is known about the domain or the utterance: a description in words, a list of terms that may occur, and
    the utterances before this one, oldest first."""

    description: str = ""
    terms: tuple[str, ...] = ()
    previous: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.description.strip() or self.terms or self.previous)


@dataclass(frozen=True)
class ExternalText:
    """What another recogniser wrote for an utterance: an entry of the manifest key ``hypotheses``.

    Attributes:
        text: the transcript as it was written.
        source: the recogniser's name.
        score: its score of the text, higher is better; None where there is none.
    """

    text: str
    source: str = "external"
    score: float | None = None


@dataclass(frozen=True)
class Hypothesis:
    """One candidate transcript of one utterance.

    Attributes:
        text: the transcript after the run's text normalisation; what rewards see.
        tokens: label ids of the ASR vocabulary, without blank; what the likelihood scores.
        source: the proposer that supplied it first: ``greedy``, ``beam``, ``boosted``, … or another recogniser's name.
        also: the others that supplied it.
    """

    text: str
    tokens: tuple[int, ...]
    source: str = "beam"
    also: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """All that supplied it, each once."""
        return (self.source, *self.also)


@dataclass(frozen=True)
class HypothesisGroup:
    """The hypotheses of one utterance, with what a reward may read.

    Attributes:
        utterance: a name that is stable over epochs (audio path and offset); cache key and log line.
        hypotheses: the members, at least one.
        context: the utterance's context merged over the run's.
        ref_logp: log p(member | audio) under the frozen reference ASR model, natural log, one value per member
            (−inf where the audio is too short for it); empty when no reference was asked for.
        reference: the row's own text under the run's normalisation; "" where it has none, or is not learned by it.
    """

    utterance: str
    hypotheses: tuple[Hypothesis, ...]
    context: Context = field(default_factory=Context)
    ref_logp: tuple[float, ...] = ()
    reference: str = ""

    def __len__(self) -> int:
        return len(self.hypotheses)

    @property
    def texts(self) -> tuple[str, ...]:
        """The members' transcripts, in the group's order."""
        return tuple(h.text for h in self.hypotheses)


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of a batch of groups.

    Attributes:
        values: [B, N] reward of hypothesis n of group b, higher is better; NaN where the reward cannot judge and on
            the padding of groups with fewer than N members. Float32 on the CPU.
        parts: component name → [B, N] unweighted component (``llm``, ``asr``, ``length`` …), NaN as in ``values``.
        revalue: [B, N] reference log p → [B, N] values, where they depend on it; None where they do not.
    """

    values: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    revalue: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)

    def with_reference(self, ref_logp: Tensor) -> Tensor:
        """The values of the same judgement beside another head's reference, without judging again.

        Args:
            ref_logp: [B, N] log p(hypothesis n | audio) of group b under that head's reference, natural log; −∞ where
                the audio is too short for it. The padding may hold anything.

        Returns:
            [B, N] values as a call on groups with these ``ref_logp`` would give; those of a reward that has no ASR
            term are unchanged.
        """
        return self.values if self.revalue is None else self.revalue(ref_logp)


def pad_groups(
    rows: Sequence[Sequence[float]], *, fill: float = math.nan, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Stacks ragged rows of floats into a [B, N] tensor, N the longest row, padded with ``fill``."""
    if not rows:
        return torch.zeros(0, 0, dtype=dtype)
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


@dataclass(frozen=True)
class Audio:
    """The audio of a batch's rows that are learned from feedback.

    Attributes:
        signal: [B, S] waveform samples.
        signal_len: [B] samples.
        utterances: B names.
        contexts: B contexts, merged over the run's.
        external: B rows of other recognisers' texts; empty where there are none at all.
        texts: B transcripts, "" where a row has none; empty where none has.
    """

    signal: Tensor
    signal_len: Tensor
    utterances: tuple[str, ...]
    contexts: tuple[Context, ...]
    external: tuple[tuple[ExternalText, ...], ...] = ()
    texts: tuple[str, ...] = ()

    def select(self, rows: Sequence[int]) -> Audio:
        """The utterances at these positions, with the padding that they have."""
        chosen = list(rows)
        return Audio(
            self.signal[chosen],
            self.signal_len[chosen],
            tuple(self.utterances[b] for b in chosen),
            tuple(self.contexts[b] for b in chosen),
            tuple(self.external[b] for b in chosen if self.external),
            texts=tuple(self.texts[b] for b in chosen if self.texts),
        )
