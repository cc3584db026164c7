"""Error rates of transcripts against the rows of a manifest."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, merge_context
from nemo_llm_feedback.evaluation.entities import row_entities
from nemo_llm_feedback.evaluation.metrics import CorpusScores, score_corpus


def score_rows(
    rows: Sequence[Row], texts: Sequence[str], *, run_context: Context, normalizer: str = "basic"
) -> CorpusScores:
    """Scores transcripts against the rows' ``text`` and ``entities``; false alarms count the context's terms.

    Args:
        rows: with text.
        texts: one transcript per row.
        run_context: the run's context; its terms and the row's are the list for false alarms.
        normalizer: name of the text normalisation of both sides.

    Raises:
        ManifestError: a row has no text, or entities of unknown form.
    """
    bare = [row.origin for row in rows if not row.text]
    if bare:
        raise ManifestError(
            f"{len(bare)} row(s) have no reference text, e.g. {bare[0]}; evaluation needs `text` in every row."
        )
    entities = [[e.entity for e in row] for row in row_entities(rows)]
    terms = [merge_context(run_context, row.context).terms for row in rows]
    return score_corpus(
        [row.text for row in rows],
        texts,
        normalize=get_normalizer(normalizer),
        entities=entities if any(entities) else None,
        terms=terms if any(terms) else None,
    )
