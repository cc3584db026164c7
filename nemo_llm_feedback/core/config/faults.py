"""How the sections state their faults: as sentences that name the key and the fix."""

from __future__ import annotations

from typing import Any


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
