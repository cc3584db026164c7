"""How far the texts of other recognisers are trusted, set on the pool without labels.

A right text that another recogniser wrote is none that this one would have found: the frozen score, a weak
recogniser's, may hold it 60 nats below its own mistake, more than the LLM bridges at a small α. Where α is large
enough to bridge them, a source that writes fluent nonsense wins as well. So a text must first be *heard* in the audio,
which the frozen recogniser can tell by comparison, and what is heard is then level with its own best (ours):

1. Each text w_i of a source competes with texts w_j that the source wrote for other utterances, those nearest in
   length. The gap of a text is (max log p_ref(own members | x_i) − log p_ref(text | x_i)) per label of it. With S the
   share of these contests in which w_i has the smaller gap (a tie is half a win), the source hears the share
   π = 2·S − 1 of the utterances: what is heard wins, what is made up wins half the time. A π that is not three
   standard errors above what made-up texts give counts as 0.
2. The *trust* in the source is the largest gap l at which at most 5 % of the texts that are kept are made up: with F
   and F0 the shares of the gaps of its own and of the others' texts that are ≤ l, (1 − π)·F0(l) ≤ 0.05·F(l). This is
   the false discovery rate of Storey (2002), whose π0 is 1 − π. π = 0 gives a trust of 0.
3. A text whose gap is larger than the trust is no member. All others of the source get the bonus in nats that makes
   the best of them, in their group, level with the recogniser's best (:func:`bonuses`): the LLM chooses between them.

What EM over the sources as components of a mixture estimates, log(posterior share / share of members), is some nats
at most, whoever is right, and gives to nonsense what its fluency wins (docs/results/trust.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_llm_feedback.asr.heads import Labels
from nemo_llm_feedback.core.config import RewardConfig
from nemo_llm_feedback.core.config.sections import RESERVED_SOURCES
from nemo_llm_feedback.core.types import Hypothesis
from nemo_llm_feedback.hypotheses.nbest import NBestBatch

# Others' texts that each text competes with, standard errors of π that are evidence, and the share of made-up texts.
RIVALS, EVIDENCE, MADE_UP = 8, 3.0, 0.05


@dataclass(frozen=True)
class SourceTrust:
    """What the pool says of another recogniser.

    Attributes:
        heard: π, the share of its texts that it heard in the audio; 0 to 1.
        trust: the largest gap of a text that is kept, nats per label; 0 = none may be less probable than our own best.
        utterances: those with a text of the source that could be compared.
    """

    heard: float
    trust: float
    utterances: int

    def __str__(self) -> str:
        return f"heard {100 * self.heard:.0f} % of {self.utterances} utterances, trust {self.trust:g} nat per label"


def trust_text(found: Mapping[str, SourceTrust]) -> str:
    """What was found of every source, for logs and reports."""
    return "; ".join(f"{source} {of}" for source, of in found.items())


@dataclass(frozen=True)
class Contest:
    """The gap of a source's text of one utterance, and of its texts of others on the same audio; nats per label."""

    gap: float
    rivals: tuple[float, ...]


@dataclass(frozen=True)
class Trust:
    """How members of other recognisers are judged.

    Attributes:
        limits: source → :attr:`SourceTrust.trust`; a source that is not named has 0.
        weight: reward per nat of the bonus: the weight that log p_ref has in the reward.
    """

    limits: Mapping[str, float]
    weight: float = 1.0

    @classmethod
    def of(cls, settings: RewardConfig) -> Trust | None:
        """What the settings say; None where nothing is known: members of others are then judged as any."""
        return None if settings.trust is None else cls(settings.trust, settings.asr_weight)


def rivals(nbest: NBestBatch, *, head: str, count: int = RIVALS) -> dict[str, list[list[Labels]]]:
    """Other recogniser → per utterance its texts of others that are nearest in length; none where it has no text.

    Args:
        nbest: B utterances, judged without trust.
        head: whose log p says which of several texts of an utterance stands for the source.
        count: texts per utterance, at most.
    """
    found = {}
    names = {name for row in nbest.sources for member in row for name in member}
    for source in sorted(names - set(RESERVED_SOURCES)):
        texts = [best[1] if best else None for best in _best(nbest, source, head)]
        known = sorted({text for text in texts if text is not None})
        found[source] = [_nearest(text, known, after=b)[:count] if text else [] for b, text in enumerate(texts)]
    return found


def contests(
    nbest: NBestBatch,
    others: Mapping[str, Sequence[Sequence[Labels]]],
    logp: Sequence[Mapping[Labels, float]],
    *,
    head: str,
) -> dict[str, list[Contest]]:
    """Other recogniser → its contests, one per utterance that has a text of it, a member of our own and a rival.

    Args:
        nbest: B utterances, judged without trust.
        others: what :func:`rivals` gave for them.
        logp: B mappings, rival → log p_ref(rival | the utterance's audio).
        head: whose log p.
    """
    own = [_own_best(*row) for row in zip(nbest.hypotheses, nbest.ref_logp[head].tolist(), strict=True)]

    def gap(b: int, value: float, labels: Labels) -> float:
        """How far a text of an utterance is below its own best, nats per label."""
        return (own[b] - value) / max(1, len(labels))

    return {
        source: [
            Contest(gap(b, *text), tuple(gap(b, logp[b][rival], rival) for rival in texts[b]))
            for b, text in enumerate(_best(nbest, source, head))
            if text is not None and texts[b] and own[b] > -math.inf
        ]
        for source, texts in others.items()
    }


def source_trust(found: Sequence[Contest]) -> SourceTrust:
    """π and trust of a source by its contests, which may come from several ranks; see the head of this module.

    The share of r rivals that a made-up text beats is uniform on 0, 1/r, …, 1, whose variance is (r + 2) / (12·r).
    """
    if not found:
        return SourceTrust(0.0, 0.0, 0)
    won = [np.mean([(c.gap < rival) + (c.gap == rival) / 2 for rival in c.rivals]) for c in found]
    noise = 2 * math.sqrt(sum((len(c.rivals) + 2) / (12 * len(c.rivals)) for c in found)) / len(found)
    heard = 2 * float(np.mean(won)) - 1
    if heard <= EVIDENCE * noise:
        return SourceTrust(0.0, 0.0, len(found))
    gaps, made_up = np.array([c.gap for c in found]), np.array([gap for c in found for gap in c.rivals])
    limits = np.unique(np.concatenate([gaps, made_up]))
    kept = limits[np.isfinite(limits)]
    shares = np.array([[np.mean(made_up <= limit), np.mean(gaps <= limit)] for limit in kept])
    allowed = kept[(1 - heard) * shares[:, 0] <= MADE_UP * shares[:, 1]]
    trust = float(f"{max(0.0, allowed.max(initial=0.0)):.3g}")
    return SourceTrust(round(heard, 3), trust, len(found))


def trusted_sources(
    members: Sequence[Hypothesis], logp: Sequence[float], limits: Mapping[str, float]
) -> list[tuple[str, ...] | None]:
    """The other recognisers that each member of a group is trusted for; None = it is left out.

    Args:
        members: the group.
        logp: log p_ref of each member.
        limits: source → largest gap in nats per label; a source that is not in it has 0.

    Returns:
        () for our own members, which stay, whoever wrote them, too.
    """
    best = _own_best(members, logp)
    found: list[tuple[str, ...] | None] = []
    for member, value in zip(members, logp, strict=True):
        gap = (best - value) / max(1, len(member.tokens))
        others = [source for source in member.sources if source not in RESERVED_SOURCES]
        kept = tuple(source for source in others if gap <= limits.get(source, 0.0))
        found.append(kept if kept or is_own(member) else None)
    return found


def bonuses(members: Sequence[Hypothesis], logp: Sequence[float], trusted: Sequence[tuple[str, ...]]) -> list[float]:
    """What each member of a group gets for its sources, in nats.

    Args:
        members: the group, without those that are left out.
        logp: log p_ref of each member, of the same head or another.
        trusted: what :func:`trusted_sources` gave for them.

    Returns:
        0 for our own members. For those of source s max(0, A* − A_s), with A* the largest log p_ref of our own members
        and A_s that of the members that s is trusted for; of several sources the largest.
    """
    best = _own_best(members, logp)
    level: dict[str, float] = {}
    for value, sources in zip(logp, trusted, strict=True):
        level.update({source: max(value, level.get(source, -math.inf)) for source in sources})
    possible = best > -math.inf
    return [max((max(0.0, best - level[s]) for s in sources if possible), default=0.0) for sources in trusted]


def is_own(member: Hypothesis) -> bool:
    """Whether our own search found the member, maybe beside another recogniser."""
    return not set(RESERVED_SOURCES).isdisjoint(member.sources)


def _own_best(members: Sequence[Hypothesis], logp: Sequence[float]) -> float:
    """The largest log p of the members that our own search found; −inf where there is none."""
    return max(
        (v for v, m in zip(logp, members, strict=False) if is_own(m) and m.source != "reference"), default=-math.inf
    )


def _best(nbest: NBestBatch, source: str, head: str) -> list[tuple[float, Labels] | None]:
    """Per utterance the largest log p of a source's members, and that member."""
    rows = zip(nbest.hypotheses, nbest.ref_logp[head].tolist(), strict=True)
    return [
        max(((v, m.tokens) for v, m in zip(logp, members, strict=False) if source in m.sources), default=None)
        for members, logp in rows
    ]


def _nearest(text: Labels, known: Sequence[Labels], *, after: int) -> list[Labels]:
    """The other texts by their distance in length, equal ones by their place, so that not all meet the same few."""
    places = {other: (k - after) % len(known) for k, other in enumerate(known)}
    others = (other for other in known if other != text)
    return sorted(others, key=lambda other: (abs(len(other) - len(text)), places[other]))
