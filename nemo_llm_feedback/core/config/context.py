"""Settings of the context: what is known about the domain, and how terms are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config.faults import STRICT, Section
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.text_files import parse_json, read_text, text_lines

if TYPE_CHECKING:
    from nemo_llm_feedback.core.types import Context

_MAX_MEBIBYTES = 64


@dataclass(frozen=True, config=STRICT)
class ContextConfig(Section):
    """What is known about the domain.

    Attributes:
        description: completes "The following is a transcript of …", e.g. ``an order at a coffee shop``.
        terms: terms that may occur.
        terms_file: one term per line, a JSON list, or a JSON object of lists.
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
    """Reads terms: a JSON list of strings, a JSON object of such lists (nested), or one term per line.

    Raises:
        ConfigError: no such file, not text, no term in it, or JSON of another form.
    """
    try:
        text = read_text(path, max_mebibytes=_MAX_MEBIBYTES)
        as_json = Path(path).suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{")
        found = _strings(parse_json(text)) if as_json else text_lines(text)
    except ValueError as error:
        raise ConfigError(
            f"context.terms_file={path} cannot be read ({error}); give a UTF-8 text with one term per line, or JSON "
            "with strings in lists or in an object of lists."
        ) from None
    terms = list(dict.fromkeys(term for line in found if (term := line.strip())))
    if not terms:
        raise ConfigError(f"context.terms_file={path} has no term in it.")
    return terms


def _strings(node: Any) -> list[str]:
    """All strings of nested lists and objects."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, (list, dict)):
        return [text for item in (node.values() if isinstance(node, dict) else node) for text in _strings(item)]
    raise ValueError(f"it holds {repr(node)[:60]}")
