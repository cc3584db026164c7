"""Checks settings: pydantic reads types and ranges, and every fault becomes a sentence with the key and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, ValidationError

from nemo_llm_feedback.core.config.renames import renamed
from nemo_llm_feedback.core.errors import ConfigError

T = TypeVar("T")
STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # a bool is not an int, "no" is not false; an int is a float

_SLIP = 0.85  # how like a known key an unknown one of an open section must be to be taken for a misspelling of it
_WANTED = {
    "int_type": "int",
    "float_type": "float",
    "bool_type": "bool",
    "string_type": "str",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "finite_number": "a finite number",
    "greater_than": "> {gt:g}",
    "greater_than_equal": "≥ {ge:g}",
    "less_than": "< {lt:g}",
    "less_than_equal": "≤ {le:g}",
    "literal_error": "one of {expected}",
}


class Section:
    """A section of the settings; its types and ranges are checked when it is made.

    Attributes:
        is_open: whether any other key may stand in it that is no misspelling of a known one.
    """

    is_open: ClassVar[bool] = False

    def validate(self) -> list[str]:
        """Returns what the values contradict each other in, as sentences."""
        return []


def build(cls: type[T], values: Any, *, where: str) -> tuple[T | None, list[str]]:
    """Makes a section from plain values, lists as tuples.

    Args:
        cls: a pydantic dataclass or model.
        values: values as read from YAML.
        where: name of the section, for the sentences; "" = none.

    Returns:
        The section, or None, and every unknown key and faulty value as a sentence.
    """
    if not isinstance(values, Mapping):
        return None, [f"{where} must be a section of keys, got {values!r}."]
    faults = key_faults(cls, values, where=where)
    kept = {key: value for key, value in values.items() if key in keys_of(cls)}
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}), faults
    except ValidationError as error:
        return None, faults + [_sentence(where, dict(fault)) for fault in error.errors()]


def make(cls: type[T], values: Any, *, where: str, what: str) -> T:
    """:func:`build`, with a ConfigError that lists all faults after ``what``."""
    section, faults = build(cls, values, where=where)
    refuse(what, faults)
    assert section is not None
    return section


def key_faults(cls: type, keys: Iterable[Any], *, where: str) -> list[str]:
    """Returns a sentence for every key that the section does not know, with its new name or the nearest known one."""
    faults = []
    is_open = getattr(cls, "is_open", False)
    known = keys_of(cls)
    for key in sorted(set(keys) - set(known), key=str):
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=_SLIP if is_open else 0.0)
        path, *right = [f"{where}.{name}" if where else str(name) for name in (key, *near)]
        if old := renamed(path):
            faults.append(old)
        elif right or not is_open:
            faults.append(f"unknown key {path}; {f'did you mean {right[0]}?' if right else 'there is none.'}")
    return faults


def refuse(what: str, faults: list[str]) -> None:
    """Raises a ConfigError that lists the faults, counted and one per line, if there are any."""
    if faults:
        head = "1 fault:" if len(faults) == 1 else f"{len(faults)} faults:"
        raise ConfigError(f"{what} {head}" + "".join(f"\n  - {fault}" for fault in faults))


def keys_of(cls: type) -> list[str]:
    """The keys of a section whose values are checked."""
    return list(cls.__pydantic_fields__)  # type: ignore[attr-defined]


def _sentence(where: str, fault: dict[str, Any]) -> str:
    value, context = fault["input"], fault.get("ctx", {})
    path = where + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"])
    path = path.removeprefix(".")
    if "missing" in fault["type"]:
        return f"{path} is missing."
    if fault["type"] == "literal_error":
        context = {"expected": context["expected"].replace("'", "").replace(" or ", ", ")}
    if fault["type"] == "value_error":
        words = str(context["error"])
        return f"{path}{words}" if words.startswith("=") else f"{path} {words}"
    wanted = _WANTED.get(fault["type"])
    wanted = wanted.format(**context) if wanted else f"valid ({fault['msg']})"
    return renamed(path, value) or f"{path} must be {wanted}, got {value!r}."
