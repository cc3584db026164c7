"""The sub-commands that are ordinary functions; each returns the text to print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo.collections.asr.models import ASRModel

from nemo_llm_feedback.checkpoints import read_config, supported_class
from nemo_llm_feedback.config import ProposalConfig, read_terms
from nemo_llm_feedback.errors import ManifestError
from nemo_llm_feedback.evaluation import propose_rows, score_rows, transcribe_rows
from nemo_llm_feedback.manifests import read_manifest, unreadable
from nemo_llm_feedback.metrics import oracle as find_oracle
from nemo_llm_feedback.normalize import get_normalizer
from nemo_llm_feedback.tables import build_table
from nemo_llm_feedback.types import Context


def evaluate(
    models: Sequence[str],
    *,
    manifest: str,
    terms_file: str | None = None,
    head: str = "auto",
    batch_size: int = 16,
    normalizer: str = "basic",
    oracle: int = 0,
    json_file: str | None = None,
) -> str:
    """Transcribes a manifest greedily with every model and returns the table of scores.

    Args:
        models: ``.nemo`` files; changes are relative to the first.
        manifest: with ``text`` and, optionally, ``entities`` and ``context``.
        terms_file: terms whose false alarms are counted in every utterance.
        head: ``ctc``, ``transducer`` or ``auto``.
        batch_size: rows a batch.
        normalizer: text normalisation of both sides.
        oracle: beam size of a further line, the oracle of the first model's N-best (with terms also of the boosted
            N-best); 0 = none.
        json_file: also write all numbers here.

    Raises:
        CheckpointError, ManifestError, ConfigError: unusable input, before any model is loaded.
    """
    for path in models:
        supported_class(read_config(path), origin=path)
    rows = read_manifest(manifest)
    bad = [reason for _, reason in unreadable(rows)]
    if bad:
        raise ManifestError(f"{len(bad)} row(s) of {manifest} have unreadable audio, e.g. {bad[0]}")
    context = Context(terms=tuple(read_terms(terms_file)) if terms_file else ())
    systems = {}
    for path in models:
        model = ASRModel.restore_from(path, map_location="cpu")
        texts = transcribe_rows(model, rows, head=head, batch_size=batch_size)
        systems[str(path)] = score_rows(rows, texts, run_context=context, normalizer=normalizer)
        if oracle and path == models[0]:
            config = ProposalConfig(beam=oracle, boosted=oracle if context.terms else 0, max_members=2 * oracle)
            nbest = propose_rows(model, rows, config, run_context=context, head=head, batch_size=batch_size)
            best = find_oracle([row.text for row in rows], nbest, normalize=get_normalizer(normalizer)).hypotheses
            systems[f"oracle of the {oracle}-best of {path}"] = score_rows(
                rows, best, run_context=context, normalizer=normalizer
            )
    first = next(iter(systems.values()))
    metrics = ["wer", "cer"] + (["ewer", "u_wer", "entity_recall"] if first.column("entity_words").sum() else [])
    metrics += ["false_alarms"] if first.column("term_utterances").sum() else []
    base = str(models[0]) if len(systems) > 1 else None
    table = build_table(systems, metrics=metrics, base=base, samples=2000, seed=0)
    if json_file:
        Path(json_file).write_text(table.to_json() + "\n", encoding="utf-8")
    return table.to_text()
