"""Prompt templates: the text that the LLM reads before a hypothesis, and the questions that it is asked.

A template is a plain text file with the slots ``{description}``, ``{terms}`` and ``{previous}`` for the context, and
one slot for what is judged. There are three kinds:

- ``score``: ends with ``{hypothesis}``, whose log-probability is taken. Nothing may follow it.
- ``judge``: has ``{hypothesis}`` inside and ends where the answer (yes, no, a digit) begins.
- ``correction``: has ``{hypotheses}`` inside (a numbered list) and ends where the corrected transcript begins.

A line break or a visible character stands right before ``{hypothesis}``, never a space: it would be a separate token,
which no LLM has seen before a word. A line whose slots are all empty is left out. Braces around any other word are an
error; other braces are plain text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.text_files import read_text
from nemo_llm_feedback.core.types import Context

# The answers of the built-in judge templates, best last for ratings; a base LLM's begin with a space.
ANSWERS = {"yes_no": ("Yes", "No"), "rating": ("1", "2", "3", "4", "5")}

_BUILT_IN = Path(__file__).parent / "templates"  # the base ones end where an answer with a leading space begins
_SLOT = re.compile(r"\{(\w+)\}")
_CONTEXT_SLOTS = ("description", "terms", "previous")
_KINDS = {"score": "hypothesis", "judge": "hypothesis", "correction": "hypotheses"}
MARK = "\ue000"  # a private character: stands for the hypothesis until a judge's prompt is cut there


@dataclass(frozen=True)
class Template:
    """A checked prompt template.

    Attributes:
        text: the text with its slots.
        kind: ``score``, ``judge`` or ``correction``.

    Raises:
        LLMError: the text has faults (see ``template_faults``).
    """

    text: str
    kind: str = "score"

    def __post_init__(self) -> None:
        if faults := template_faults(self.text, kind=self.kind):
            raise LLMError(" ".join(faults))

    @cached_property
    def uses_context(self) -> bool:
        """Whether the template has a slot for the description, for the terms or for previous utterances."""
        return any(f"{{{slot}}}" in self.text for slot in _CONTEXT_SLOTS)

    def render(self, context: Context) -> str:
        """Returns the prompt of a ``score`` template: the text up to the hypothesis, with the context filled in.

        Args:
            context: the values of the slots. White space inside a term or utterance becomes one space; the full stop
                that ends a description is dropped (the template has one); utterances stand one per line.
        """
        return _fill(self.text[: self.text.index("{hypothesis}")], _context_values(context))

    def render_question(self, context: Context) -> str:
        """Returns a ``judge`` prompt in which :data:`MARK` stands for the hypothesis, exactly once."""
        values = {slot: value.replace(MARK, "") for slot, value in _context_values(context).items()}
        return _fill(self.text, {**values, "hypothesis": MARK}).rstrip()

    def render_list(self, context: Context, texts: Sequence[str]) -> str:
        """Returns a ``correction`` prompt with the texts as a numbered list."""
        listed = "\n".join(f"{n}. {' '.join(text.split())}" for n, text in enumerate(texts, 1))
        return _fill(self.text, {**_context_values(context), "hypotheses": listed}).rstrip()


def _context_values(context: Context) -> dict[str, str]:
    """The values of a context's slots, tidied (see ``Template.render``)."""
    tidy = [[" ".join(text.split()) for text in texts if text.split()] for texts in (context.terms, context.previous)]
    description = context.description.strip().removesuffix(".")
    return {"description": description, "terms": ", ".join(tidy[0]), "previous": "\n".join(tidy[1])}


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Fills the slots in and leaves out lines whose slots are all empty."""
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not (slots := _SLOT.findall(line)) or any(values[slot] for slot in slots)]
    # One pass over each line: a value that itself contains "{terms}" is text, not a slot.
    return "".join(_SLOT.sub(lambda match: values[match.group(1)], line) for line in kept)


def template_faults(text: str, *, kind: str = "score") -> list[str]:
    """Returns every fault of a template's text as a sentence that names the fix."""
    faults = []
    slots = (*_CONTEXT_SLOTS, _KINDS[kind])
    for slot in dict.fromkeys(_SLOT.findall(text)):
        if slot not in slots:
            near = difflib.get_close_matches(slot, slots, n=1)
            hint = f"; did you mean {{{near[0]}}}?" if near else ""
            faults.append(f"The template has an unknown slot {{{slot}}} (known: {', '.join(slots)}){hint}.")
    wanted = f"{{{_KINDS[kind]}}}"
    count = text.count(wanted)
    if count != 1:
        where = "end it with" if kind == "score" else "put in"
        faults.append(f"The template has {count} {wanted} slots: {where} exactly one.")
        return faults
    before, after = text.split(wanted)
    if kind == "score" and after.strip():
        faults.append(f"The template goes on after {{hypothesis}} with {after.strip()[:40]!r}: remove that text.")
    if kind != "score" and not after.strip():
        faults.append(f"The template ends with {wanted}: put the question after it, which the LLM is to answer.")
    last = before[-1:]
    if kind != "correction" and last.isspace() and last != "\n":
        faults.append(
            "The template has a space before {hypothesis}, which becomes a separate token and falsifies the "
            "hypothesis's first one: put a line break or a visible character there."
        )
    return faults


def read_template(path: str | None, *, chat: bool, use: str = "score", key: str = "llm.template") -> Template:
    """Reads a template file, by default one of the folder ``templates``.

    Args:
        path: the file's name; None = built-in.
        chat: whether the prompt goes through a chat template; picks the built-in one.
        use: ``score``, ``yes_no``, ``rating`` or ``correction``.
        key: the setting that names the file, for error messages.

    Raises:
        LLMError: the file cannot be read, or its text is not a valid template.
    """
    kind = use if use in _KINDS else "judge"
    file = Path(path).expanduser() if path is not None else _BUILT_IN / f"{use}_{'chat' if chat else 'base'}.txt"
    try:
        text = read_text(file, max_mebibytes=1).replace("\r\n", "\n")
        return Template(text if path is not None else text.removesuffix("\n"), kind)
    except LLMError as error:
        raise LLMError(f"{key}={path}: {error}") from None
    except ValueError as error:
        raise LLMError(f"{key}={path} cannot be read as UTF-8 text ({error}): give a text file's path.") from error
