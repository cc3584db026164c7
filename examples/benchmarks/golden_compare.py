"""Two files of golden numbers compared to the last digit; see ``golden.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Old → new name of a metric or key, for comparisons with a file of code that called it otherwise.
RENAMES: dict[str, str] = {}


def _flat(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of every leaf; places are paths of keys, with numbers in brackets for the items of lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{place}{RENAMES.get(key, key)} ")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _flat(value, f"{place}[{number}] ")
    else:
        yield place, node


def compare(new: Any, old: Any) -> list[str]:
    """A line for every metric of a run whose values are not all the same, with its largest differences."""
    sides = dict(_flat(old)), dict(_flat(new))
    unequal: dict[str, list[tuple[Any, Any]]] = {}
    for place in sides[0]:  # what only the new code writes down has nothing to be compared with
        a, b = (side.get(place, "absent") for side in sides)
        if a != b and (a == a or b == b):
            unequal.setdefault(re.sub(r"\[\d+\] ", "", place), []).append((a, b))
    lines = []
    for metric, pairs in unequal.items():
        numbers = [(a, b) for a, b in pairs if not {type(a), type(b)} - {int, float}]
        line = f"{metric}: {len(pairs)} values differ"
        if numbers:
            relative = max(abs(a - b) / max(abs(a), abs(b), 1e-300) for a, b in numbers)
            line += f", numbers by up to {max(abs(a - b) for a, b in numbers):.3g} (relative {relative:.3g})"
        others = [(a, b) for a, b in pairs if {type(a), type(b)} - {int, float}]
        lines.append(line + "".join(f"; old {str(a)[:60]!r}, new {str(b)[:60]!r}" for a, b in others[:1]))
    return lines


def report(new: dict[str, Any], old: dict[str, Any]) -> int:
    """Prints what differs from the old file and returns the number of runs that do; one in it alone does not."""
    found = {name: compare(new[name], old[name]) if name in old else ["not in the old file"] for name in new}
    for name, lines in found.items():
        print(name, *lines or ["the same"], sep="\n  " if lines else ": ")
    differing = sum(bool(lines) for lines in found.values())
    print(f"{len(new)} runs, {differing} differ; {len(set(old) - set(new))} runs of the old file were not run")
    return differing
