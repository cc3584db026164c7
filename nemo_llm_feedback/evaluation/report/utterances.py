"""The report's list of utterances, and the entities that adaptation fixed or broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Comparison, Member
from nemo_llm_feedback.evaluation.report.data import Change
from nemo_llm_feedback.evaluation.report.words import Piece, align, changed_words, diff_pieces

MAX_CARDS = 1500
"""Utterances on a page, the most changed first; more make it slow on a phone."""
_MAX_MEMBERS = 12
_MAX_ENTITIES = 60


@dataclass(frozen=True)
class Line:
    """One transcript of a card; ``errors`` is None without reference."""

    label: str
    pieces: tuple[Piece, ...]
    errors: int | None = None


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
    nbest: Mapping[str, tuple[Member, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The audio file, with the segment's start where it has one."""
        name = Path(self.row.audio).name
        return f"{name} at {self.row.offset:.1f} s" if self.row.offset else name

    @property
    def nbest_parts(self) -> tuple[str, ...]:
        """Names of the members' score parts."""
        return tuple(dict.fromkeys(name for members in self.nbest.values() for m in members for name in m.scores))


@dataclass(frozen=True)
class EntityChange:
    """An entity that one system got right and the other did not, with how often and what was in its place."""

    text: str
    count: int
    heard: str
    card: str


@dataclass(frozen=True)
class Listing:
    """All cards of a page, most changed first, and set → the entities that were fixed, and those that were broken."""

    cards: tuple[Card, ...]
    total: int
    entities: Mapping[str, tuple[tuple[EntityChange, ...], tuple[EntityChange, ...]]]


def list_utterances(sets: Mapping[str, Comparison], changes: Sequence[Change]) -> Listing:
    """The cards of all sets and of the changes without reference; beyond `MAX_CARDS` only the most changed."""
    cards: list[Card] = []
    entities = {}
    for k, (name, comparison) in enumerate(sets.items()):
        mentions: list[_Mention] = []
        cards += [_set_card(name, comparison, i, f"u{k}-{i}", mentions) for i in range(len(comparison.rows))]
        if mentions:
            entities[name] = _counted(m for m in mentions if m.fixed), _counted(m for m in mentions if not m.fixed)
    cards += [_change_card(change, i) for i, change in enumerate(changes)]
    cards.sort(key=lambda card: (-card.change, -abs(card.gain or 0), card.name))
    return Listing(tuple(cards[:MAX_CARDS]), len(cards), entities)


class _Mention(NamedTuple):
    """A mention that one of the first two systems got right; ``heard`` is what the other has in its place."""

    text: str
    heard: str
    card: str
    fixed: bool


def _set_card(name: str, comparison: Comparison, i: int, card_id: str, mentions: list[_Mention]) -> Card:
    """The card of one row; appends to ``mentions`` the entities that only one of the first two systems got right."""
    row, reference, spans = comparison.rows[i], comparison.scores[comparison.base].references[i], comparison.spans[i]
    texts = [comparison.scores[s.name].hypotheses[i] for s in comparison.systems]
    aligned = [align(reference, text, spans) for text in texts]
    judged = aligned[min(1, len(aligned) - 1)]
    change, gain, flags = judged.errors, None, {"wrong"} if judged.errors else set()
    if len(texts) > 1:
        for k, span in enumerate(spans):
            if aligned[0].recalled[k] != (fixed := aligned[1].recalled[k]):
                text = " ".join(reference.split()[span.start : span.end])
                mentions.append(_Mention(text, aligned[not fixed].heard[k], card_id, fixed))
                flags.add("fixed" if fixed else "broken")
        change, gain = changed_words(*texts[:2]), aligned[0].errors - aligned[1].errors
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
        nbest={s.name: s.nbest[i][:_MAX_MEMBERS] for s in comparison.systems if s.nbest and s.nbest[i]},
    )


def _change_card(change: Change, index: int) -> Card:
    before, after = diff_pieces(change.before, change.after)
    return Card(
        id=f"c-{index}",
        set_name="without reference",
        row=change.row,
        lines=(Line("base", before), Line("adapted", after)),
        change=changed_words(change.before, change.after),
        flags=("changed",),
        scores=change.scores,
        nbest={"adapted": change.nbest[:_MAX_MEMBERS]} if change.nbest else {},
    )


def _counted(mentions: Iterable[_Mention]) -> tuple[EntityChange, ...]:
    """Equal entities as one line: the count, the most frequent wrong form, and the first card."""
    by_text: dict[str, list[_Mention]] = {}
    for mention in mentions:
        by_text.setdefault(mention.text, []).append(mention)
    out = [
        EntityChange(text, len(group), Counter(m.heard for m in group).most_common(1)[0][0], group[0].card)
        for text, group in by_text.items()
    ]
    return tuple(sorted(out, key=lambda e: (-e.count, e.text))[:_MAX_ENTITIES])
