"""Writes the model card: a Markdown file beside an exported ``.nemo`` on how it was made and what changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from nemo_llm_feedback.core.text import NORMALIZER_WORDS
from nemo_llm_feedback.core.text_files import stem
from nemo_llm_feedback.evaluation.metrics import METRICS, CorpusScores
from nemo_llm_feedback.evaluation.tables import build_table, table_metrics

_TEMPLATES = Path(__file__).parent / "report" / "templates"


def write_model_card(
    nemo: str | Path,
    *,
    facts: Mapping[str, Any],
    before: Mapping[str, CorpusScores] | None = None,
    after: Mapping[str, CorpusScores] | None = None,
    normalizer: str | None = None,
) -> Path:
    """Writes ``<stem>.md`` beside a ``.nemo``, with the front matter of the Hugging Face Hub.

    Args:
        nemo: the exported checkpoint.
        facts: what the ``.nemo`` holds on its adaptation (``adaptation`` in its configuration): ``base``,
            ``base_model`` (a pretrained name), ``llm``, ``objective``, ``learning_rate``, ``steps`` … and
            ``before``/``after``, set → metric → value.
        before, after: validation set → scores, for intervals and tests; without them the table has the values that
            ``facts`` hold, and without those the card states that nothing was measured.
        normalizer: name of the scores' text normalisation.

    Returns:
        The path written.
    """
    shown = {key: value for key, value in facts.items() if key != "llm" or value is not None}
    if "llm" in shown:
        shown["llm"] = public_name(str(shown["llm"]))
    tables = {}
    if before and after:
        for name, old in before.items():
            made = build_table({"before": old, "after": after[name]}, metrics=table_metrics(old), base="before")
            tables[name] = made.table.to_markdown()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"plain": _plain, "code": _code}
    page = environment.get_template("model_card.md.j2").render(
        front_matter=_front_matter(shown, measured=[key for key in ("wer", "cer") if before or facts.get("before")]),
        name=stem(nemo),
        file=repr(Path(nemo).name),
        facts=shown,
        tables=tables,
        metrics=METRICS,
        normalization=f"{normalizer} ({NORMALIZER_WORDS[normalizer]})" if before and normalizer else None,
    )
    target = card_path(nemo)
    target.write_text(page, encoding="utf-8")
    return target


def plain_scores(sets: Mapping[str, CorpusScores]) -> dict[str, dict[str, float]]:
    """Set → metric → value, of the metrics that are defined, as ``facts`` hold them."""
    names = ("wer", "cer", "ewer", "u_wer", "entity_recall", "false_alarms")
    return {
        name: {m: round(value, 3) for m in names if (value := scores.value(m)) == value}
        for name, scores in sets.items()
    }


def card_path(nemo: str | Path) -> Path:
    """Where the card of a checkpoint is."""
    return Path(nemo).with_name(f"{stem(nemo)}.md")


def _front_matter(facts: Mapping[str, Any], *, measured: list[str]) -> str:
    """The YAML by which the Hugging Face Hub files a model; a base that the Hub does not have is left out."""
    # NeMo's names of checkpoints begin so, e.g. stt_en_fastconformer_ctc_large; multilingual ones name no language.
    language = re.match(r"stt_([a-z]{2})_", str(facts.get("base") or ""))
    pretrained = facts.get("base_model")
    data = ModelCardData(
        library_name="nemo",
        pipeline_tag="automatic-speech-recognition",
        language=language.group(1) if language else None,
        base_model=pretrained if pretrained and "/" in pretrained else None,
        metrics=measured or None,
        tags=["automatic-speech-recognition", "speech", "NeMo", "domain-adaptation", "nemo_llm_feedback"],
    )
    return data.to_yaml()


def public_name(model: str) -> str:
    """What others may see of where a model is: the hub id, or of a local folder its last name.

    Args:
        model: folder or hub id.
    """
    path = Path(model).expanduser()
    return path.name if path.is_absolute() or path.exists() else model


def _plain(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(str(text).split()))


def _code(value: Any) -> str:
    """A value as a code span, out of which it cannot break."""
    text = " ".join((f"{value:.4g}" if isinstance(value, float) else str(value)).split()).replace("|", "/")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"
