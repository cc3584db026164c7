"""The model card: a Markdown file beside an exported ``.nemo`` that says what it is and what changed. Inert text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.text import NORMALIZER_WORDS
from nemo_llm_feedback.evaluation.metrics import METRICS, CorpusScores, find_metric
from nemo_llm_feedback.evaluation.tables import build_table, table_metrics

_SAMPLES, _SEED = 2000, 0


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
        facts: what the ``.nemo`` says of its adaptation (``adaptation`` in its configuration): ``base``, ``llm``,
            ``objective``, ``steps``, ``context_sha256``, ``plugin``, and ``before``/``after``, set → metric → value.
        before, after: validation set → scores, for intervals and tests; without them the table has the values that
            ``facts`` hold, and without those the card says that nothing was measured.
        normalizer: text normalisation of the scores.

    Returns:
        The path written.
    """
    path = Path(nemo)
    target = path.with_suffix(".md")
    name = _plain(path.stem)
    lines = [
        f"# {name}",
        "",
        f"Speech recognition model in NeMo's format: {_code(facts.get('base') or 'a base model')} adapted with "
        "nemo_llm_feedback to unlabeled audio by the feedback of a language model.",
        "",
        "## How it was made",
        "",
        *_fact_lines(facts),
        "",
        "## Before and after",
        "",
        *_results(facts, before or {}, after or {}, normalizer),
        "",
        "## Use",
        "",
        "It loads in stock NeMo; this plugin and the language model are not needed.",
        "",
        "```python",
        "from nemo.collections.asr.models import ASRModel",
        "",
        f"model = ASRModel.restore_from({path.name!r})",
        'print(model.transcribe(["audio.wav"]))',
        "```",
        "",
        "## Licence and limits",
        "",
        "The weights derive from the base model, whose licence applies to them; the language model's licence may say "
        "more about what its outputs are used for. Numbers hold for the sets named above; on other speech the model "
        "may be better or worse than its base.",
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def public_name(model: str) -> str:
    """What others may see of where a model is: the hub id, or of a local folder its last name.

    Args:
        model: folder or hub id.
    """
    path = Path(model).expanduser()
    return path.name if path.is_absolute() or path.exists() else model


def _fact_lines(facts: Mapping[str, Any]) -> list[str]:
    labels = {
        "base": "Base",
        "llm": "Language model (frozen, in training only)",
        "objective": "Objective",
        "reward": "Reward",
        "steps": "Optimizer steps",
        "averaged": "Mean of the weights of so many runs",
        "base_share": "Share of the base's weights in it",
        "context_sha256": "SHA-256 of description and terms",
        "plugin": "Made with",
    }
    known = {key: facts[key] for key in labels if facts.get(key) is not None}
    if "llm" in known:
        known["llm"] = public_name(str(known["llm"]))
    shown = [f"- {labels[key]}: {_code(value)}" for key, value in known.items()]
    return shown or ["- The checkpoint says nothing of how it was made."]


def _results(
    facts: Mapping[str, Any],
    before: Mapping[str, CorpusScores],
    after: Mapping[str, CorpusScores],
    normalizer: str | None,
) -> list[str]:
    lines: list[str] = []
    for name in before:
        systems = {"before": before[name], "after": after[name]}
        table = build_table(
            systems, metrics=table_metrics(before[name]), base="before", samples=_SAMPLES, seed=_SEED
        )  # fmt: skip
        lines += [f"### {_plain(name)}", "", table.to_markdown(), ""]
    if lines and normalizer is not None:
        lines += [f"Text normalisation: {normalizer} ({NORMALIZER_WORDS[normalizer]})."]
    if not lines:
        lines = _values(facts)
    while lines and not lines[-1]:
        lines.pop()
    return lines or ["No labelled set was given, so nothing was measured."]


def _values(facts: Mapping[str, Any]) -> list[str]:
    """Tables without intervals, from the numbers inside the checkpoint."""
    lines: list[str] = []
    old, new = facts.get("before") or {}, facts.get("after") or {}
    for name in old:
        metrics = [m for m in METRICS if m in old[name] and m in new.get(name, {})]
        if metrics:
            lines += [f"### {_plain(str(name))}", "", "| metric | before | after |", "| --- | ---: | ---: |"]
            lines += [
                f"| {find_metric(m).title} ({find_metric(m).unit}) | {float(old[name][m]):.1f} | "
                f"{float(new[name][m]):.1f} |"
                for m in metrics
            ]
            lines.append("")
    return lines


def _plain(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(str(text).split()))


def _code(value: Any) -> str:
    """A value as a code span, out of which it cannot break."""
    text = " ".join(str(value).split()).replace("|", "/")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"
