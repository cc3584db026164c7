"""The heads of a NeMo model behind one interface: exact log p(y | x), beam search, greedy and exact sampling.

A :class:`Head` borrows the model's modules, so it can stay in a plain holder outside the module tree. Two kinds of
model use it: the policy that learns, and the frozen reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood import (
    MEMORY_BUDGET_MB,
    Band,
    JointCells,
    ctc_divergence,
    ctc_log_prob,
    transducer_divergence,
    transducer_log_prob,
)
from nemo_llm_feedback.asr.sampling import collapse, sample_ctc, sample_transducer
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.trie import PrefixTrie

Labels = tuple[int, ...]

# NeMo's ``GPUBoostingTreeModel`` and its weight.
Boosting = tuple[Any, float]

# A log-probability; −∞ would make NaNs in NeMo's beam.
_IMPOSSIBLE = -1e4


@dataclass(frozen=True)
class Vocabulary:
    """Text ↔ label ids of a checkpoint, for BPE and character models alike.

    Attributes:
        tokenizer: NeMo's tokenizer, or None for a character model.
        labels: the label of every id, without blank.
    """

    tokenizer: Any
    labels: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Number of labels without blank."""
        return len(self.labels)

    @property
    def cased(self) -> bool:
        """Whether any label has an upper-case letter."""
        return any(label != label.lower() for label in self.labels)

    def text_to_ids(self, text: str) -> list[int]:
        """Label ids of a text; characters the model lacks are left out (character models) or unknown (BPE)."""
        text = text if self.cased else text.lower()
        if self.tokenizer is not None:
            return list(self.tokenizer.text_to_ids(text))
        ids = {label: i for i, label in enumerate(self.labels)}
        return [ids[c] for c in text if c in ids]

    def ids_to_text(self, ids: Sequence[int]) -> str:
        """The text of label ids."""
        if self.tokenizer is not None:
            return str(self.tokenizer.ids_to_text(list(ids))) if ids else ""
        return "".join(self.labels[i] for i in ids)


class Head(ABC):
    """One output head of a model.

    Attributes:
        name: ``ctc`` or ``transducer``.
        vocabulary: its labels; blank is the id after the last one.
    """

    name: str
    vocabulary: Vocabulary

    def score(self, encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """log p(y | x) of every hypothesis of every row, the marginal over alignments.

        Hypotheses of a row share the computation of their common prefixes (see ``core.trie``). A value does not depend
        on the other rows and hypotheses, on padding or on the memory budget.

        Args:
            encoded: [B, D, T] encoder output.
            lengths: [B] frames.
            labels: B rows of label sequences without blank; rows of any size, sequences of any length.

        Returns:
            [B, N] natural log, N the largest row, float32 (float64 for a model in float64), with gradient; −inf where
            the audio is too short for the text, and on the padding of smaller rows.
        """
        places = [(b, n) for b, row in enumerate(labels) for n in range(len(row))]
        rows, columns = torch.tensor(places, dtype=torch.long, device=encoded.device).reshape(-1, 2).unbind(1)
        trie = PrefixTrie.build([list(y) for row in labels for y in row], rows).to(encoded.device)
        flat = self.log_prob(encoded, lengths, trie)
        width = max((len(row) for row in labels), default=0)
        return flat.new_full((len(labels), width), float("-inf")).index_put((rows, columns), flat)

    @abstractmethod
    def log_prob(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> Tensor:
        """What :meth:`score` computes, on a trie.

        Args:
            encoded: [B, D, T] encoder output.
            lengths: [B] frames.
            trie: the H hypotheses.

        Returns:
            [H] natural log with gradient; −inf where the audio is too short.
        """

    @abstractmethod
    def divergence(
        self, encoded: Tensor, reference: Head, ref_encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """How far this head's outputs have moved from those of a reference along some audio.

        Args:
            encoded: [B, D, T] encoder output of the policy.
            reference: the same kind of head, frozen.
            ref_encoded: [B, D, T] the reference's encoder output of the same audio.
            lengths: [B] frames.
            labels: one label sequence per row, along whose alignments a transducer is compared; not read by CTC.

        Returns:
            [B] KL(reference ‖ policy) summed along the audio, nats per utterance, with gradient.
        """

    @abstractmethod
    def beam(
        self, encoded: Tensor, lengths: Tensor, *, size: int, max_symbols: int, boosting: Boosting | None = None
    ) -> list[list[Labels]]:
        """Label sequences of NeMo's batched beam search, best first.

        Args:
            encoded: [B, D, T] encoder output, no gradient needed.
            lengths: [B] frames.
            size: beam size = largest number of sequences.
            max_symbols: largest number of labels in one frame (transducers).
            boosting: for phrase boosting.
        """

    @abstractmethod
    def greedy(self, encoded: Tensor, lengths: Tensor, *, max_symbols: int) -> list[Labels]:
        """The greedy label sequence of every row; arguments as in :meth:`beam`."""

    @abstractmethod
    def sample(self, encoded: Tensor, lengths: Tensor, *, size: int, generator: torch.Generator) -> list[list[Labels]]:
        """``size`` exact samples from p(y | x) per row; fewer of TDT, whose incomplete paths are rejected."""


class CTCHead(Head):
    """The CTC head of a CTC or hybrid model.

    Args:
        decoder: NeMo's ``ConvASRDecoder``.
        vocabulary: its labels; blank is the id after the last one.
    """

    name = "ctc"

    def __init__(self, decoder: Any, vocabulary: Vocabulary) -> None:
        self._decoder = decoder
        self.vocabulary = vocabulary

    def _log_probs(self, encoded: Tensor) -> Tensor:
        """[B, T, V+1] log-probabilities in float32 whatever the autocast, or in float64 for a model in float64."""
        log_probs = self._decoder(encoder_output=encoded)
        return log_probs if log_probs.dtype == torch.float64 else log_probs.float()

    def log_prob(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> Tensor:
        """See :class:`Head`; without a joint the lattice is small and needs no budget."""
        return ctc_log_prob(self._log_probs(encoded), lengths, trie)

    def divergence(
        self, encoded: Tensor, reference: Head, ref_encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """See :class:`Head`."""
        assert isinstance(reference, CTCHead)
        with torch.no_grad():
            frozen = reference._log_probs(ref_encoded)
        return ctc_divergence(self._log_probs(encoded), frozen, lengths)

    def beam(
        self, encoded: Tensor, lengths: Tensor, *, size: int, max_symbols: int, boosting: Boosting | None = None
    ) -> list[list[Labels]]:
        """See :class:`Head`; NeMo's ``beam_batch`` without word insertion bonus and with padding made neutral."""
        from nemo.collections.asr.parts.submodules.ctc_batched_beam_decoding import BatchedBeamCTCComputer

        with torch.no_grad():
            log_probs = without_padding(self._log_probs(encoded), lengths)
            search = BatchedBeamCTCComputer(
                blank_index=self.vocabulary.vocab_size,
                beam_size=size,
                return_best_hypothesis=False,
                beam_beta=0.0,
                allow_cuda_graphs=False,
                **_fusion(boosting),
            )
            found = search(log_probs, lengths).to_nbest_hyps_list(score_norm=False)
        return nbest_labels(found[: len(lengths)])

    def greedy(self, encoded: Tensor, lengths: Tensor, *, max_symbols: int) -> list[Labels]:
        """See :class:`Head`: the best label of every frame, repeats merged, blanks removed."""
        with torch.no_grad():
            best = self._log_probs(encoded).argmax(-1)
        blank = self.vocabulary.vocab_size
        return [collapse(row[:n], blank) for row, n in zip(best.cpu(), lengths.tolist(), strict=True)]

    def sample(self, encoded: Tensor, lengths: Tensor, *, size: int, generator: torch.Generator) -> list[list[Labels]]:
        """See :class:`Head`."""
        with torch.no_grad():
            return sample_ctc(self._log_probs(encoded), lengths, size=size, generator=generator)


class TransducerHead(Head):
    """The RNN-T or TDT head of a transducer or hybrid model.

    Args:
        decoder: NeMo's prediction network.
        joint: NeMo's joint network.
        vocabulary: its labels; blank is the id after the last one.
        durations: TDT's durations in frames; empty for RNN-T.
        memory_budget_mb: bound of the joint's working memory.
        band: leaves out lattice cells that hold next to no probability (eval mode only); None = exact.
    """

    name = "transducer"

    def __init__(
        self,
        decoder: Any,
        joint: Any,
        vocabulary: Vocabulary,
        *,
        durations: Sequence[int] = (),
        memory_budget_mb: int = MEMORY_BUDGET_MB,
        band: Band | None = None,
    ) -> None:
        self._decoder, self._joint = decoder, joint
        self.vocabulary = vocabulary
        self.durations = tuple(int(d) for d in durations)
        self._budget, self._band = memory_budget_mb, band

    def log_prob(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> Tensor:
        """See :class:`Head`."""
        frames = encoded.transpose(1, 2)
        limits: dict[str, Any] = {"memory_budget_mb": self._budget, "band": self._band}
        return transducer_log_prob(
            frames, lengths, trie, self._decoder, self._joint, durations=self.durations, **limits
        )

    def cells(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> JointCells:
        """What the joint is evaluated in, within the memory budget; arguments as in :meth:`log_prob`."""
        frames, budget = encoded.transpose(1, 2), self._budget
        return JointCells.of(frames, lengths, trie, self._decoder, self._joint, memory_budget_mb=budget)

    def divergence(
        self, encoded: Tensor, reference: Head, ref_encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """See :class:`Head`; within the memory budget, as the likelihood."""
        assert isinstance(reference, TransducerHead)
        trie = PrefixTrie.build(labels, range(len(labels))).to(encoded.device)
        with torch.no_grad():
            frozen = reference.cells(ref_encoded, lengths, trie)
        return transducer_divergence(self.cells(encoded, lengths, trie), frozen, durations=self.durations)

    def beam(
        self, encoded: Tensor, lengths: Tensor, *, size: int, max_symbols: int, boosting: Boosting | None = None
    ) -> list[list[Labels]]:
        """See :class:`Head`; NeMo's ``malsd_batch`` with the defaults of its decoding configuration."""
        from nemo.collections.asr.parts.submodules.rnnt_beam_decoding import BeamBatchedRNNTInfer
        from nemo.collections.asr.parts.submodules.tdt_beam_decoding import BeamBatchedTDTInfer
        from nemo.collections.asr.parts.utils.batched_beam_decoding_utils import BlankLMScoreMode, PruningMode

        search = self._search(
            BeamBatchedRNNTInfer,
            BeamBatchedTDTInfer,
            beam_size=size,
            search_type="malsd_batch",
            max_symbols_per_step=max_symbols,
            blank_lm_score_mode=BlankLMScoreMode.LM_WEIGHTED_FULL,
            pruning_mode=PruningMode.LATE,
            allow_cuda_graphs=False,
            return_best_hypothesis=False,
            **_fusion(boosting),
        )
        (found,) = search(encoder_output=encoded.detach(), encoded_lengths=lengths)
        return nbest_labels(found)

    def _search(self, rnnt: Any, tdt: Any, **settings: Any) -> Any:
        """One of NeMo's searches, of the two classes that it has for each."""
        modules = {"decoder_model": self._decoder, "joint_model": self._joint}
        if self.durations:
            return tdt(durations=list(self.durations), blank_index=self.vocabulary.vocab_size, **modules, **settings)
        return rnnt(blank_index=self.vocabulary.vocab_size, **modules, **settings)

    def greedy(self, encoded: Tensor, lengths: Tensor, *, max_symbols: int) -> list[Labels]:
        """See :class:`Head`; NeMo's batched greedy search."""
        from nemo.collections.asr.parts.submodules.rnnt_greedy_decoding import (
            GreedyBatchedRNNTInfer,
            GreedyBatchedTDTInfer,
        )

        search = self._search(
            GreedyBatchedRNNTInfer,
            GreedyBatchedTDTInfer,
            max_symbols_per_step=max_symbols,
            use_cuda_graph_decoder=False,
        )
        (found,) = search(encoder_output=encoded.detach(), encoded_lengths=lengths)
        return [plain_labels(hyp.y_sequence) for hyp in found]

    def sample(self, encoded: Tensor, lengths: Tensor, *, size: int, generator: torch.Generator) -> list[list[Labels]]:
        """See :class:`Head`."""
        parts = encoded.transpose(1, 2), lengths, self._decoder, self._joint
        with torch.no_grad():
            return sample_transducer(*parts, size=size, durations=self.durations, generator=generator)


def _fusion(boosting: Boosting | None) -> dict[str, Any]:
    """Arguments of NeMo's searches."""
    return {} if boosting is None else {"fusion_models": [boosting[0]], "fusion_models_alpha": [boosting[1]]}


def plain_labels(sequence: Any) -> Labels:
    """Plain integers from a list, a numpy array or an inference tensor."""
    return tuple(int(i) for i in (sequence.tolist() if hasattr(sequence, "tolist") else sequence))


def nbest_labels(found: Sequence[Any]) -> list[list[Labels]]:
    """The label sequences in NeMo's N-best containers, per row."""
    return [[plain_labels(hyp.y_sequence) for hyp in row.n_best_hypotheses] for row in found]


def without_padding(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """CTC's [B, T, V+1] log-probabilities with a certain blank on the frames behind each row's length, [B].

    NeMo's beam_batch scores padded frames as audio; a certain blank there leaves every score as it is.
    """
    padded = torch.arange(log_probs.shape[1], device=log_probs.device)[None, :] >= lengths[:, None]
    certain = log_probs.new_full((log_probs.shape[2],), _IMPOSSIBLE)
    certain[-1] = 0.0
    return torch.where(padded[..., None], certain, log_probs)


def heads_of(
    model: Any, *, which: str = "auto", memory_budget_mb: int = MEMORY_BUDGET_MB, band: Band | None = None
) -> list[Head]:
    """The heads of a NeMo CTC, transducer or hybrid model, the one that ``transcribe`` uses first.

    Args:
        model: a model of one of the supported classes.
        which: ``auto`` or ``both`` = all it has; ``ctc`` or ``transducer`` = that one.
        memory_budget_mb, band: see :class:`TransducerHead`.

    Raises:
        ConfigError: the model lacks the head asked for.
    """
    heads: list[Head] = []
    ctc_decoder = model.decoder
    if hasattr(model, "joint"):
        ctc_decoder = getattr(model, "ctc_decoder", None)
        durations = model.cfg.loss.tdt_kwargs.durations if model.joint.num_extra_outputs > 0 else ()
        limits: dict[str, Any] = {"memory_budget_mb": memory_budget_mb, "band": band}
        vocabulary = _vocabulary(model, model.joint.vocabulary)
        heads.append(TransducerHead(model.decoder, model.joint, vocabulary, durations=durations, **limits))
    if ctc_decoder is not None:
        heads.append(CTCHead(ctc_decoder, _vocabulary(model, ctc_decoder.vocabulary)))
    chosen = [head for head in heads if which in ("auto", "both", head.name)]
    if not chosen or (which == "both" and len(heads) < 2):
        has = " and ".join(head.name for head in heads)
        raise ConfigError(f"feedback.heads={which}: {type(model).__name__} has only {has}; use feedback.heads=auto.")
    return chosen


def _vocabulary(model: Any, labels: Sequence[str]) -> Vocabulary:
    return Vocabulary(tokenizer=getattr(model, "tokenizer", None), labels=tuple(labels))
