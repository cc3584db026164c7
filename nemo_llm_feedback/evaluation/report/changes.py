"""Scores transcripts before and after adaptation by the run's reward, and makes the adapted model's N-best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nemo_llm_feedback.asr.encoded_rows import map_rows
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Audio, Hypothesis
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.comparison import Member
from nemo_llm_feedback.evaluation.report.data import Change
from nemo_llm_feedback.evaluation.report.words import changed_words
from nemo_llm_feedback.evaluation.transcribe import Decoded
from nemo_llm_feedback.hypotheses.nbest import hypothesis_groups

MAX_NBEST = 20
_BATCH = 8


def judged_changes(model: Any, rows: Sequence[Row], before: Decoded, after: Decoded) -> list[Change]:
    """The rows whose normalised transcript changed, with the score parts of both transcripts.

    The acoustic part is log p(labels | audio) of the decoded labels under the frozen base, in nats, for both, so that
    the scores show how the run's reward judges the change. The most changed also get an N-best, see
    :func:`adapted_nbest`.

    Args:
        model: after a run with feedback (its reference and reward are still there).
        rows: the transcribed rows.
        before, after: what the base and the adapted model made of them.

    Raises:
        RewardError, LLMError: the reward stopped working.
    """
    feedback = model.feedback
    feedback.reference.to(model.device)
    nbest = adapted_nbest(model, rows, before.texts, after.texts)
    normalize = get_normalizer(feedback.config.feedback.normalizer)
    changed = [i for i in range(len(rows)) if normalize(before.texts[i]) != normalize(after.texts[i])]
    labels = {rows[i].utterance: (before.labels[i], after.labels[i]) for i in changed}
    head, sources = feedback.reference.heads[0], ("greedy", "policy")

    def _judge(audio: Audio, encoded: Tensor, lengths: Tensor) -> list[dict[str, tuple[float, float]]]:
        """Score part → its values before and after, per row of a batch; the frozen base encodes the audio again."""
        pairs = [labels[utterance] for utterance in audio.utterances]
        logp = head.score(*feedback.reference.encode(audio.signal, audio.signal_len), pairs).cpu()
        parts = {"asr": logp}
        if feedback.maker.reward is not None:
            texts = [[normalize(head.vocabulary.ids_to_text(y)) for y in pair] for pair in pairs]
            members = [tuple(map(Hypothesis, *row, sources)) for row in zip(texts, pairs, strict=True)]
            spoken = [normalize(text) for text in audio.texts]
            groups = hypothesis_groups(audio.utterances, audio.contexts, members, logp, texts=spoken)
            output = feedback.maker.reward(groups)
            parts = {"reward": output.values, **output.parts}
        return [{name: tuple(values[b, :2].tolist()) for name, values in parts.items()} for b in range(len(pairs))]

    context = feedback.config.context.load()
    scores = map_rows(model, [rows[i] for i in changed], _judge, batch_size=_BATCH, run_context=context)
    return [
        Change(rows[i], before.texts[i], after.texts[i], found or {}, nbest[i])
        for i, found in zip(changed, scores, strict=True)
    ]


def adapted_nbest(
    model: Any, rows: Sequence[Row], before: Sequence[str], after: Sequence[str]
) -> list[tuple[Member, ...]]:
    """The adapted model's N-best with sources, the reward and its parts, for the `MAX_NBEST` most changed rows.

    Args:
        model: as in :func:`judged_changes`.
        rows: the transcribed rows.
        before, after: one transcript per row.

    Returns:
        One N-best per row, best reward first and unjudged members last (without a reward by log p); empty for the
        other rows.
    """
    feedback = model.feedback
    normalize = get_normalizer(feedback.config.feedback.normalizer)
    edits = [changed_words(normalize(b), normalize(a)) for b, a in zip(before, after, strict=True)]
    wanted = sorted((i for i, words in enumerate(edits) if words), key=lambda i: -edits[i])[:MAX_NBEST]

    def _propose(audio: Audio, encoded: Tensor, lengths: Tensor) -> list[tuple[Member, ...]]:
        """The N-best of each row of a batch."""
        nbest, head = feedback.maker.make(audio, encoded, lengths), feedback.heads[0].name
        parts = (
            {"reward": nbest.rewards[head], **nbest.parts} if feedback.maker.reward else {"asr": nbest.ref_logp[head]}
        )
        rows = zip(nbest.hypotheses, *(values.tolist() for values in parts.values()), strict=True)
        lists = [
            [Member(h.text, dict(zip(parts, values, strict=True)), h.source) for h, *values in zip(*row, strict=False)]
            for row in rows
        ]
        return [tuple(sorted(members, key=_unjudged_last)) for members in lists]

    feedback.reference.to(model.device)
    context = feedback.config.context.load()
    found = map_rows(model, [rows[i] for i in wanted], _propose, batch_size=_BATCH, run_context=context)
    by_row = dict(zip(wanted, found, strict=True))
    return [by_row.get(i) or () for i in range(len(rows))]


def _unjudged_last(member: Member) -> tuple[bool, float]:
    first = next(iter(member.scores.values()))
    return first != first, -first
