"""By which scores a transcript changed: both texts judged by the run's reward, and the adapted model's N-best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.encoded_rows import map_rows
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Audio, Hypothesis, HypothesisGroup
from nemo_llm_feedback.data.audio import audio_batches
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Member
from nemo_llm_feedback.evaluation.report.data import Change
from nemo_llm_feedback.evaluation.report.words import changed_words
from nemo_llm_feedback.hypotheses.nbest import NBestBatch

MAX_NBEST = 50
_BATCH = 8


@torch.no_grad()
def judged_changes(model: Any, rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> list[Change]:
    """The rows whose normalised transcript changed, with the score parts of both texts.

    The acoustic part is log p(text | audio) under the frozen base, in nats, for both, so that the scores say what the
    run's reward thinks of the change. The most changed also get an N-best, see :func:`own_nbest`.

    Args:
        model: after a run with feedback (its reference and reward are still there).
        rows: that were transcribed.
        before, after: one transcript a row.

    Raises:
        RewardError, LLMError: the reward stopped working.
    """
    state = model.feedback
    normalize = get_normalizer(state.config.feedback.normalizer)
    pairs = [(row, b, a) for row, b, a in zip(rows, before, after, strict=True) if normalize(b) != normalize(a)]
    if not pairs:
        return []
    state.reference.to(model.device)
    chosen = [row for row, _, _ in pairs]
    rate = int(model.cfg.preprocessor.sample_rate)
    scores: list[dict[str, tuple[float, float]]] = [{} for _ in pairs]
    run_context = state.config.context.load()
    with evaluation_mode(model):  # NeMo's features of the frozen copy follow the model's mode
        for indices, audio in audio_batches(
            chosen, sample_rate=rate, batch_size=_BATCH, device=model.device, run_context=run_context
        ):
            for i, judged in zip(indices, _judge(state, audio, [pairs[i][1:] for i in indices]), strict=True):
                scores[i] = judged
    nbest = own_nbest(model, chosen, [b for _, b, _ in pairs], [a for _, _, a in pairs])
    return [Change(row, b, a, scores[i], nbest[i]) for i, (row, b, a) in enumerate(pairs)]


@torch.no_grad()
def own_nbest(
    model: Any, rows: Sequence[Row], before: Sequence[str], after: Sequence[str]
) -> tuple[tuple[Member, ...], ...]:
    """The adapted model's N-best with the reward and its parts, for the `MAX_NBEST` most changed rows.

    Args:
        model, rows, before, after: as in :func:`judged_changes`.

    Returns:
        One N-best a row, best reward first; empty for the other rows.
    """
    state = model.feedback
    normalize = get_normalizer(state.config.feedback.normalizer)
    changed = [changed_words(normalize(b), normalize(a)) for b, a in zip(before, after, strict=True)]
    wanted = sorted((i for i, words in enumerate(changed) if words), key=lambda i: -changed[i])[:MAX_NBEST]
    chosen = [rows[i] for i in wanted]
    nbest: list[tuple[Member, ...]] = [() for _ in rows]
    state.reference.to(model.device)
    rewarded, head = state.maker.reward is not None, state.heads[0].name

    def members(audio: Audio, encoded: Tensor, lengths: Tensor) -> list[tuple[Member, ...]]:
        found = state.maker.make(audio, encoded, lengths)
        return [_members(found, b, head=head, rewarded=rewarded) for b in range(len(found))]

    found = map_rows(model, chosen, members, batch_size=_BATCH, run_context=state.config.context.load())
    for i, listed in zip(wanted, found, strict=True):
        nbest[i] = listed or ()
    return tuple(nbest)


def _judge(state: Any, audio: Audio, texts: Sequence[tuple[str, str]]) -> list[dict[str, tuple[float, float]]]:
    """Score part → its value for the two texts, for each row of the batch."""
    head, normalize = state.reference.heads[0], get_normalizer(state.config.feedback.normalizer)
    labels = [[tuple(head.vocabulary.text_to_ids(text)) for text in pair] for pair in texts]
    encoded, lengths = state.reference.encode(audio.signal, audio.signal_len)
    logp = head.score(encoded, lengths, labels).tolist()
    if state.maker.reward is None:
        return [{"asr": (pair[0], pair[1])} for pair in logp]
    groups = [
        HypothesisGroup(
            audio.utterances[b],
            tuple(Hypothesis(normalize(text), labels[b][k], "greedy") for k, text in enumerate(texts[b])),
            audio.contexts[b],
            tuple(logp[b]),
        )
        for b in range(len(texts))
    ]
    output = state.maker.reward(groups)
    columns = {"reward": output.values, **output.parts}
    return [
        {name: (float(values[b, 0]), float(values[b, 1])) for name, values in columns.items()}
        for b in range(len(groups))
    ]


def _members(nbest: NBestBatch, b: int, *, head: str, rewarded: bool) -> tuple[Member, ...]:
    """The members of an utterance, best reward first, unjudged ones last; without a reward by log p."""
    columns = {"reward": nbest.rewards[head], **nbest.parts} if rewarded else {"asr": nbest.ref_logp[head]}
    scores = {name: values[b].tolist() for name, values in columns.items()}
    first, texts = next(iter(scores.values())), nbest.texts[b]
    order = sorted(range(len(texts)), key=lambda n: (first[n] != first[n], -first[n]))
    return tuple(Member(texts[n], {name: values[n] for name, values in scores.items()}) for n in order)
