"""Settings of the context: what is known about the domain, and how terms are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section
from nemo_llm_feedback.core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_llm_feedback.core.types import Context


@dataclass(frozen=True, config=STRICT)
class ContextConfig(Section):
    """What is known about the domain.

    Attributes:
        description: completes "The following is a transcript of …", e.g. ``an order at a coffee shop``.
        terms: terms that may occur.
        terms_file: one term a line, a JSON list, or a JSON object of lists.
        required: False lets the LLM reward run without any context.
    """

    description: str = ""
    terms: tuple[str, ...] = ()
    terms_file: str | None = None
    required: bool = True

    def validate(self) -> list[str]:
        """Returns every fault of this section as a sentence."""
        try:
            self.load()
        except ConfigError as error:
            return [str(error)]
        return []

    def load(self) -> Context:
        """Returns the run's context: the description, and the terms of both keys in order, without repetition.

        Raises:
            ConfigError: the terms file is missing, empty or of another form.
        """
        from nemo_llm_feedback.core.types import Context  # brings torch

        terms = list(self.terms) + (read_terms(self.terms_file) if self.terms_file else [])
        return Context(description=self.description.strip(), terms=tuple(dict.fromkeys(t for t in terms if t)))


def read_terms(path: str | Path) -> list[str]:
    """Reads terms: a JSON list of strings, a JSON object of such lists (nested), or one term a line.

    Raises:
        ConfigError: no such file, not text, no term in it, or JSON of another form.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"context.terms_file={path} cannot be read ({error}); give a UTF-8 text or JSON file."
        ) from None
    if file.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        try:
            terms = _flatten(json.loads(text), path)
        except json.JSONDecodeError as error:
            raise ConfigError(f"context.terms_file={path} is not valid JSON ({error}).") from None
    else:
        terms = [line.strip() for line in text.splitlines()]
    terms = list(dict.fromkeys(t for t in terms if t))
    if not terms:
        raise ConfigError(f"context.terms_file={path} has no term in it.")
    return terms


def _flatten(node: Any, path: str | Path) -> list[str]:
    if isinstance(node, str):
        return [node.strip()]
    if isinstance(node, list):
        return [t for item in node for t in _flatten(item, path)]
    if isinstance(node, dict):
        return [t for item in node.values() for t in _flatten(item, path)]
    raise ConfigError(
        f"context.terms_file={path} holds {node!r}; terms must be strings in lists or an object of lists."
    )
