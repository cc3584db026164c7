"""Makes the scored N-best of a manifest with a model as it is, without training, for the command ``score``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.encoded_rows import encoded_rows
from nemo_llm_feedback.asr.heads import Head, Labels, heads_of
from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Audio, Hypothesis, pad_groups
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.hypotheses.maker import Corrector, NBestMaker, judged
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.hypotheses.spelling import written_labels
from nemo_llm_feedback.hypotheses.trust import SourceTrust, Trust, contests, rivals, source_trust
from nemo_llm_feedback.rewards import Reward


@dataclass(frozen=True)
class JudgedReference:
    """An utterance's reference text as a further member of its N-best.

    Attributes:
        nbest: one utterance: its members followed by the reference, judged together.
        feasible: whether the audio is long enough for the reference; its rewards mean nothing otherwise.
    """

    nbest: NBestBatch
    feasible: bool


@torch.no_grad()
def scored_nbest(
    model: Any,
    rows: Sequence[Row],
    *,
    config: RunConfig,
    reward: Reward,
    corrector: Corrector | None = None,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda done: None,
) -> NBestBatch:
    """Proposes, scores and judges the N-best of every row; the model's train/eval state is left as it was.

    Args:
        model: a NeMo CTC, transducer or hybrid model; it proposes and is the reference, too (``parts["asr"]``).
        rows: manifest rows, not tarred; at least one.
        config: names proposals, context, head, text normalisation and memory budget.
        reward: judges them.
        corrector: writes one more member per utterance, see ``NBestMaker``.
        batch_size: rows per batch.
        on_batch: receives the number of rows done.

    Returns:
        One utterance per row, in the rows' order; greedy is the first member unless all are samples.

    Raises:
        RewardError, LLMError: the reward cannot work at all.
    """
    itself = _Itself(model, config, batch_size)
    maker = NBestMaker(
        Proposer(itself.heads[0], config.proposals, copies=config.wants_samples),
        itself,
        normalize=get_normalizer(config.feedback.normalizer),
        reward=reward,
        corrector=corrector,
    )
    order: list[int] = []
    found: list[NBestBatch] = []
    with maker.proposer.same_weights():
        for indices, audio, encoded, lengths in itself.batches(rows):
            found.append(maker.make(audio, encoded, lengths))
            order += indices
            on_batch(len(order))
    return NBestBatch.cat(found).select(sorted(range(len(order)), key=order.__getitem__))


@torch.no_grad()
def measured_trust(
    model: Any, rows: Sequence[Row], nbest: NBestBatch, *, config: RunConfig, batch_size: int = 16
) -> dict[str, SourceTrust]:
    """The trust in each other recogniser that ``adapt`` would find if these rows were its pool.

    Args:
        model, rows, config, batch_size: see :func:`scored_nbest`.
        nbest: the N-best that it returned for these rows.
    """
    itself = _Itself(model, config, batch_size)
    head = itself.heads[0]
    others = rivals(nbest, head=head.name)
    texts = [[text for of in others.values() for text in of[b]] for b in range(len(rows))]
    logp: list[dict[Labels, float]] = [{} for _ in rows]
    for positions, _, encoded, lengths in itself.batches(rows) if others else ():
        scores = head.score(encoded, lengths, [texts[i] for i in positions]).tolist()
        for i, values in zip(positions, scores, strict=True):
            logp[i] = dict(zip(texts[i], values, strict=False))
    return {source: source_trust(of) for source, of in contests(nbest, others, logp, head=head.name).items()}


@torch.no_grad()
def judged_references(
    model: Any,
    rows: Sequence[Row],
    nbest: NBestBatch,
    *,
    config: RunConfig,
    reward: Reward,
    trust: Trust | None = None,
    batch_size: int = 16,
) -> list[JudgedReference | None]:
    """Judges the rows' reference texts beside the members of their N-best: does the reward prefer the truth?

    Args:
        model, rows, config, reward, batch_size: see :func:`scored_nbest`.
        nbest: the N-best that it returned for these rows.
        trust: by which it was judged.

    Returns:
        One entry per row, None where it has no text or one that the checkpoint cannot write. The reference's acoustic
        score is that of the better of its spellings as given and as normalised.
    """
    itself = _Itself(model, config, batch_size)
    head, normalize = itself.heads[0], get_normalizer(config.feedback.normalizer)
    found: list[JudgedReference | None] = [None] * len(rows)
    labelled = [i for i, row in enumerate(rows) if row.text]
    for positions, audio, encoded, lengths in itself.batches([rows[i] for i in labelled]):
        indices = [labelled[p] for p in positions]
        texts = [rows[i].text for i in indices]
        written = [[written_labels(t, head.vocabulary) for t in (text, normalize(text))] for text in texts]
        spellings = [[labels for labels in row if labels] or [()] for row in written]
        scores, better = head.score(encoded, lengths, spellings).max(dim=1)
        hypotheses, ref_logp = [], []
        for b, i in enumerate(indices):
            reference = Hypothesis(normalize(texts[b]), spellings[b][int(better[b])], "reference")
            members = nbest.hypotheses[i]
            hypotheses.append((*members, reference))
            ref_logp.append([*nbest.ref_logp[head.name][i, : len(members)].tolist(), float(scores[b])])
        padded = {head.name: pad_groups(ref_logp, fill=-math.inf)}
        normal = [normalize(text) for text in texts]
        extended = judged(audio.utterances, audio.contexts, tuple(hypotheses), padded, reward, trust, texts=normal)
        for b, i in enumerate(indices):
            if any(spellings[b]):
                found[i] = JudgedReference(extended.select([b]), math.isfinite(ref_logp[b][-1]))
    return found


class _Itself:
    """A model in place of the frozen reference: nothing is copied, and audio is encoded once."""

    def __init__(self, model: Any, config: RunConfig, batch_size: int) -> None:
        self._model, self._batch_size, self._context = model, batch_size, config.context.load()
        feedback = config.feedback
        found = heads_of(model, which=feedback.heads, memory_budget_mb=feedback.memory_budget_mb)
        self.heads: list[Head] = found[:1]
        self._encoded: tuple[Tensor, Tensor] | None = None

    def encode(self, signal: Tensor, signal_len: Tensor) -> tuple[Tensor, Tensor]:
        """What the batch's audio was encoded to; ``NBestMaker`` asks its reference for it."""
        assert self._encoded is not None
        return self._encoded

    def batches(self, rows: Sequence[Row]) -> Iterator[tuple[tuple[int, ...], Audio, Tensor, Tensor]]:
        """Yields positions among the rows, their audio, [B, D, T] encoder output and [B] frames."""
        for indices, audio, encoded, lengths in encoded_rows(
            self._model, rows, batch_size=self._batch_size, run_context=self._context
        ):
            self._encoded = encoded, lengths
            yield indices, audio, encoded, lengths
