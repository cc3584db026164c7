"""Transcripts and N-best lists of a manifest, without the side effects of ``transcribe()`` on a training model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.config import ProposalConfig
from nemo_llm_feedback.errors import ManifestError
from nemo_llm_feedback.heads import heads_of
from nemo_llm_feedback.manifests import Row, merge_context
from nemo_llm_feedback.metrics import CorpusScores, score_corpus
from nemo_llm_feedback.normalize import get_normalizer
from nemo_llm_feedback.proposals import Proposer
from nemo_llm_feedback.reference import encode, evaluation_mode
from nemo_llm_feedback.types import Context


@dataclass(frozen=True)
class AudioBatch:
    """Some rows of a manifest with their audio.

    Attributes:
        indices: positions of the rows in the manifest.
        signal: [B, S] waveform samples.
        signal_len: [B] samples.
    """

    indices: tuple[int, ...]
    signal: Tensor
    signal_len: Tensor


def audio_batches(
    rows: Sequence[Row], *, sample_rate: int, batch_size: int, device: torch.device
) -> Iterator[AudioBatch]:
    """Loads rows in batches of similar duration.

    Args:
        rows: manifest rows, not tarred.
        sample_rate: of the model, Hz.
        batch_size: rows a batch.
        device: where the signals go.
    """
    from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

    order = sorted(range(len(rows)), key=lambda i: rows[i].duration)
    for start in range(0, len(order), batch_size):
        indices = tuple(order[start : start + batch_size])
        samples = []
        for i in indices:
            segment = AudioSegment.from_file(
                rows[i].audio, target_sr=sample_rate, offset=rows[i].offset, duration=rows[i].duration
            )
            samples.append(torch.tensor(segment.samples, dtype=torch.float32))
        signal = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
        yield AudioBatch(indices, signal.to(device), torch.tensor([len(s) for s in samples], device=device))


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


def score_rows(
    rows: Sequence[Row], texts: Sequence[str], *, run_context: Context, normalizer: str = "basic"
) -> CorpusScores:
    """Scores transcripts against the rows' ``text`` and ``entities``; false alarms count the context's terms.

    Args:
        rows: with text.
        texts: one transcript a row.
        run_context: whose terms, with the row's own, are the list for false alarms.
        normalizer: name of the text normalisation of both sides.

    Raises:
        ManifestError: a row has no text.
    """
    bare = [row.origin for row in rows if not row.text]
    if bare:
        raise ManifestError(
            f"{len(bare)} row(s) have no reference text, e.g. {bare[0]}; evaluation needs `text` in every row."
        )
    entities = [row.data.get("entities") or [] for row in rows]
    terms = [merge_context(run_context, row.context).terms for row in rows]
    return score_corpus(
        [row.text for row in rows],
        texts,
        normalize=get_normalizer(normalizer),
        entities=entities if any(entities) else None,
        terms=terms if any(terms) else None,
    )
