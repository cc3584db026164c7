"""How the sections state their faults: as sentences that name the key and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError


def choice(name: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    """Returns a fault if the value is not one of the allowed ones."""
    return [] if value in allowed else [f"{name}={value!r} must be one of {', '.join(allowed)}."]


def positive(section: str, config: Any, *names: str) -> list[str]:
    """Returns a fault for each named attribute that is not > 0."""
    return [f"{section}.{n} must be > 0, got {getattr(config, n)}." for n in names if not getattr(config, n) > 0]


def non_negative(section: str, config: Any, *names: str) -> list[str]:
    """Returns a fault for each named attribute that is not ≥ 0."""
    return [f"{section}.{n} must be ≥ 0, got {getattr(config, n)}." for n in names if not getattr(config, n) >= 0]


def listing(faults: list[str]) -> str:
    """Returns the faults as one text, counted and one a line."""
    head = "1 fault:" if len(faults) == 1 else f"{len(faults)} faults:"
    return head + "".join(f"\n  - {fault}" for fault in faults)


def sentences(error: ValidationError, section: str, known: Iterable[str]) -> list[str]:
    """Returns what pydantic found, one sentence per fault; an unknown key comes with the nearest of the known ones."""
    faults = []
    for fault in error.errors(include_url=False):
        key = ".".join((section, *map(str, fault["loc"])))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(fault["loc"][-1]), list(known), n=1, cutoff=0.0)
            faults.append(
                f"unknown key {key}" + (f"; did you mean {section}.{near[0]}?" if near else ": there is none.")
            )
        elif fault["type"] == "missing":
            faults.append(f"{key} is missing.")
        elif fault["type"] == "value_error":
            words = str(fault["ctx"]["error"])
            faults.append(f"{key}{words if words.startswith('=') else f' {words}'}")
        else:
            faults.append(f"{key}={fault['input']!r}: {fault['msg'].lower()}.")
    return faults
