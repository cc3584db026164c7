"""Transcribes the rows of a manifest, with N-best lists if wanted; unlike ``transcribe()`` it is safe in training."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nemo_llm_feedback.asr.encoded_rows import map_rows
from nemo_llm_feedback.asr.heads import Head, Labels, heads_of
from nemo_llm_feedback.asr.look_ahead import looking_ahead
from nemo_llm_feedback.core.config import ProposalConfig, RunConfig
from nemo_llm_feedback.core.console import progress
from nemo_llm_feedback.core.types import Audio, Context
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.hypotheses.proposals import Proposer

NBest = tuple[tuple[str, float], ...]
"""(text, exact log p in nats) of each member, most probable first."""


@dataclass(frozen=True)
class Decoded:
    """What a model made of some rows.

    Attributes:
        labels: label ids of the greedy transcripts; empty where the model failed.
        texts: greedy transcripts; ``""`` where the model failed.
        nbest: one list per row; no list at all unless asked for, and an empty one where the model failed.
        failures: row → why the model failed on it.
        rtfx: seconds of audio per second of wall time for loading, encoding and greedy search of the rows that worked.
    """

    labels: tuple[Labels, ...]
    texts: tuple[str, ...]
    nbest: tuple[NBest, ...]
    failures: dict[int, str] = field(default_factory=dict)
    rtfx: float = float("nan")

    def select(self, kept: Sequence[int]) -> Decoded:
        """Those of some rows, by their positions."""
        nbest = tuple(self.nbest[i] for i in kept) if self.nbest else ()
        return Decoded(tuple(self.labels[i] for i in kept), tuple(self.texts[i] for i in kept), nbest)


def decode_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    head: str = "auto",
    batch_size: int = 16,
    nbest: ProposalConfig | None = None,
    run_context: Context | None = None,
    skip_failing: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Decoded:
    """Greedy transcripts and, if asked for, N-best lists; the model's train/eval state is left as it was.

    Args:
        model: a NeMo CTC, transducer or hybrid model.
        rows: manifest rows, not tarred.
        head: ``ctc``, ``transducer``, or ``auto`` and ``both`` = the one that ``transcribe`` would use.
        batch_size: rows per batch.
        nbest: settings of the N-best lists; None = no such lists.
        run_context: the run's context; its terms and the row's are boosted in the N-best.
        skip_failing: a batch that fails is decoded again row by row, so that only the bad row is lost; otherwise the
            first failure is raised.
        on_batch: called with the number of rows done.

    Raises:
        ConfigError: the model has no such head.
    """
    chosen = heads_of(model, which=head)[0]
    max_symbols = decoding_max_symbols(model)
    proposer = Proposer(chosen, nbest) if nbest is not None else None
    proposing = 0.0

    def _decode(audio: Audio, encoded: Tensor, lengths: Tensor) -> list[tuple[Labels, NBest]]:
        """Greedy labels and N-best of each row of a batch."""
        nonlocal proposing
        greedy = chosen.greedy(encoded, lengths, max_symbols=max_symbols)
        start = time.perf_counter()
        lists = _nbest(chosen, proposer, audio, encoded, lengths) if proposer is not None else [()] * len(greedy)
        proposing += time.perf_counter() - start
        return [(tuple(labels), members) for labels, members in zip(greedy, lists, strict=True)]

    failures: dict[int, str] = {}
    skipped = failures if skip_failing else None
    start = time.perf_counter()
    found = map_rows(
        model, rows, _decode, batch_size=batch_size, run_context=run_context, on_batch=on_batch, failures=skipped
    )
    seconds = time.perf_counter() - start - proposing
    worked = sum(row.duration for i, row in enumerate(rows) if i not in failures)
    return Decoded(
        labels=tuple(item[0] if item else () for item in found),
        texts=tuple(chosen.vocabulary.ids_to_text(item[0]) if item else "" for item in found),
        nbest=tuple(item[1] if item else () for item in found) if proposer is not None else (),
        failures=failures,
        rtfx=worked / seconds if seconds > 0 else float("nan"),
    )


def transcribe_rows(model: Any, rows: Sequence[Row], *, head: str = "auto", batch_size: int = 16) -> list[str]:
    """Greedy transcripts of the rows, in their order; see :func:`decode_rows`."""
    return list(decode_rows(model, rows, head=head, batch_size=batch_size).texts)


def score_sets(
    model: Any,
    sets: Mapping[str, Sequence[Row]],
    config: RunConfig | None = None,
    *,
    batch_size: int = 16,
    decode: Callable[..., Decoded] = decode_rows,
) -> dict[str, CorpusScores]:
    """Set → scores of the greedy transcripts of its rows, which have text.

    Args:
        model: a NeMo CTC, transducer or hybrid model.
        sets: name → rows.
        config: names head, attention context, context and text normalisation; None = the defaults.
        batch_size: rows per batch.
        decode: what transcribes: :func:`decode_rows`, or what takes and gives the same.
    """
    config = config or RunConfig()
    found, head, context = {}, config.feedback.heads, config.context.load()
    for name, rows in sets.items():
        with (
            looking_ahead(config.feedback.look_ahead, model.encoder),
            progress(f"transcribing {name}", len(rows)) as on_batch,
        ):
            texts = decode(model, rows, head=head, batch_size=batch_size, on_batch=on_batch).texts
        found[name] = score_rows(rows, texts, run_context=context, normalizer=config.feedback.normalizer)
    return found


def propose_rows(
    model: Any, rows: Sequence[Row], config: ProposalConfig, *, run_context: Context, head: str = "auto"
) -> list[list[str]]:
    """The texts of the N-best of every row, most probable first; for oracles. See :func:`decode_rows`."""
    chosen = heads_of(model, which=head)[0]
    nbest = functools.partial(_nbest, chosen, Proposer(chosen, config))
    return [[text for text, _ in members or ()] for members in map_rows(model, rows, nbest, run_context=run_context)]


def decoding_max_symbols(model: Any) -> int:
    """The labels per frame that the checkpoint's greedy decoding allows; NeMo's default is 10."""
    greedy = (model.cfg.get("decoding") or {}).get("greedy") or {}
    return int(greedy.get("max_symbols") or greedy.get("max_symbols_per_step") or 10)


def _nbest(head: Head, proposer: Proposer, audio: Audio, encoded: Tensor, lengths: Tensor) -> list[NBest]:
    """The proposals of each utterance with their exact log p, most probable first."""
    found = proposer.propose(encoded, lengths, audio.contexts)
    return [
        tuple((head.vocabulary.ids_to_text(c.labels), c.logp) for c in sorted(row, key=lambda c: -c.logp))
        for row in found
    ]
