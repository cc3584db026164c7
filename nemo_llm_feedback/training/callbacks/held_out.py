"""Looks at the policy on utterances that training does not see: what it writes now, and what the reward says to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_llm_feedback.asr.heads import Head, Labels
from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Audio, Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.data.audio import audio_batches
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.transcribe import decoding_max_symbols, transcribe_rows
from nemo_llm_feedback.training.callbacks.guards import Look, text_drift
from nemo_llm_feedback.training.setup import FeedbackState

_BATCH = 8


class HeldOutWatch:
    """Measures :class:`Look` on held-out audio, which it keeps in memory.

    Args:
        model: the policy, for its device, sample rate and decoding limits.
        state: with the frozen reference, which is the starting model, and the reward.
        rows: held-out rows with audio files.
        guard_rows: labelled rows whose WER is watched; may be empty.

    Attributes:
        audio: the held-out utterances.
        start_wer: the guard set's WER in % under the starting model, measured by the first look, or put back by a
            resumed run.
        rewarded: whether there is a reward to judge transcripts by (plain self-training has none).
    """

    def __init__(self, model: Any, state: FeedbackState, rows: Sequence[Row], guard_rows: Sequence[Row]) -> None:
        self._state, self._guard_rows = state, guard_rows
        self._max_symbols = decoding_max_symbols(model)
        self._normalize = get_normalizer(state.config.feedback.normalizer)
        self.audio = _load(model, rows, state.config.context.load())
        self._reference = state.reference.heads[0]
        self._start: list[tuple[Labels, float]] = [pair for audio in self.audio for pair in self._starting(audio)]
        self.start_wer: float | None = None
        self.rewarded = state.config.needs_reward

    @torch.no_grad()
    def look(self, model: Any, *, step: int) -> Look:
        """Transcribes the held-out audio greedily and compares with the starting model.

        Args:
            model: the policy; its train/eval state is left as it was.
            step: optimizer steps done.
        """
        head = self._state.heads[0]
        now: list[tuple[Labels, float, float]] = []
        with evaluation_mode(model):
            for audio in self.audio:
                encoded, lengths = encode(model, audio.signal, audio.signal_len)
                labels = head.greedy(encoded, lengths, max_symbols=self._max_symbols)
                policy = self._log_prob(head, encoded, lengths, labels)
                ref_encoded, ref_lengths = self._state.reference.encode(audio.signal, audio.signal_len)
                frozen = self._log_prob(self._reference, ref_encoded, ref_lengths, labels)
                now += zip(map(tuple, labels), policy, frozen, strict=True)
        texts = [head.vocabulary.ids_to_text(labels) for labels, _, _ in now]
        start = [head.vocabulary.ids_to_text(labels) for labels, _ in self._start]
        ratios = [(p - f) / max(1, len(y)) for y, p, f in now if p == p and f == f and abs(p) + abs(f) < float("inf")]
        return Look(
            step=step,
            gain=self._gain(texts, start, [f for _, _, f in now]),
            kl=sum(ratios) / len(ratios) if ratios else float("inf"),
            wer_rise=self.wer_rise(model),
            **text_drift(texts, start),
        )

    def wer_rise(self, model: Any) -> float:
        """Relative rise of the guard set's WER over the first one measured; NaN without a guard set."""
        if not self._guard_rows:
            return float("nan")
        wer = self._guard_wer(model)
        if self.start_wer is None:
            self.start_wer = wer
        return wer / max(self.start_wer, 1e-6) - 1

    def _guard_wer(self, model: Any) -> float:
        texts = transcribe_rows(model, self._guard_rows, head=self._state.heads[0].name)
        return score_rows(
            self._guard_rows, texts, run_context=Context(), normalizer=self._state.config.feedback.normalizer
        ).value("wer")

    def _starting(self, audio: Audio) -> list[tuple[Labels, float]]:
        encoded, lengths = self._state.reference.encode(audio.signal, audio.signal_len)
        labels = self._reference.greedy(encoded, lengths, max_symbols=self._max_symbols)
        return list(zip(map(tuple, labels), self._log_prob(self._reference, encoded, lengths, labels), strict=True))

    def _log_prob(self, head: Head, encoded: Any, lengths: Any, labels: Sequence[Labels]) -> list[float]:
        return head.score(encoded, lengths, [[y] for y in labels]).squeeze(1).tolist()

    def _gain(self, now: Sequence[str], start: Sequence[str], frozen: Sequence[float]) -> float:
        """Mean gain of reward over the utterances that it can judge; both texts stand in one group, so that rewards
        that compare members work too. NaN without a reward or with nothing judged."""
        reward = self._state.maker.reward
        if reward is None:
            return float("nan")
        contexts = [c for audio in self.audio for c in audio.contexts]
        names = [u for audio in self.audio for u in audio.utterances]
        groups, unchanged = [], 0
        for b, (new, old) in enumerate(zip(now, start, strict=True)):
            texts = self._normalize(new), self._normalize(old)
            if texts[0] == texts[1]:
                unchanged += 1
                continue
            members = tuple(Hypothesis(text, (), "greedy") for text in texts)
            groups.append(HypothesisGroup(names[b], members, contexts[b], (frozen[b], self._start[b][1])))
        values = reward(groups).values if groups else torch.zeros(0, 2)
        gains = (values[:, 0] - values[:, 1]).tolist()
        judged = [g for g in gains if g == g] + [0.0] * unchanged
        return sum(judged) / len(judged) if judged else float("nan")


def _load(model: Any, rows: Sequence[Row], run_context: Context) -> list[Audio]:
    rate = int(model.cfg.preprocessor.sample_rate)
    batches = audio_batches(rows, sample_rate=rate, batch_size=_BATCH, device=model.device, run_context=run_context)
    return [audio for _, audio in batches]
