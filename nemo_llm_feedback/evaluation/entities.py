"""Entities of a manifest: strings or word spans, with an optional type, and where they occur in the reference.

Where a manifest marks none, the context's terms that a reference holds are its entities.

The manifest key holds a list whose items are strings, word spans ``[start, end)`` counted from 0 (in scripts without
spaces each character is a word, see ``core.text.words``), or objects
``{"text": …}``, ``{"span": [start, end]}`` or ``{"start": …, "end": …}`` with an optional ``type``; or an object that
maps each type to a string or a list of such items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_llm_feedback.core.errors import ManifestError, list_faults
from nemo_llm_feedback.core.text import occurrences, term_spans, word_spans, words
from nemo_llm_feedback.data.manifests import Row

Entity = str | Sequence[int]
"""An entity string, or the half-open span [start, end) of its words in the reference, counted from 0."""


@dataclass(frozen=True)
class TypedEntity:
    """One entity as the manifest lists it; ``type`` is ``""`` where none is given."""

    entity: Entity
    type: str = ""


@dataclass(frozen=True)
class MissingEntity:
    """An entity that the manifest lists but that is not in its reference after normalisation."""

    utterance: int
    entity: str


@dataclass(frozen=True)
class Span:
    """Words [start, end) of a normalised reference that are an entity mention; ``types`` sorted, without ``""``."""

    start: int
    end: int
    types: tuple[str, ...] = ()


def parse_entities(value: Any, *, type: str = "") -> list[TypedEntity]:
    """The entities of one manifest row, in the order of the manifest.

    Args:
        value: value of the manifest's key, in a form of the module's docstring; None, ``""`` and ``[]`` are none.
        type: entity type of items that name none.

    Raises:
        ValueError: another form; the message names the item.
    """
    if value is None or value in ("", []):
        return []
    if isinstance(value, Mapping):
        if not {"text", "span", "start"} & set(value):
            return [e for name, items in value.items() for e in parse_entities(items, type=str(name))]
        found = value.get("text") or value.get("span") or [value.get("start"), value.get("end")]
        if not isinstance(found, str) and not (_is_span(found) and len(found) == 2):
            raise ValueError(f"{dict(value)!r} has neither a `text` nor a word span [start, end)")
        return parse_entities(found, type=str(value.get("type") or type))
    if isinstance(value, str):
        return [TypedEntity(value, type)]
    if _is_span(value):
        return [TypedEntity(tuple(value), type)]
    if not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is neither a string nor a span [start, end)")
    return [e for item in value for e in parse_entities(item, type=type)]


def _is_span(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(edge, int) and not isinstance(edge, bool) for edge in value)


def row_entities(rows: Sequence[Row], key: str = "entities") -> list[list[TypedEntity]]:
    """The entities of each row, under this key of the manifest.

    Raises:
        ManifestError: entities of unknown form, or spans outside their text; all of them listed.
    """
    out, faults = [], []
    for row in rows:
        try:
            out.append(parse_entities(row.data.get(key)))
            for found in out[-1]:
                _check_entity(row.text, found.entity)
        except ValueError as error:
            faults.append(f"{row.origin}: `{key}`: {error}")
    if faults:
        raise ManifestError(list_faults(f"{len(faults)} row(s) have entities that cannot be read:", faults))
    return out


def entities_or_terms(
    rows: Sequence[Row], terms: Sequence[Sequence[str]], clean: Callable[[str], str], *, key: str = "entities"
) -> list[list[TypedEntity]]:
    """The entities of each row; where no row has any, the terms of its list that its reference holds.

    Args:
        rows: with text.
        terms: the list of each row.
        clean: the normalisation.
        key: of the manifest.

    Raises:
        ManifestError: entities of unknown form, or spans outside their text; all of them listed.
    """
    marked = row_entities(rows, key)
    if any(marked):
        return marked
    split = _word_splitter(clean)
    return [_spoken(row.text, listed, split) for row, listed in zip(rows, terms, strict=True)]


def _spoken(raw: str, terms: Sequence[str], split: Callable[[str], Sequence[str]]) -> list[TypedEntity]:
    """The mentions of terms in a reference, the longest where they overlap, as spans of its words."""
    units = [(unit, i) for i, (start, end) in enumerate(word_spans(raw)) for unit in split(raw[start:end])]
    found = term_spans([unit for unit, _ in units], terms, split=split)
    return [TypedEntity((units[start][1], units[end - 1][1] + 1)) for start, end, _ in found]


@functools.lru_cache(maxsize=8)  # one object per normalisation, by which `term_spans` knows its lists again
def _word_splitter(clean: Callable[[str], str]) -> Callable[[str], Sequence[str]]:
    return lambda text: words(clean(text))


def locate_all(
    raw: Sequence[str], refs: Sequence[str], entities: Sequence[Sequence[Entity]] | None, clean: Callable[[str], str]
) -> tuple[list[set[tuple[int, int]]], list[MissingEntity]]:
    """The word spans of all entity mentions of each utterance, and the entities that have none.

    Args:
        raw: references as given, which spans refer to.
        refs: the same, normalised.
        entities: the entities of each utterance; None = no utterance has any.
        clean: the normalisation.

    Raises:
        ManifestError: a span outside its reference, or of another form.
    """
    spans: list[set[tuple[int, int]]] = [set() for _ in refs]
    missing = []
    for u, listed in enumerate(entities or ()):
        for entity in listed:
            found = locate(raw[u], refs[u], entity, clean, utterance=u)
            spans[u] |= found
            if not found:
                missing.append(MissingEntity(u, entity if isinstance(entity, str) else str(list(entity))))
    return spans, missing


def locate(
    raw: str, ref: str, entity: Entity, clean: Callable[[str], str], *, utterance: int = 0
) -> set[tuple[int, int]]:
    """The spans of one entity in a normalised reference; every occurrence of a string is a mention."""
    try:
        _check_entity(raw, entity)
    except ValueError as error:
        raise ManifestError(f"utterance {utterance}: {error}") from None
    if isinstance(entity, str):
        found = set(occurrences(words(ref), words(clean(entity))))
    else:
        places = word_spans(raw)
        # Normalisation may drop or split words.
        start, end = (len(words(clean(raw[: places[edge - 1][1] if edge else 0]))) for edge in entity)
        found = {(start, end)}
    return {(start, end) for start, end in found if end > start}


def _check_entity(raw: str, entity: Entity) -> None:
    """Raises a ValueError for what is neither a string nor a span of the text's words."""
    count = 0 if isinstance(entity, str) else len(word_spans(raw))
    if isinstance(entity, str) or (_is_span(entity) and len(entity) == 2 and 0 <= entity[0] < entity[1] <= count):
        return
    raise ValueError(
        f"entity {entity!r} is neither a string nor a word span [start, end) with 0 <= start < end <= {count}, the "
        f"words (not the characters) of '{raw}'"
    )


def typed_spans(raw: str, ref: str, entities: Sequence[TypedEntity], clean: Callable[[str], str]) -> tuple[Span, ...]:
    """The entity mentions of one reference with all types that each has, in order."""
    types: dict[tuple[int, int], set[str]] = {}
    for item in entities:
        for span in locate(raw, ref, item.entity, clean):
            types.setdefault(span, set()).update({item.type} - {""})
    return tuple(Span(*span, tuple(sorted(names))) for span, names in sorted(types.items()))
