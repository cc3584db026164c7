"""The model card: a Markdown file beside an exported ``.nemo`` on what it is and what changed. Inert text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from nemo_llm_feedback.core.text import NORMALIZER_WORDS
from nemo_llm_feedback.evaluation.metrics import METRICS, CorpusScores
from nemo_llm_feedback.evaluation.records import Table
from nemo_llm_feedback.evaluation.tables import build_table, table_metrics

_TEMPLATES = Path(__file__).parent / "report" / "templates"
_LABELS = {
    "base": "Base",
    "llm": "Language model (frozen, in training only)",
    "objective": "Objective",
    "reward": "Reward",
    "steps": "Optimizer steps",
    "averaged": "Mean of the weights of so many runs",
    "interpolation": "Share of the run's weights in it, the rest is its base's",
    "context_sha256": "SHA-256 of description and terms",
    "plugin": "Made with",
}


def write_model_card(
    nemo: str | Path,
    *,
    facts: Mapping[str, Any],
    before: Mapping[str, CorpusScores] | None = None,
    after: Mapping[str, CorpusScores] | None = None,
    normalizer: str | None = None,
) -> Path:
    """Writes ``<stem>.md`` beside a ``.nemo``.

    Args:
        nemo: the exported checkpoint.
        facts: what the ``.nemo`` holds on its adaptation (``adaptation`` in its configuration): ``base``, ``llm``,
            ``objective``, ``steps``, ``context_sha256``, ``plugin``, and ``before``/``after``, set → metric → value.
        before, after: validation set → scores, for intervals and tests; without them the table has the values that
            ``facts`` hold, and without those the card states that nothing was measured.
        normalizer: text normalisation of the scores.

    Returns:
        The path written.
    """
    path = Path(nemo)
    shown = {key: value for key, value in facts.items() if key != "llm" or value is not None}
    if "llm" in shown:
        shown["llm"] = public_name(str(shown["llm"]))
    tables = _values(facts)
    if before and after:
        pairs = {name: {"before": old, "after": after[name]} for name, old in before.items()}
        tables = {
            name: build_table(pair, metrics=table_metrics(pair["before"]), base="before").table.to_markdown()
            for name, pair in pairs.items()
        }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"plain": _plain, "code": _code}
    page = environment.get_template("model_card.md.j2").render(
        name=path.stem,
        file=repr(path.name),
        facts=shown,
        labels=_LABELS,
        tables=tables,
        normalization=f"{normalizer} ({NORMALIZER_WORDS[normalizer]})" if before and normalizer else None,
    )
    target = path.with_suffix(".md")
    target.write_text(page, encoding="utf-8")
    return target


def public_name(model: str) -> str:
    """What others may see of where a model is: the hub id, or of a local folder its last name.

    Args:
        model: folder or hub id.
    """
    path = Path(model).expanduser()
    return path.name if path.is_absolute() or path.exists() else model


def _values(facts: Mapping[str, Any]) -> dict[str, str]:
    """Tables without intervals, from the numbers inside the checkpoint."""
    tables = {}
    new = facts.get("after") or {}
    for name, old in (facts.get("before") or {}).items():
        known = [key for key in METRICS if key in old and key in new.get(name, {})]
        titles = {key: f"{METRICS[key].title} ({METRICS[key].unit})" for key in known}
        rows = [[titles[key], *(f"{float(values[key]):.1f}" for values in (old, new[name]))] for key in known]
        if rows:
            tables[str(name)] = Table(["metric", "before", "after"], rows).to_markdown()
    return tables


def _plain(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(str(text).split()))


def _code(value: Any) -> str:
    """A value as a code span, out of which it cannot break."""
    text = " ".join(str(value).split()).replace("|", "/")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"
