"""The run's own loss on utterances that training does not see: what a short trial can be judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.training.losses import group_loss, total
from nemo_llm_feedback.training.setup import FeedbackState


class HeldOutLoss:
    """Objective and anchors on groups of held-out utterances that the model proposes when this is made.

    Transcripts jump, and a dozen updates may make them worse before they get better; the loss on groups that stay the
    same moves with every update, and rises where updates are too large, since the anchors are in it.

    Args:
        model: the policy, in its starting weights.
        state: with proposer, reward, heads and objective.
        audio: the held-out utterances; at least one.
    """

    def __init__(self, model: Any, state: FeedbackState, audio: Sequence[Audio]) -> None:
        self._state, self._audio = state, audio
        self._groups: list[list[ScoredGroup]] = []
        with torch.no_grad(), evaluation_mode(model):
            for part in audio:
                encoded, lengths = encode(model, part.signal, part.signal_len)
                groups = state.maker.make(part, encoded, lengths)
                old = {h.name: model._group_logp(h, encoded, lengths, groups).tolist() for h in state.heads}
                self._groups.append(
                    [
                        dataclasses.replace(g, old_logp={name: rows[b][: len(g.group)] for name, rows in old.items()})
                        for b, g in enumerate(groups)
                    ]
                )

    @torch.no_grad()
    def __call__(self, model: Any) -> float:
        """The loss under the model's weights now, without SpecAugment and dropout: mean over utterances, in nats for
        the likelihood objectives, in the reward's unit for ``mwer``."""
        config, state, found = self._state.config, self._state, 0.0
        with evaluation_mode(model):
            for part, groups in zip(self._audio, self._groups, strict=True):
                encoded, lengths = encode(model, part.signal, part.signal_len)
                for head in state.heads:
                    logp = model._group_logp(head, encoded, lengths, groups)
                    terms = group_loss(config.objective, logp, groups, head=head.name).terms
                    found += state.head_weights[head.name] * float(total(terms)) * len(groups)
        return found / sum(len(groups) for groups in self._groups)
