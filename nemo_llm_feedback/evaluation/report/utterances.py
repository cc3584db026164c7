"""The list of utterances and the entities that were fixed or broken, from comparisons and from changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Comparison, Member
from nemo_llm_feedback.evaluation.report.data import Change
from nemo_llm_feedback.evaluation.report.words import (
    Aligned,
    Piece,
    align,
    changed_words,
    diff_pieces,
    reference_pieces,
)

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
        id: anchor on the page.
        set_name: which set it belongs to.
        name: of the audio file, with the segment's start where it has one.
        row: the manifest row.
        lines: reference, base, adapted, as far as there are.
        change: words that differ between the first two systems; for one system its errors.
        gain: word errors that the second system has fewer than the first; None without reference or second system.
        flags: ``changed``, ``better``, ``worse``, ``wrong``, ``fixed`` and ``broken`` (of entities).
        groups: manifest keys worth a chip, e.g. the speaker.
        scores: score part → (before, after).
        nbest: system → its N-best, best first.
        nbest_parts: names of the members' score parts.
    """

    id: str
    set_name: str
    name: str
    row: Row
    lines: tuple[Line, ...]
    change: int
    gain: int | None
    flags: tuple[str, ...]
    groups: tuple[str, ...] = ()
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    nbest: Mapping[str, tuple[Member, ...]] = field(default_factory=dict)
    nbest_parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EntityChange:
    """An entity that one system got right and the other did not, with how often and what stood in its place."""

    text: str
    count: int
    heard: str
    card: str


@dataclass(frozen=True)
class Listing:
    """All cards of a page, most changed first, and the entities of each set that were fixed and broken."""

    cards: tuple[Card, ...]
    total: int
    fixed: Mapping[str, tuple[EntityChange, ...]]
    broken: Mapping[str, tuple[EntityChange, ...]]


def list_utterances(sets: Mapping[str, Comparison], changes: Sequence[Change]) -> Listing:
    """The cards of all sets and of the changes without reference; beyond `MAX_CARDS` only the most changed."""
    cards: list[Card] = []
    fixed: dict[str, tuple[EntityChange, ...]] = {}
    broken: dict[str, tuple[EntityChange, ...]] = {}
    for k, (name, comparison) in enumerate(sets.items()):
        own, better, worse = _set_cards(name, comparison, prefix=f"u{k}")
        cards += own
        if len(comparison.systems) > 1:
            fixed[name], broken[name] = _counted(better), _counted(worse)
    cards += [_change_card(change, i) for i, change in enumerate(changes)]
    cards.sort(key=lambda card: (-card.change, -abs(card.gain or 0), card.name))
    return Listing(tuple(cards[:MAX_CARDS]), len(cards), fixed, broken)


_Mention = tuple[str, str, str]  # entity, what was heard instead, card


def _set_cards(name: str, comparison: Comparison, *, prefix: str) -> tuple[list[Card], list[_Mention], list[_Mention]]:
    first = comparison.scores[comparison.base]
    cards, better, worse = [], [], []
    for i, row in enumerate(comparison.rows):
        reference, spans = first.references[i], comparison.spans[i]
        texts = [comparison.scores[s.name].hypotheses[i] for s in comparison.systems]
        aligned = [align(reference, text, spans) for text in texts]
        card_id = f"{prefix}-{i}"
        flags = set()
        if len(aligned) > 1:
            mentions = list(_mentions(reference, spans, aligned[0], aligned[1]))
            better += [(text, heard, card_id) for text, heard, up in mentions if up]
            worse += [(text, heard, card_id) for text, heard, up in mentions if not up]
            flags |= {"fixed" if up else "broken" for _, _, up in mentions}
        change = changed_words(texts[0], texts[1]) if len(texts) > 1 else aligned[0].errors
        gain = aligned[0].errors - aligned[1].errors if len(aligned) > 1 else None
        flags |= {"changed"} if len(texts) > 1 and change else set()
        flags |= {"better"} if gain and gain > 0 else {"worse"} if gain and gain < 0 else set()
        flags |= {"wrong"} if aligned[min(1, len(aligned) - 1)].errors else set()
        lines = [Line("reference", reference_pieces(reference, spans))]
        lines += [Line(s.name, a.pieces, a.errors) for s, a in zip(comparison.systems, aligned, strict=True)]
        nbest = {s.name: s.nbest[i][:_MAX_MEMBERS] for s in comparison.systems if s.nbest and s.nbest[i]}
        groups = tuple(str(row.data[key]) for key in comparison.scoring.group_by if row.data.get(key) is not None)
        cards.append(
            Card(
                card_id,
                name,
                _name(row),
                row,
                tuple(lines),
                change,
                gain,
                tuple(sorted(flags)),
                groups,
                nbest=nbest,
                nbest_parts=_parts(m for members in nbest.values() for m in members),
            )
        )
    return cards, better, worse


def _change_card(change: Change, index: int) -> Card:
    before, after = diff_pieces(change.before, change.after)
    nbest = {"candidates": change.nbest[:_MAX_MEMBERS]} if change.nbest else {}
    return Card(
        f"c-{index}",
        "without reference",
        _name(change.row),
        change.row,
        (Line("base", before), Line("adapted", after)),
        changed_words(change.before, change.after),
        None,
        ("changed",),
        scores=change.scores,
        nbest=nbest,
        nbest_parts=_parts(iter(change.nbest)),
    )


def _mentions(reference: str, spans: Sequence, base: Aligned, other: Aligned) -> Iterator[tuple[str, str, bool]]:
    """(entity, what the system that is wrong has in its place, whether the second system is the right one)."""
    words = reference.split()
    for k, span in enumerate(spans):
        if base.recalled[k] != other.recalled[k]:
            up = other.recalled[k]
            yield " ".join(words[span.start : span.end]), (base if up else other).heard[k] or "(nothing)", up


def _counted(mentions: Sequence[_Mention]) -> tuple[EntityChange, ...]:
    """Alike entities as one line: the count, the most frequent wrong form, and the first card."""
    by_text: dict[str, list[_Mention]] = {}
    for mention in mentions:
        by_text.setdefault(mention[0], []).append(mention)
    out = [
        EntityChange(text, len(group), Counter(heard for _, heard, _ in group).most_common(1)[0][0], group[0][2])
        for text, group in by_text.items()
    ]
    return tuple(sorted(out, key=lambda e: (-e.count, e.text))[:_MAX_ENTITIES])


def _name(row: Row) -> str:
    name = Path(row.audio).name
    return f"{name} at {row.offset:.1f} s" if row.offset else name


def _parts(members: Iterator[Member]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for member in members for name in member.scores))
