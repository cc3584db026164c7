"""Hides keys and tokens in everything that a run writes about itself: settings, command line, report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "(hidden)"
_NAMES = r"(?:(?:api|access)[_-]?key|token|secret|password|passwd|credentials?|authorization)"
_NAME = re.compile(rf"(?:^|[._-]){_NAMES}$", re.IGNORECASE)
_IN_TEXT = re.compile(rf"([{{,]\s*(?:\w+[._-])?{_NAMES}\s*:\s*)[^,}}]+", re.IGNORECASE)  # of a Hydra dictionary
_IN_ADDRESS = re.compile(r"(://)[^/@\s]+@")


def masked(node: Any, key: str = "") -> Any:
    """Settings as plain containers, with the values of secret keys and the passwords in addresses hidden.

    Args:
        node: nested mappings and lists.
        key: name of the node, by which it is known to be secret; an empty value stays as it is.
    """
    if isinstance(node, Mapping):
        return {str(name): masked(value, str(name)) for name, value in node.items()}
    if node and _NAME.search(key):
        return HIDDEN
    if isinstance(node, (list, tuple)):
        return [masked(item) for item in node]
    if isinstance(node, str):
        return _IN_ADDRESS.sub(rf"\1{HIDDEN}@", node)
    return node if isinstance(node, (int, float)) or node is None else str(node)


def masked_command(arguments: Sequence[str]) -> list[str]:
    """A command line with secrets hidden: ``key=value``, ``--key value`` and ``{key: value}``."""
    shown: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        if before.startswith("-") and _NAME.search(before):
            shown.append(HIDDEN)
        elif equals:
            shown.append(f"{name}=" + _IN_TEXT.sub(rf"\1{HIDDEN}", masked(value, name)))
        else:
            shown.append(masked(argument))
    return shown
