"""Measures the policy on utterances that training does not see: its transcripts and their rewards."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head, Labels
from nemo_llm_feedback.asr.look_ahead import look_aheads, looking_ahead
from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Audio, Context, Hypothesis
from nemo_llm_feedback.data.audio import by_duration, load_audio
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.transcribe import decoding_max_symbols
from nemo_llm_feedback.hypotheses.nbest import hypothesis_groups
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics, text_drift
from nemo_llm_feedback.training.distributed import CollectiveBlock, num_ranks, this_rank
from nemo_llm_feedback.training.state import Feedback
from nemo_llm_feedback.training.transcripts import decode_shared

_BATCH = 8
# The shipped English sentences: a model of another language has a WER of about 100 % on them, and of their 389 words
# two more wrong ones are chance.
_OTHER_LANGUAGE, _SMALLEST_WER = 90.0, 25.0


@dataclass(frozen=True)
class _Transcripts:
    """Greedy transcripts of the held-out utterances with their log p, nats.

    Attributes:
        texts: texts as the model writes them.
        labels: their label sequences.
        logp: log p under the model that wrote them.
        start: log p under the starting model.
        teacher: log p under the model whose scores are in the reward.
    """

    texts: list[str]
    labels: list[Labels]
    logp: list[float]
    start: list[float]
    teacher: list[float]


class HeldOutEvaluator:
    """Compares the policy with the starting model on held-out audio, which it keeps in memory; the gain of reward is
    counted over the teacher, which is the starting model in the first generation.

    Every rank measures its share of the batches, and all get the same numbers, those that one process would; each of
    them must make this, and call what it measures by.

    Args:
        model: the policy, for its device, sample rate and decoding limits.
        feedback: state with the frozen reference, which is the starting model, the teacher and the reward.

    Attributes:
        audio: this rank's share of the held-out utterances.
        start_wer: the guard set's WER in % under the starting model, where there is a set and it is known.
        rewarded: whether there is a reward to judge transcripts by (plain self-training has none).
    """

    def __init__(self, model: Any, feedback: Feedback) -> None:
        config = feedback.config
        self._feedback, self._guards = feedback, config.guards
        self._max_symbols = decoding_max_symbols(model)
        self._normalize = get_normalizer(config.feedback.normalizer)
        rate, context = int(model.cfg.preprocessor.sample_rate), config.context.load()
        rows = feedback.held_out_rows()
        mine = list(enumerate(by_duration(rows, _BATCH)))[this_rank() :: num_ranks()]
        # A streaming checkpoint is watched in all its look-aheads, which count the same.
        self._look_aheads: list[list[int] | None] = [*look_aheads(model.encoder)] or [None]
        # Where each of this rank's transcripts stands among those of all: look-ahead, batch, place in it.
        places = itertools.product(range(len(self._look_aheads)), mine)
        self._places = [(number, at, i) for number, (at, batch) in places for i in range(len(batch))]
        start, teacher = feedback.reference, feedback.teacher
        with CollectiveBlock(), model.run_precision():
            self.audio: list[Audio] = [
                load_audio([rows[i] for i in batch], sample_rate=rate, device=model.device, run_context=context)
                for _, batch in mine
            ]
            self._start = self._transcribe(start, start.heads[0])
            self._teacher = self._start if teacher is start else self._transcribe(teacher, teacher.heads[0])
        self.start_wer: float | None = None
        self.rewarded = config.needs_reward

    @torch.no_grad()
    def measure(self, model: Any, *, step: int) -> HeldOutMetrics:
        """Transcribes the held-out audio greedily and compares with the starting model.

        Args:
            model: the policy; its train/eval state is left as it was.
            step: optimizer steps done.
        """
        with CollectiveBlock() as ranks:
            with evaluation_mode(model), model.run_precision():
                now = self._transcribe(model, self._feedback.heads[0])
            scored = zip(now.labels, now.logp, now.start, strict=True)
            drift = [(p - f) / max(1, len(y)) if abs(p) + abs(f) < math.inf else None for y, p, f in scored]
            ranks.mine = list(zip(self._places, now.texts, self._start.texts, drift, self._gains(now), strict=True))
        self._feedback.release_llm()
        rows = sorted(itertools.chain(*ranks.all), key=operator.itemgetter(0))
        _, texts, start_texts, drifts, found = zip(*rows, strict=True)
        gains = judged_gains(found) if self._feedback.maker.reward is not None else ()
        judged = [gain for gain in gains if gain == gain]
        ratios = [ratio for ratio in drifts if ratio is not None]
        return HeldOutMetrics(
            step=step,
            gain=sum(judged) / len(judged) if judged else float("nan"),
            gains=gains,
            kl=sum(ratios) / len(ratios) if ratios else float("inf"),
            wer_rise=float("nan") if self._feedback.everyday else self.wer_rise(model),
            generation=self._feedback.generation.number,
            **text_drift(texts, start_texts),
        )

    def wer(self, model: Any) -> float:
        """The guard set's WER in % under the model; NaN without a guard set."""
        rows = self._feedback.guard_rows
        if not rows:
            return float("nan")
        texts: list[str] = []
        for context in self._look_aheads:
            with looking_ahead(context, model.encoder), model.run_precision():
                texts += decode_shared(model, rows, head=self._feedback.heads[0].name).texts
        normalizer = self._feedback.config.feedback.normalizer
        return score_rows([*rows] * len(self._look_aheads), texts, run_context=Context(), normalizer=normalizer).value(
            "wer"
        )

    def wer_rise(self, model: Any) -> float:
        """Rise of the guard set's WER over the starting model's, relative to that; NaN without a guard set."""
        if self.start_wer is None:
            return float("nan")
        smallest = _SMALLEST_WER if self._feedback.everyday else 1e-6
        return (self.wer(model) - self.start_wer) / max(self.start_wer, smallest)

    @property
    def watching(self) -> bool:
        """Whether the guard set is of a language that the starting model knows."""
        known = not self._feedback.everyday or self._guards.everyday == "en"
        return self.start_wer is not None and (known or self.start_wer < _OTHER_LANGUAGE)

    @torch.no_grad()
    def _transcribe(self, model: Any, head: Head) -> _Transcripts:
        """By the policy, or by a frozen model itself."""
        start, teacher = self._feedback.reference, self._feedback.teacher
        labels: list[Labels] = []
        logp: dict[int, list[float]] = {id(scorer): [] for scorer in (model, start, teacher)}
        for context, audio in itertools.product(self._look_aheads, self.audio):
            with looking_ahead(context, model.encoder, start.encoder, teacher.encoder):
                encoded, lengths = encode(model, audio.signal, audio.signal_len)
                found = head.greedy(encoded, lengths, max_symbols=self._max_symbols)
                labels += found
                logp[id(model)] += _scores(head, encoded, lengths, found)
                for frozen in {start, teacher} - {model}:
                    encoded, lengths = frozen.encode(audio.signal, audio.signal_len)
                    logp[id(frozen)] += _scores(frozen.heads[0], encoded, lengths, found)
        texts = [head.vocabulary.ids_to_text(y) for y in labels]
        return _Transcripts(texts, labels, logp[id(model)], logp[id(start)], logp[id(teacher)])

    def _gains(self, now: _Transcripts) -> list[float | None]:
        """Gain of reward of each of this rank's utterances: None where the text is the teacher's, NaN where the reward
        cannot judge. Both texts stand in one group, so that rewards that compare members work too, and greedy is the
        teacher's. None without a reward.
        """
        reward = self._feedback.maker.reward
        names = [u for audio in self.audio for u in audio.utterances] * len(self._look_aheads)
        contexts = [c for audio in self.audio for c in audio.contexts] * len(self._look_aheads)
        spoken = [self._normalize(text) for audio in self.audio for text in audio.texts] * len(self._look_aheads)
        texts = [
            (self._normalize(new), self._normalize(old))
            for new, old in zip(now.texts, self._teacher.texts, strict=True)
        ]
        gains: list[float | None] = [None] * len(texts)
        changed = [b for b, (new, old) in enumerate(texts) if new != old]
        if changed and reward is not None:
            members = [(Hypothesis(texts[b][0], (), "policy"), Hypothesis(texts[b][1], (), "greedy")) for b in changed]
            ref_logp = torch.tensor([[now.teacher[b], self._teacher.logp[b]] for b in changed])
            groups = hypothesis_groups(
                [names[b] for b in changed],
                [contexts[b] for b in changed],
                members,
                ref_logp,
                texts=[spoken[b] for b in changed] if spoken else (),
            )
            values = reward(groups).values
            for b, gain in zip(changed, (values[:, 0] - values[:, 1]).float().tolist(), strict=True):
                gains[b] = gain
        return gains


def judged_gains(found: Sequence[float | None]) -> tuple[float, ...]:
    """The gain of each utterance: 0 where its text has not changed, NaN for all if none that changed can be judged.

    Args:
        found: gain of each; None = not changed, NaN = cannot be judged.
    """
    changed = [gain for gain in found if gain is not None]
    unknown = bool(changed) and all(math.isnan(gain) for gain in changed)
    return tuple(math.nan if unknown else gain or 0.0 for gain in found)


def _scores(head: Head, encoded: Tensor, lengths: Tensor, labels: Sequence[Labels]) -> list[float]:
    """log p of one label sequence per row, nats."""
    return head.score(encoded, lengths, [[y] for y in labels]).squeeze(1).tolist()
