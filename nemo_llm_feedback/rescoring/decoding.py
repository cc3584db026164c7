"""Subclasses of NeMo's decoding classes that rescore: transcribe, validation, WER and predict_step decode by them.

NeMo dispatches on the classes of its decoding objects, so a hooked object has a subclass of its class; the class is
exchanged after NeMo built the object (``adopt``).
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from nemo.collections.asr.parts.submodules.ctc_decoding import AbstractCTCDecoding
from nemo.collections.asr.parts.utils.rnnt_utils import Hypothesis
from torch import Tensor

from nemo_llm_feedback.asr.heads import CTCHead, Head, Labels, TransducerHead
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.asr.searches import nbest_labels, without_padding
from nemo_llm_feedback.core.errors import DecodingError
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.rescoring.alignment import align_ctc, align_transducer
from nemo_llm_feedback.rescoring.scoring import Rescorer, ScoredHypothesis


class NBest(list):
    """The N-best of an utterance, best first; it also has the attributes of its best hypothesis (``nbest.text``).

    NeMo's WER log, CTC ``transcribe`` and others read ``.text`` of what a decoder returns and fail on a plain list.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self:
            raise AttributeError(name)
        return getattr(self[0], name)


class _Hook(ABC):  # as NeMo's decoding classes are, or Python would refuse the exchange of classes
    """What the hooked classes share. ``adopt`` sets the attributes."""

    rescorer: Rescorer
    head: Head
    proposer: Proposer | None
    align: bool
    return_nbest: bool
    decoding: Any
    cfg: Any

    def _rescored(self, found: Sequence[Any], encoded: Tensor, lengths: Tensor) -> list[Any]:
        """Rescores the first pass.

        Args:
            found: NeMo's N-best containers, one per row.
            encoded: [B, D, T] encoder output, of CTC [B, V+1, T] log-probabilities.
            lengths: [B] frames.

        Returns:
            B best hypotheses, or B ``NBest``s.
        """
        size = self.head.vocabulary.vocab_size
        # Some searches leave their start symbol, which is blank, in the sequence.
        rows = [[tuple(i for i in y if 0 <= i < size) for y in row] for row in nbest_labels(found[: len(lengths)])]
        ranked = self.rescorer.rescore(self.head, encoded, lengths, rows, self.proposer)
        results = []
        for members, x, frames in zip(ranked, encoded, lengths.tolist(), strict=True):
            shown = members if self.return_nbest else members[:1]
            results.append(NBest(self._hypothesis(member, members, x[:, :frames]) for member in shown))
        return results if self.return_nbest else [hyps[0] for hyps in results]

    def _hypothesis(self, member: ScoredHypothesis, members: list[ScoredHypothesis], encoded: Tensor) -> Hypothesis:
        """NeMo's record of a member; ``encoded``: [D, T] the utterance's valid frames."""
        labels = list(member.labels)
        with torch.inference_mode(False):  # an inference tensor could not be used in training
            sequence = torch.tensor(labels, dtype=torch.long)
        text = self.decode_tokens_to_str_with_strip_punctuation(labels)  # type: ignore[attr-defined]
        hyp = Hypothesis(score=member.score, y_sequence=sequence, text=text, length=encoded.shape[1])
        hyp.score_parts, hyp.n_best = dict(member.parts), tuple(members)
        if self.cfg.get("compute_hypothesis_token_set", False):
            hyp.tokens = self.decode_ids_to_tokens(labels)  # type: ignore[attr-defined]
        if self.align:
            self._add_timestamps(hyp, member.labels, encoded)
        return hyp

    @abstractmethod
    def _add_timestamps(self, hyp: Hypothesis, labels: Labels, encoded: Tensor) -> None:
        """Sets ``hyp.timestamp`` as NeMo's greedy decoder would; ``encoded``: [D, T] the valid frames."""


class _CTCHook(_Hook):
    """Rescores in NeMo's CTC decoding, whose encoder output here is [B, V+1, T] log-probabilities."""

    def ctc_decoder_predictions_tensor(
        self,
        decoder_outputs: Tensor,
        decoder_lengths: Tensor | None = None,
        fold_consecutive: bool = True,
        return_hypotheses: bool = False,
    ) -> list[Any]:
        """NeMo's method with the N-best rescored; both values of ``return_hypotheses`` give full hypotheses.

        Args:
            decoder_outputs: [B, T, V+1] natural-log probabilities.
            decoder_lengths: [B] frames; None = all T.
            fold_consecutive: without effect, as in NeMo's beams.
            return_hypotheses: without effect.

        Returns:
            B ``Hypothesis``, or B ``NBest`` with ``beam.return_best_hypothesis: false``.
        """
        if decoder_outputs.dim() != 3:
            raise DecodingError(
                f"rescoring needs CTC log-probabilities [B, T, V], got the shape {tuple(decoder_outputs.shape)}."
            )
        log_probs = decoder_outputs.to(torch.promote_types(decoder_outputs.dtype, torch.float32))
        lengths = decoder_lengths
        if lengths is None:
            lengths = torch.full((len(log_probs),), log_probs.shape[1], device=log_probs.device)
        with torch.inference_mode():
            (found,) = self.decoding(decoder_output=without_padding(log_probs, lengths), decoder_lengths=lengths)
            return self._rescored(found, log_probs.transpose(1, 2), lengths)

    def _add_timestamps(self, hyp: Hypothesis, labels: Labels, encoded: Tensor) -> None:
        starts, hyp.timestamp = align_ctc(encoded.T, labels)
        text = hyp.text
        # What NeMo's greedy decoder gives this method: labels, and for each the frames since the one before.
        hyp.text = (list(labels), [b - a for a, b in itertools.pairwise([0, *starts])])
        self.compute_ctc_timestamps(hyp, self.cfg.get("ctc_timestamp_type", "all"))  # type: ignore[attr-defined]
        hyp.text = text


class _TransducerHook(_Hook):
    """Rescores in NeMo's RNN-T and TDT decoding."""

    head: TransducerHead

    def rnnt_decoder_predictions_tensor(
        self,
        encoder_output: Tensor,
        encoded_lengths: Tensor,
        return_hypotheses: bool = False,
        partial_hypotheses: list[Hypothesis] | None = None,
    ) -> list[Any]:
        """NeMo's method with the N-best rescored; both values of ``return_hypotheses`` give full hypotheses.

        Args:
            encoder_output: [B, D, T] encoder output.
            encoded_lengths: [B] frames.
            return_hypotheses: without effect.
            partial_hypotheses: must be None: whole utterances are rescored.

        Returns:
            B ``Hypothesis``, or B ``NBest`` with ``beam.return_best_hypothesis: false``.
        """
        if partial_hypotheses is not None and any(hyp is not None for hyp in partial_hypotheses):
            raise DecodingError("rescoring judges whole utterances: disable_rescoring(model) before streaming.")
        with torch.inference_mode(), evaluation_mode(self.decoding.decoder), evaluation_mode(self.decoding.joint):
            (found,) = self.decoding(encoder_output=encoder_output, encoded_lengths=encoded_lengths)
            return self._rescored(found, encoder_output, encoded_lengths)

    def _add_timestamps(self, hyp: Hypothesis, labels: Labels, encoded: Tensor) -> None:
        hyp.timestamp, hyp.token_duration = align_transducer(self.head, encoded, labels)
        self.compute_rnnt_timestamps(hyp, self.cfg.get("rnnt_timestamp_type", "all"))  # type: ignore[attr-defined]

    def decode_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        """NeMo's method, whose character TDT would drop the last labels of the vocabulary from every text."""
        labels: dict[int, str] | None = getattr(self, "labels_map", None)
        if labels is None:
            return super().decode_ids_to_tokens(tokens)  # type: ignore[misc]
        return [labels[token] for token in map(int, tokens) if token in labels]


@functools.cache
def _hooked(cls: type) -> type:
    """The rescoring subclass of one of NeMo's four decoding classes."""
    hook = _CTCHook if issubclass(cls, AbstractCTCDecoding) else _TransducerHook
    return type(f"Rescored{cls.__name__}", (hook, cls), {"__module__": __name__})


def adopt(decoding: Any, rescorer: Rescorer, head: Head, *, align: bool, return_nbest: bool) -> None:
    """Turns a decoding object that NeMo just built for N-best into a rescoring one.

    Args:
        decoding: NeMo's decoding object, built from ``nbest_config``.
        rescorer: chooses among the hypotheses.
        head: the head of the model that decodes.
        align: whether to give timestamps.
        return_nbest: whether to return N-best lists instead of the best hypothesis.
    """
    decoding.__class__ = _hooked(decoding.__class__)
    if head.name == "ctc":
        # The decoder has run by the time its log-probabilities arrive here.
        head = CTCHead(lambda encoder_output: encoder_output.transpose(1, 2), head.vocabulary)
    decoding.rescorer, decoding.head, decoding.proposer = rescorer, head, rescorer.proposer(head)
    decoding.align, decoding.return_nbest = align, return_nbest
    decoding.compute_timestamps = align
    if head.name == "ctc":
        decoding.decoding.compute_timestamps = False  # NeMo's setter sets it on the search, too, which has none
