"""The report's list of utterances, with what the reward preferred in each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Comparison, Member
from nemo_llm_feedback.evaluation.report.data import Change
from nemo_llm_feedback.evaluation.report.words import (
    Aligned,
    Piece,
    TermRow,
    align,
    changed_words,
    diff_pieces,
    term_rows,
)

MAX_CARDS = 1500
"""Utterances on a page, the most changed first; more make it slow on a phone."""
_MAX_MEMBERS = 12


@dataclass(frozen=True)
class Line:
    """One transcript of a card; ``errors`` is None without reference."""

    label: str
    pieces: tuple[Piece, ...]
    errors: int | None = None


@dataclass(frozen=True)
class NBest:
    """The N-best of one utterance as the page shows it.

    Attributes:
        members: best first.
        rival: the member that the best is compared with: greedy's text, or the second where that is the best.
        why: score part → what it adds to the best member's lead over the rival, weighted as in the reward; empty
            where the reward is not such a sum.
    """

    members: tuple[Member, ...]
    rival: Member | None = None
    why: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, members: Sequence[Member], weights: Mapping[str, float] | None) -> NBest:
        """From members that are sorted by their reward, and the weights of its parts."""
        rival = next((m for m in members[1:] if m.source == "greedy"), members[1] if len(members) > 1 else None)
        why: dict[str, float] = {}
        if rival is not None and weights:
            lead = {name: value - rival.scores.get(name, math.nan) for name, value in members[0].scores.items()}
            why = {part: weight * lead.get(part, math.nan) for part, weight in weights.items()}
            if not math.isclose(sum(why.values()), lead.get("reward", math.nan), rel_tol=1e-3, abs_tol=1e-2):
                why = {}  # another reward than this sum, or a member that it could not judge
        return cls(tuple(members[:_MAX_MEMBERS]), rival, why)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the members' score parts."""
        return tuple(dict.fromkeys(name for m in self.members for name in m.scores))


@dataclass(frozen=True)
class Card:
    """One utterance as the page shows it.

    Attributes:
        id: the HTML id, for links.
        set_name: which set it belongs to.
        row: the manifest row.
        lines: reference, base and adapted transcript, as far as there are.
        change: words that differ between the first two systems; for one system its errors.
        gain: word errors that the second system has fewer than the first; None without reference or second system.
        flags: ``changed``, ``better``, ``worse``, ``wrong``, ``fixed`` and ``broken`` (of entities).
        groups: values of the manifest's group keys, e.g. the speaker.
        scores: score part → (before, after).
        nbest: system → its N-best, best first.
    """

    id: str
    set_name: str
    row: Row
    lines: tuple[Line, ...]
    change: int
    gain: int | None = None
    flags: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    nbest: Mapping[str, NBest] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The audio file, with the segment's start where it has one."""
        name = Path(self.row.audio).name
        return f"{name} at {self.row.offset:.1f} s" if self.row.offset else name

    @property
    def reward_gain(self) -> float | None:
        """The reward's rise from the transcript before to the one after; None where it could not judge them."""
        before, after = self.scores.get("reward", (math.nan, math.nan))
        return after - before if math.isfinite(after - before) else None


@dataclass(frozen=True)
class Listing:
    """All cards of a page, most changed first, and set → its terms with the id of a card to look at, "" where that is
    not on the page."""

    cards: tuple[Card, ...]
    total: int
    terms: Mapping[str, list[tuple[TermRow, str]]]

    @property
    def by_reward(self) -> list[Card]:
        """The cards whose transcripts were judged before and after, most gained first."""
        judged = [card for card in self.cards if card.reward_gain is not None]
        return sorted(judged, key=lambda card: -(card.reward_gain or 0.0))


def list_utterances(
    sets: Mapping[str, Comparison], changes: Sequence[Change], weights: Mapping[str, float] | None = None
) -> Listing:
    """The cards of all sets and of the changes without reference; beyond `MAX_CARDS` only the most changed.

    Args:
        sets: name → comparison.
        changes: utterances without reference.
        weights: score part → its weight in the reward; None where there are none.
    """
    cards: list[Card] = []
    terms = {}
    for k, (name, comparison) in enumerate(sets.items()):
        references, scores = comparison.scores[comparison.base].references, comparison.scores.values()
        aligned = [
            [align(references[u], s.hypotheses[u], comparison.spans[u]) for s in scores]
            for u in range(len(comparison.rows))
        ]
        cards += [_set_card(name, comparison, u, f"u{k}-{u}", aligned[u], weights) for u in range(len(aligned))]
        if rows := term_rows(comparison, aligned):
            terms[name] = [(row, f"u{k}-{row.row}") for row in rows]
    cards += [_change_card(change, i, weights) for i, change in enumerate(changes)]
    cards.sort(key=lambda card: (-card.change, -abs(card.gain or 0), card.name))
    shown = {card.id for card in cards[:MAX_CARDS]}
    linked = {name: [(row, card if card in shown else "") for row, card in rows] for name, rows in terms.items()}
    return Listing(tuple(cards[:MAX_CARDS]), len(cards), linked)


def _set_card(
    name: str,
    comparison: Comparison,
    u: int,
    card_id: str,
    aligned: Sequence[Aligned],
    weights: Mapping[str, float] | None,
) -> Card:
    """The card of one row of a set."""
    row, reference, spans = comparison.rows[u], comparison.scores[comparison.base].references[u], comparison.spans[u]
    judged = aligned[min(1, len(aligned) - 1)]
    change, gain, flags = judged.errors, None, {"wrong"} if judged.errors else set()
    if len(aligned) > 1:
        before, after = aligned[:2]
        recalled = zip(before.recalled, after.recalled, strict=True)
        flags |= {"fixed" if now else "broken" for was, now in recalled if was != now}
        texts = [comparison.scores[s.name].hypotheses[u] for s in comparison.systems[:2]]
        change, gain = changed_words(*texts), before.errors - after.errors
        flags |= {"changed"} if change else set()
        flags |= {"better"} if gain > 0 else {"worse"} if gain < 0 else set()
    lines = [Line("reference", align(reference, reference, spans).pieces)]
    lines += [Line(s.name, a.pieces, a.errors) for s, a in zip(comparison.systems, aligned, strict=True)]
    return Card(
        id=card_id,
        set_name=name,
        row=row,
        lines=tuple(lines),
        change=change,
        gain=gain,
        flags=tuple(sorted(flags)),
        groups=tuple(str(row.data[key]) for key in comparison.scoring.group_by if row.data.get(key) is not None),
        nbest={s.name: NBest.of(s.nbest[u], weights) for s in comparison.systems if s.nbest and s.nbest[u]},
    )


def _change_card(change: Change, index: int, weights: Mapping[str, float] | None) -> Card:
    before, after = diff_pieces(change.before, change.after)
    return Card(
        id=f"c-{index}",
        set_name="without reference",
        row=change.row,
        lines=(Line("base", before), Line("adapted", after)),
        change=changed_words(change.before, change.after),
        flags=("changed",),
        scores=change.scores,
        nbest={"adapted": NBest.of(change.nbest, weights)} if change.nbest else {},
    )
