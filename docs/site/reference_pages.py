"""Pages that are made from the code: every command from its help, every key from its dataclass.

    python docs/site/reference_pages.py

writes both, as ``make docs`` does, and nothing of them is written by hand. They are in the repository for those who
read the documentation as text; a test compares them with the code. mkdocs calls ``on_page_markdown``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen

from nemo_llm_feedback.cli.commands import COMMANDS
from nemo_llm_feedback.cli.main import _app, examples_text
from nemo_llm_feedback.core.config.nemo_sections import NEMO_SECTIONS, TopLevel
from nemo_llm_feedback.core.config.rescoring import RescoringConfig
from nemo_llm_feedback.core.config.run import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def pages() -> dict[Path, str]:
    """The generated pages."""
    folder = ROOT / "docs" / "reference"
    made = {folder / "commands.md": commands(), folder / "configuration.md": configuration()}
    return {page: re.sub(r"[ ]+$", "", text, flags=re.M).rstrip() + "\n" for page, text in made.items()}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Intervals and percentages in tables are not broken."""
    interval = re.compile(r"\[[−+\d][^\]|]*\]")
    return "\n".join(
        interval.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), line).replace(
            " %", "\N{NO-BREAK SPACE}%"
        )
        if line.startswith("|")
        else line
        for line in markdown.split("\n")
    )


def commands() -> str:
    """The page of all commands."""
    text = _app().generate_docs(heading_level=1).replace("adapt adapt KEY", "adapt KEY")
    text = text[text.index("\n## nemo-llm-feedback ") :]  # its own title and table of contents
    text = re.sub(r"^## nemo-llm-feedback (\w+)$", r"## \1", text, flags=re.M)
    text = re.sub(r"^\*\*(Parameters|Arguments)\*\*:\n\n", "", text, flags=re.M)
    text = re.sub(r"^\*\*(\w+)\*\*:$", r"**\1**", text, flags=re.M)
    text = re.sub(r"^\* (`[^`]+`): (.+)$", r"\1\n:   \2\n", text, flags=re.M)
    text = re.sub(r" \*\[(?:choices|default): ([^\]]+)\]\*", _fact, text).replace(
        " **[required]**", " <small>needed</small>"
    )
    text = re.sub(r"(?m)^((?:  .+\n)+)", lambda block: f"```text\n{textwrap.dedent(block[1])}```\n", text)
    text = re.sub(r"(?ms)^## (\w+)\n\n```.*?```\n", lambda head: f"{head[0]}\n{_examples(head[1])}", text)
    return (
        "# Commands\n\nMade from the commands' own `--help`. NeMo's names from its example scripts "
        f"(`pretrained_name=`, `dataset_manifest=` …) are taken, too.\n{text.replace('```console', '```text')}"
    )


def _examples(command: str) -> str:
    (text,) = (examples_text(function) for function in COMMANDS if function.__name__ == command)
    return f"```bash\n{textwrap.dedent(text.partition(chr(10))[2])}\n```\n"


def _fact(found: re.Match[str]) -> str:
    """A default or the choices of a flag in small print."""
    values = ", ".join(f"`{value}`" for value in found[1].split(", "))
    return f" <small>{'default ' if 'default:' in found[0] else ''}{values}</small>"


def configuration() -> str:
    """The page of all keys."""
    parts = [
        "# Configuration\n\nMade from the dataclasses in `nemo_llm_feedback/core/config/`. On the command line "
        "`section.key=value`; in YAML and in `--show-config` the same tree. An unknown key or a wrong value is "
        "refused before any work, with the nearest key named.\n"
    ]
    parts.append("## Top level\n\n" + _keys(TopLevel, ""))
    parts += [
        f"## {name}\n\n{_summary(cls)}\n\n{_keys(cls, f'{name}.')}{_groups(name)}" for name, cls in SECTIONS.items()
    ]
    parts.append(
        "## NeMo's sections\n\nThese keep NeMo's and Lightning's keys, and every key that these know may be given. "
        "What is listed is checked before anything is loaded.\n"
    )
    parts += [f"### {name}\n\n{_keys(cls, f'{name}.')}" for name, cls in NEMO_SECTIONS.items()]
    how = "Python takes it as `transcribe(…, rescoring={…})`; the command has flags for it."
    parts.append(f"## Rescoring\n\n{_summary(RescoringConfig)} {how}\n\n")
    parts.append(_keys(RescoringConfig, ""))
    return "\n\n".join(parts)


def _groups(section: str) -> str:
    """What the YAML files of a section set beside its defaults, such as ``objective=mwer``."""
    folder = CONF / section
    if not folder.is_dir():
        return ""
    shown = "".join(
        f'\n=== "{section}={path.stem}"\n\n'
        + textwrap.indent(f"```yaml\n{path.read_text().strip()}\n```", "    ")
        + "\n"
        for path in sorted(folder.glob("*.yaml"))
    )
    return f"\n\nOne word sets several keys of this section:\n{shown}"


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")


def _keys(cls: type, prefix: str) -> str:
    """A definition list of a section's keys: default, allowed values, meaning."""
    meanings, hints = _meanings(cls), get_type_hints(cls, include_extras=True)
    out = []
    for item in dataclasses.fields(cls):
        if hints[item.name] is Any:
            continue  # known to NeMo or Lightning, and not looked at
        facts = [f"default `{_shown(_default(item))}`"] if _default(item) is not dataclasses.MISSING else ["needed"]
        if cls in NEMO_SECTIONS.values():  # their defaults are NeMo's and Lightning's
            facts = []
        facts.append(_type(hints[item.name]))
        meaning = meanings.get(item.name, "")
        out.append(f"`{prefix}{item.name}` {{ #{prefix}{item.name} }}")
        out.append(f":   <small>{' · '.join(filter(None, facts))}</small>\n\n    {meaning}\n")
    return "\n".join(out)


def _meanings(cls: type) -> dict[str, str]:
    """Key → its sentence under ``Attributes:`` of the docstring; several keys may share one."""
    body = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w[\w, ]*:)", "\n" + body):
        names, colon, text = entry.strip().partition(":")
        if colon:
            text = " ".join(text.split()).replace("``", "`")
            found |= {name.strip(): _plain(text) for name in names.split(",")}
    return found


def _plain(text: str) -> str:
    """Characters that Markdown would read outside of code, escaped; the first letter upper case."""
    pieces = re.split(r"(`[^`]+`)", text)
    escaped = "".join(p if p.startswith("`") else re.sub(r"([_*<])", r"\\\1", p) for p in pieces)
    escaped = re.sub(r"docs/([\w/]+\.md)", r"[\1](../\1)", escaped)
    return escaped[:1].upper() + escaped[1:]


def _default(item: Any) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "as below"
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=200)
    return text.replace("...", "").strip()


def _type(hint: Any) -> str:
    """The allowed values of a key in words."""
    return " or ".join(dict.fromkeys(_types(hint)))


def _types(hint: Any) -> Iterator[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = " ".join(dict.fromkeys(_bounds(arguments[1:])))
        yield f"{_type(arguments[0])} {bounds}".strip()
    elif origin is Literal:
        yield ", ".join(f"`{_shown(value)}`" for value in arguments)
    elif origin in (tuple, list):
        yield f"list of {_type(arguments[0])}"
    elif origin is dict or dataclasses.is_dataclass(hint):
        yield "keys"
    elif hint is type(None):
        yield "`null`"
    elif arguments:
        for argument in arguments:
            yield from _types(argument)
    else:
        yield {"int": "whole number", "float": "number", "str": "text", "bool": "`true`, `false`"}.get(
            getattr(hint, "__name__", ""), ""
        )


def _bounds(marks: tuple[Any, ...]) -> Iterator[str]:
    for mark in marks:
        for one in [mark, *getattr(mark, "metadata", ())]:
            for kind, (name, sign) in SIGNS.items():
                if isinstance(one, kind):
                    yield f"{sign} {getattr(one, name)}"
            if isinstance(one, MinLen):
                yield "not empty"


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
