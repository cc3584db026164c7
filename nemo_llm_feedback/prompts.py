"""Prompt templates: what the LLM reads before a hypothesis.

A template is a plain text file with the slots ``{description}``, ``{terms}`` and ``{hypothesis}``. The hypothesis
comes last: nothing may follow it, and what stands right before it is a line break or a visible character, never a
space (a space there would be a token of its own, and the hypothesis would continue it in a way no LLM has seen). A
line whose slots all have nothing to fill in is left out. Braces around any other word are an error; other braces are
plain text.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nemo_llm_feedback.errors import LLMError
from nemo_llm_feedback.types import Context

BASE_TEMPLATE = "The following is a transcript of {description}.\nTerms that may occur: {terms}.\n{hypothesis}"
CHAT_TEMPLATE = (
    "Write down what is said in a recording.\nThe recording is {description}.\nTerms that may occur: {terms}.\n"
    "Reply with the transcript only.\n{hypothesis}"
)
_SLOT = re.compile(r"\{(\w+)\}")
_CONTEXT_SLOTS = ("description", "terms")
_SLOTS = (*_CONTEXT_SLOTS, "hypothesis")


@dataclass(frozen=True)
class Template:
    """A checked prompt template; ``text`` includes the slots."""

    text: str

    def __post_init__(self) -> None:
        faults = template_faults(self.text)
        if faults:
            raise LLMError(" ".join(faults))

    @cached_property
    def uses_context(self) -> bool:
        """Whether the template has a slot for the description or for the terms."""
        return any(f"{{{slot}}}" in self.text for slot in _CONTEXT_SLOTS)

    def render(self, context: Context) -> str:
        """Returns the prompt: the template up to the hypothesis, with the context filled in.

        Args:
            context: description and terms; white space inside a term, line breaks included, becomes one space, and
                the full stop that ends a description is dropped (the template brings its own).
        """
        values = {
            "description": context.description.strip().removesuffix("."),
            "terms": ", ".join(filter(None, (" ".join(term.split()) for term in context.terms))),
        }
        prompt = self.text[: self.text.index("{hypothesis}")]
        lines = prompt.splitlines(keepends=True)
        kept = [line for line in lines if not (slots := _SLOT.findall(line)) or any(values[slot] for slot in slots)]
        # One pass over each line: a value that itself contains "{terms}" is text, not a slot.
        return "".join(_SLOT.sub(lambda match: values[match.group(1)], line) for line in kept)


def template_faults(text: str) -> list[str]:
    """Returns every fault of a template's text as a sentence that names the fix."""
    faults = []
    for slot in dict.fromkeys(_SLOT.findall(text)):
        if slot not in _SLOTS:
            near = difflib.get_close_matches(slot, _SLOTS, n=1)
            hint = f"; did you mean {{{near[0]}}}?" if near else ""
            faults.append(f"The template has an unknown slot {{{slot}}} (known: {', '.join(_SLOTS)}){hint}.")
    count = text.count("{hypothesis}")
    if count != 1:
        faults.append(f"The template has {count} {{hypothesis}} slots: end it with exactly one.")
        return faults
    before, after = text.split("{hypothesis}")
    if after.strip():
        faults.append(f"The template goes on after {{hypothesis}} with {after.strip()[:40]!r}: remove that text.")
    last = before[-1:]
    if last.isspace() and last != "\n":
        faults.append(
            "The template has a space before {hypothesis}: end it with a line break or a visible character, because "
            "a trailing space becomes a token of its own and falsifies the hypothesis's first token."
        )
    return faults


def read_template(path: str | None, *, chat: bool) -> Template:
    """Reads a template file, or returns the built-in template.

    Args:
        path: file name; None = built-in.
        chat: whether the prompt goes through a chat template; picks the built-in one.

    Raises:
        LLMError: the file cannot be read, or its text is no valid template.
    """
    if path is None:
        return Template(CHAT_TEMPLATE if chat else BASE_TEMPLATE)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LLMError(
            f"llm.template={path} cannot be read as UTF-8 text ({error}): give the path of a text file."
        ) from error
    faults = template_faults(text)
    if faults:
        raise LLMError(f"llm.template={path}: " + " ".join(faults))
    return Template(text)
