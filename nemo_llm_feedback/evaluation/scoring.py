"""Error rates of transcripts against the rows of a manifest."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, merge_context
from nemo_llm_feedback.evaluation.entities import entities_or_terms
from nemo_llm_feedback.evaluation.metrics import CorpusScores, score_corpus


def score_rows(
    rows: Sequence[Row], texts: Sequence[str], *, run_context: Context, normalizer: str = "basic"
) -> CorpusScores:
    """Scores transcripts against the rows' ``text`` and ``entities``; false alarms count the context's terms.

    Where no row has ``entities``, these are the context's terms that a reference holds.

    Args:
        rows: with text.
        texts: one transcript per row.
        run_context: the run's context; its terms and the row's are the row's list.
        normalizer: name of the text normalisation of both sides.

    Raises:
        ManifestError: a row has no text, or entities of unknown form.
    """
    bare = [row.origin for row in rows if not row.text]
    if bare:
        raise ManifestError(
            f"{len(bare)} row(s) have no reference text, e.g. {bare[0]}; evaluation needs `text` in every row."
        )
    terms, normalize = [merge_context(run_context, row.context).terms for row in rows], get_normalizer(normalizer)
    entities = [[e.entity for e in row] for row in entities_or_terms(rows, terms, normalize)]
    return score_corpus(
        [row.text for row in rows],
        texts,
        normalize=normalize,
        entities=entities if any(entities) else None,
        terms=terms if any(terms) else None,
    )
