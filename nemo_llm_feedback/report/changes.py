"""By which scores a transcript changed: both texts judged by the run's reward, and the N-best that it was among."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_llm_feedback.comparison import Member
from nemo_llm_feedback.evaluation import AudioBatch, audio_batches
from nemo_llm_feedback.groups import Audio, ScoredGroup
from nemo_llm_feedback.manifests import Row, merge_context
from nemo_llm_feedback.normalize import get_normalizer
from nemo_llm_feedback.reference import encode, evaluation_mode
from nemo_llm_feedback.report.data import Change
from nemo_llm_feedback.trie import PrefixTrie
from nemo_llm_feedback.types import Context, Hypothesis, HypothesisGroup

MAX_NBEST = 50
_BATCH = 8


@torch.no_grad()
def judged_changes(model: Any, rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> list[Change]:
    """The rows whose normalised transcript changed, with the score parts of both texts.

    The acoustic part is log p(text | audio) under the frozen base, in nats, for both, so that the scores say what the
    run's reward thinks of the change. The first `MAX_NBEST` also get the adapted model's own groups.

    Args:
        model: after a run with feedback (its reference and reward are still there).
        rows: that were transcribed.
        before, after: one transcript a row.

    Raises:
        RewardError, LLMError: the reward stopped working.
    """
    state = model._feedback
    normalize = get_normalizer(state.config.feedback.normalizer)
    pairs = [(row, b, a) for row, b, a in zip(rows, before, after, strict=True) if normalize(b) != normalize(a)]
    if not pairs:
        return []
    state.reference.to(model.device)
    chosen = [row for row, _, _ in pairs]
    rate = int(model.cfg.preprocessor.sample_rate)
    scores: list[dict[str, tuple[float, float]]] = [{} for _ in pairs]
    nbest: list[tuple[Member, ...]] = [() for _ in pairs]
    run_context = state.config.context.load()
    with evaluation_mode(model):
        for batch in audio_batches(chosen, sample_rate=rate, batch_size=_BATCH, device=model.device):
            contexts = [merge_context(run_context, chosen[i].context) for i in batch.indices]
            texts = [pairs[i][1:] for i in batch.indices]
            for i, judged in zip(batch.indices, _judge(state, chosen, batch, texts, contexts), strict=True):
                scores[i] = judged
            for i, scored in _own_groups(model, chosen, batch, contexts):
                nbest[i] = _members(scored, head=state.heads[0].name)
    return [Change(row, b, a, scores[i], nbest[i]) for i, (row, b, a) in enumerate(pairs)]


def _judge(
    state: Any, rows: Sequence[Row], batch: AudioBatch, texts: Sequence[tuple[str, str]], contexts: Sequence[Context]
) -> list[dict[str, tuple[float, float]]]:
    """Score part → its value for the two texts, for each row of the batch."""
    head, normalize = state.reference.heads[0], get_normalizer(state.config.feedback.normalizer)
    labels = [tuple(head.vocabulary.text_to_ids(text)) for pair in texts for text in pair]
    trie = PrefixTrie.build([list(ids) for ids in labels], [b for b in range(len(texts)) for _ in range(2)])
    encoded, lengths = state.reference.encode(batch.signal, batch.signal_len)
    budget = state.config.feedback.memory_budget_mb
    logp = head.log_prob(encoded, lengths, trie.to(encoded.device), memory_budget_mb=budget).view(-1, 2).tolist()
    if state.maker.reward is None:
        return [{"asr": (pair[0], pair[1])} for pair in logp]
    groups = [
        HypothesisGroup(
            rows[i].utterance,
            tuple(Hypothesis(normalize(text), labels[2 * b + k], "greedy") for k, text in enumerate(texts[b])),
            contexts[b],
            tuple(logp[b]),
        )
        for b, i in enumerate(batch.indices)
    ]
    output = state.maker.reward(groups)
    columns = {"reward": output.values, **output.parts}
    return [
        {name: (float(values[b, 0]), float(values[b, 1])) for name, values in columns.items()}
        for b in range(len(groups))
    ]


def _own_groups(
    model: Any, rows: Sequence[Row], batch: AudioBatch, contexts: Sequence[Context]
) -> list[tuple[int, ScoredGroup]]:
    wanted = [b for b, i in enumerate(batch.indices) if i < MAX_NBEST]
    if not wanted:
        return []
    names = tuple(rows[batch.indices[b]].utterance for b in wanted)
    audio = Audio(batch.signal[wanted], batch.signal_len[wanted], names, tuple(contexts[b] for b in wanted))
    groups = model._feedback.maker.make(audio, *encode(model, audio.signal, audio.signal_len))
    return [(batch.indices[b], group) for b, group in zip(wanted, groups, strict=True)]


def _members(scored: ScoredGroup, *, head: str) -> tuple[Member, ...]:
    """The members, best reward first, and those that the reward could not judge last."""
    rewards = scored.rewards[head]
    order = sorted(range(len(scored.group)), key=lambda n: (rewards[n] != rewards[n], -rewards[n]))
    return tuple(
        Member(
            scored.group.texts[n],
            {"reward": rewards[n], **{name: values[n] for name, values in scored.parts.items()}},
        )
        for n in order
    )
