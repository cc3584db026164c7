"""Transcripts and N-best lists of a manifest, without the side effects of ``transcribe()`` on a training model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.audio import audio_batches, by_duration, load_audio
from nemo_llm_feedback.data.manifests import Row, merge_context
from nemo_llm_feedback.hypotheses.proposals import Proposer


@dataclass(frozen=True)
class Decoded:
    """What a model made of some rows.

    Attributes:
        texts: greedy transcripts; ``""`` where the model failed.
        nbest: N-best lists of (text, exact log p in nats), most probable first; empty unless asked for, and where the
            model failed.
        failures: row → why the model failed on it.
        rtfx: seconds of audio a second of wall time for loading, encoding and greedy search of the rows that worked.
    """

    texts: tuple[str, ...]
    nbest: tuple[tuple[tuple[str, float], ...], ...]
    failures: dict[int, str] = field(default_factory=dict)
    rtfx: float = float("nan")


@torch.no_grad()
def decode_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    head: str = "auto",
    batch_size: int = 16,
    nbest: ProposalConfig | None = None,
    run_context: Context | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Decoded:
    """Greedy transcripts and, if asked for, N-best lists; a row that fails costs itself only.

    A batch that fails is decoded again row by row.

    Args:
        model: a NeMo CTC, transducer or hybrid model.
        rows: manifest rows, not tarred.
        head: ``ctc``, ``transducer`` or ``auto``.
        batch_size: rows a batch.
        nbest: how many from which source; None = no N-best lists.
        run_context: whose terms, with the row's own, are boosted in the N-best.
        on_batch: receives the number of rows done.

    Raises:
        ConfigError: the model has no such head.
    """
    chosen = heads_of(model, which=head)[0]
    max_symbols = decoding_max_symbols(model)
    proposer = Proposer(chosen, nbest) if nbest is not None else None
    sample_rate = int(model.cfg.preprocessor.sample_rate)
    texts, lists = [""] * len(rows), [()] * len(rows)  # type: list[str], list[tuple[tuple[str, float], ...]]
    seconds = [0.0]

    def decode(indices: tuple[int, ...]) -> None:
        start = time.perf_counter()
        batch = load_audio(rows, indices, sample_rate=sample_rate, device=model.device)
        encoded, lengths = encode(model, batch.signal, batch.signal_len)
        for i, labels in zip(indices, chosen.greedy(encoded, lengths, max_symbols=max_symbols), strict=True):
            texts[i] = chosen.vocabulary.ids_to_text(labels)
        seconds[0] += time.perf_counter() - start
        if proposer is not None:
            contexts = [merge_context(run_context or Context(), rows[i].context) for i in indices]
            found = [[c.labels for c in row] for row in proposer.propose(encoded, lengths, contexts)]
            trie = PrefixTrie.build(
                [list(y) for row in found for y in row], [b for b, row in enumerate(found) for _ in row]
            )
            logp = iter(chosen.log_prob(encoded, lengths, trie.to(encoded.device)).tolist())
            for i, row in zip(indices, found, strict=True):
                members = [(chosen.vocabulary.ids_to_text(labels), next(logp)) for labels in row]
                lists[i] = tuple(sorted(members, key=lambda member: -member[1]))

    with evaluation_mode(model):
        failures = _each_batch(by_duration(rows, batch_size), decode, on_batch)
    worked = sum(row.duration for i, row in enumerate(rows) if i not in failures)
    rtfx = worked / seconds[0] if seconds[0] > 0 else float("nan")
    return Decoded(tuple(texts), tuple(lists) if proposer is not None else (), failures, rtfx)


def _each_batch(
    batches: Sequence[tuple[int, ...]], work: Callable[[tuple[int, ...]], None], on_batch: Callable[[int], None]
) -> dict[int, str]:
    """Does the work on every batch, on single rows where a batch fails; row → message for those that fail alone."""
    failures: dict[int, str] = {}
    done = 0
    for batch in batches:
        try:
            work(batch)
        except Exception:  # audio libraries and models raise anything; what a row raises alone is reported
            for i in batch:
                try:
                    work((i,))
                except Exception as error:
                    reason = (str(error).strip().splitlines() or ["no message"])[0]
                    failures[i] = f"{type(error).__name__}: {reason[:200]}"
        done += len(batch)
        on_batch(done)
    return failures


@torch.no_grad()
def transcribe_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    head: str = "auto",
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy transcripts of the rows, in their order; the model's train/eval state is left as it was.

    Args:
        model: a NeMo CTC, transducer or hybrid model.
        rows: manifest rows, not tarred.
        head: ``ctc``, ``transducer``, or ``auto`` = the one that ``transcribe`` would use.
        batch_size: rows a batch.
        on_batch: receives the number of rows done.
    """
    chosen = heads_of(model, which=head)[0]
    max_symbols = decoding_max_symbols(model)
    texts = [""] * len(rows)
    done = 0
    with evaluation_mode(model):
        for batch in audio_batches(
            rows, sample_rate=int(model.cfg.preprocessor.sample_rate), batch_size=batch_size, device=model.device
        ):
            encoded, lengths = encode(model, batch.signal, batch.signal_len)
            for i, labels in zip(batch.indices, chosen.greedy(encoded, lengths, max_symbols=max_symbols), strict=True):
                texts[i] = chosen.vocabulary.ids_to_text(labels)
            done += len(batch.indices)
            on_batch(done)
    return texts


@torch.no_grad()
def propose_rows(
    model: Any,
    rows: Sequence[Row],
    config: ProposalConfig,
    *,
    run_context: Context,
    head: str = "auto",
    batch_size: int = 16,
) -> list[list[str]]:
    """The texts of the N-best of every row, greedy first; for oracles.

    Args:
        model: a NeMo CTC, transducer or hybrid model.
        rows: manifest rows, not tarred.
        config: how many from which source.
        run_context: whose terms, with the row's own, are boosted.
        head: ``ctc``, ``transducer`` or ``auto``.
        batch_size: rows a batch.
    """
    chosen = heads_of(model, which=head)[0]
    proposer = Proposer(chosen, config)
    texts: list[list[str]] = [[] for _ in rows]
    with evaluation_mode(model):
        for batch in audio_batches(
            rows, sample_rate=int(model.cfg.preprocessor.sample_rate), batch_size=batch_size, device=model.device
        ):
            encoded, lengths = encode(model, batch.signal, batch.signal_len)
            contexts = [merge_context(run_context, rows[i].context) for i in batch.indices]
            for i, candidates in zip(batch.indices, proposer.propose(encoded, lengths, contexts), strict=True):
                texts[i] = [chosen.vocabulary.ids_to_text(c.labels) for c in candidates]
    return texts


def decoding_max_symbols(model: Any) -> int:
    """The labels a frame that the checkpoint's own greedy decoding allows; NeMo's default is 10."""
    greedy = (model.cfg.get("decoding") or {}).get("greedy") or {}
    return int(greedy.get("max_symbols") or greedy.get("max_symbols_per_step") or 10)
