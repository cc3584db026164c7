"""One interface to the CTC and the transducer head of a NeMo model: log p(y | x), beam and greedy search, samples.

A :class:`Head` borrows the model's modules and is not a module itself, so it can be kept outside the module tree. The
policy that learns and the frozen reference both have heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr import likelihood
from nemo_llm_feedback.asr.likelihood import MEMORY_BUDGET_MB, Band, JointCells
from nemo_llm_feedback.asr.sampling import collapse, sample_ctc, sample_transducer
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.trie import PrefixTrie

Labels = tuple[int, ...]

# NeMo's boosting tree, or what stands for one per utterance, and its weight in the beam search.
Boosting = tuple[Any, float]

# The band's bounds cost as much as they save on a narrow joint (docs/performance.md): from this size of the joint's
# last layer on (labels × width) it is on by default, with this tolerance in nats.
BAND_SIZE, BAND_TOLERANCE = 160_000, 1e-3

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
        vocabulary: the head's labels; blank is the id after the last one.
    """

    name: str
    vocabulary: Vocabulary

    def score(self, encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """log p(y | x) of all hypotheses, i.e. the sum over all alignments.

        Hypotheses of a row share the computation of their common prefixes (see ``core.trie``). A value does not depend
        on the other rows and hypotheses, on padding or on the memory budget.

        Args:
            encoded: [B, D, T] encoder output.
            lengths: [B] frames.
            labels: per batch row a list of label sequences without blank, of any number and length.

        Returns:
            [B, N] natural log, N the most hypotheses of a row, float32 (float64 for a model in float64), with
            gradient; −inf where the audio is too short for the text, and on the padding of rows with fewer hypotheses.
        """
        places = [(b, n) for b, row in enumerate(labels) for n in range(len(row))]
        rows, columns = torch.tensor(places, dtype=torch.long, device=encoded.device).reshape(-1, 2).unbind(1)
        trie = PrefixTrie.build([list(y) for row in labels for y in row], rows).to(encoded.device)
        flat = self.log_prob(encoded, lengths, trie)
        width = max((len(row) for row in labels), default=0)
        return flat.new_full((len(labels), width), float("-inf")).index_put((rows, columns), flat)

    @abstractmethod
    def log_prob(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> Tensor:
        """What :meth:`score` computes, for the hypotheses of a trie.

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
            labels: one label sequence per row, along whose alignments a transducer is compared; CTC ignores it.

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
            size: beam size, which is also the largest number of sequences per row.
            max_symbols: largest number of labels in one frame (transducers).
            boosting: NeMo's boosting tree and its weight, or None.
        """

    @abstractmethod
    def greedy(self, encoded: Tensor, lengths: Tensor, *, max_symbols: int) -> list[Labels]:
        """The greedy label sequence of each row; arguments as in :meth:`beam`."""

    @abstractmethod
    def sample(self, encoded: Tensor, lengths: Tensor, *, size: int, generator: torch.Generator) -> list[list[Labels]]:
        """Exact samples from p(y | x).

        Args:
            encoded: [B, D, T] encoder output, no gradient needed.
            lengths: [B] frames.
            size: samples per row; a TDT row may get fewer, since incomplete paths are rejected.
            generator: random numbers, on the CPU.
        """


class CTCHead(Head):
    """The CTC head of a CTC or hybrid model.

    Args:
        decoder: NeMo's ``ConvASRDecoder``.
        vocabulary: the head's labels; blank is the id after the last one.
    """

    name = "ctc"

    def __init__(self, decoder: Any, vocabulary: Vocabulary) -> None:
        self._decoder = decoder
        self.vocabulary = vocabulary

    def _log_probs(self, encoded: Tensor) -> Tensor:
        """[B, T, V+1] log-probabilities in float32 whatever the autocast, or in float64 for a model in float64."""
        log_probs = self._decoder(encoder_output=encoded)
        return log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))

    def log_prob(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> Tensor:
        """See :class:`Head`; without a joint the lattice is small and needs no budget."""
        return likelihood.ctc_log_prob(self._log_probs(encoded), lengths, trie)

    def divergence(
        self, encoded: Tensor, reference: Head, ref_encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """See :class:`Head`."""
        assert isinstance(reference, CTCHead)
        with torch.no_grad():
            frozen = reference._log_probs(ref_encoded)
        return likelihood.ctc_divergence(self._log_probs(encoded), frozen, lengths)

    def beam(
        self, encoded: Tensor, lengths: Tensor, *, size: int, max_symbols: int, boosting: Boosting | None = None
    ) -> list[list[Labels]]:
        """See :class:`Head`; NeMo's ``beam_batch`` without word insertion bonus and with padding made neutral."""
        from nemo.collections.asr.parts.submodules.ctc_batched_beam_decoding import BatchedBeamCTCComputer

        with torch.no_grad():
            log_probs = without_padding(self._log_probs(encoded), lengths)
            options = {
                "return_best_hypothesis": False,
                "beam_beta": 0.0,
                "allow_cuda_graphs": False,
                **_fusion(boosting),
            }
            search = BatchedBeamCTCComputer(blank_index=self.vocabulary.vocab_size, beam_size=size, **options)
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
        vocabulary: the head's labels; blank is the id after the last one.
        durations: TDT's durations in frames; empty for RNN-T.
        memory_budget_mb: the most MiB that the joint's activations and their gradients may take.
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
        if hasattr(decoder, "context_size"):  # NeMo's batched beam asks a stateless network for a method it lacks
            decoder.batch_aggregate_states_beam = _states_of_beams
        self.vocabulary = vocabulary
        self.durations = tuple(int(d) for d in durations)
        self._budget, self._band = memory_budget_mb, band

    def log_prob(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> Tensor:
        """See :class:`Head`."""
        options: dict[str, Any] = {"memory_budget_mb": self._budget, "band": self._band, "durations": self.durations}
        parts = encoded.transpose(1, 2), lengths, trie, self._decoder, self._joint
        return likelihood.transducer_log_prob(*parts, **options)

    def cells(self, encoded: Tensor, lengths: Tensor, trie: PrefixTrie) -> JointCells:
        """The cells of the lattice, which the joint is evaluated in; arguments as in :meth:`log_prob`."""
        parts = encoded.transpose(1, 2), lengths, trie, self._decoder, self._joint
        return JointCells(*parts, memory_budget_mb=self._budget)

    def divergence(
        self, encoded: Tensor, reference: Head, ref_encoded: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """See :class:`Head`; within the memory budget, as the likelihood."""
        assert isinstance(reference, TransducerHead)
        trie = PrefixTrie.build(labels, range(len(labels))).to(encoded.device)
        with torch.no_grad():
            frozen = reference.cells(ref_encoded, lengths, trie)
        return likelihood.transducer_divergence(self.cells(encoded, lengths, trie), frozen, durations=self.durations)

    def beam(
        self, encoded: Tensor, lengths: Tensor, *, size: int, max_symbols: int, boosting: Boosting | None = None
    ) -> list[list[Labels]]:
        """See :class:`Head`; NeMo's ``malsd_batch`` with the defaults of its decoding configuration."""
        from nemo.collections.asr.parts.submodules.rnnt_beam_decoding import BeamBatchedRNNTInfer
        from nemo.collections.asr.parts.submodules.tdt_beam_decoding import BeamBatchedTDTInfer
        from nemo.collections.asr.parts.utils.batched_beam_decoding_utils import BlankLMScoreMode, PruningMode

        modes = {"blank_lm_score_mode": BlankLMScoreMode.LM_WEIGHTED_FULL, "pruning_mode": PruningMode.LATE}
        options = {"allow_cuda_graphs": False, "return_best_hypothesis": False, "max_symbols_per_step": max_symbols}
        search = (BeamBatchedTDTInfer if self.durations else BeamBatchedRNNTInfer)(
            beam_size=size, search_type="malsd_batch", **modes, **options, **_fusion(boosting), **self._modules()
        )
        (found,) = search(encoder_output=encoded.detach(), encoded_lengths=lengths)
        return nbest_labels(found)

    def _modules(self) -> dict[str, Any]:
        """What NeMo's searches need of the model."""
        durations = {"durations": list(self.durations)} if self.durations else {}
        blank = self.vocabulary.vocab_size
        return {"decoder_model": self._decoder, "joint_model": self._joint, "blank_index": blank, **durations}

    def greedy(self, encoded: Tensor, lengths: Tensor, *, max_symbols: int) -> list[Labels]:
        """See :class:`Head`; NeMo's batched greedy search."""
        from nemo.collections.asr.parts.submodules import rnnt_greedy_decoding as nemo

        search = (nemo.GreedyBatchedTDTInfer if self.durations else nemo.GreedyBatchedRNNTInfer)(
            max_symbols_per_step=max_symbols, use_cuda_graph_decoder=False, **self._modules()
        )
        (found,) = search(encoder_output=encoded.detach(), encoded_lengths=lengths)
        return [plain_labels(hyp.y_sequence) for hyp in found]

    def sample(self, encoded: Tensor, lengths: Tensor, *, size: int, generator: torch.Generator) -> list[list[Labels]]:
        """See :class:`Head`."""
        parts = encoded.transpose(1, 2), lengths, self._decoder, self._joint
        with torch.no_grad():
            return sample_transducer(*parts, size=size, durations=self.durations, generator=generator)


def _states_of_beams(
    src_states: Sequence[Tensor], batch_size: int, beam_size: int, indices: Tensor, dst_states: Any = None
) -> list[Tensor]:
    """NeMo's ``batch_aggregate_states_beam``: each beam takes over the state of the one that it continues.

    Args:
        src_states: the decoder's state, [batch_size · beam_size, C - 1] labels.
        batch_size, beam_size: how its rows are ordered.
        indices: [batch_size, beam_size] the beam of the same utterance that each one continues.
        dst_states: written to, if given.
    """
    first = torch.arange(0, batch_size * beam_size, beam_size, device=indices.device)[:, None]
    taken = [part[(first + indices).flatten()] for part in src_states]
    for target, part in zip(dst_states or (), taken, strict=False):
        target.copy_(part)
    return taken


def _fusion(boosting: Boosting | None) -> dict[str, Any]:
    """The arguments by which NeMo's beam searches boost phrases."""
    return {} if boosting is None else {"fusion_models": [boosting[0]], "fusion_models_alpha": [boosting[1]]}


def plain_labels(sequence: Any) -> Labels:
    """Plain integers from a list, a numpy array or an inference tensor."""
    return tuple(int(i) for i in (sequence.tolist() if hasattr(sequence, "tolist") else sequence))


def nbest_labels(found: Sequence[Any]) -> list[list[Labels]]:
    """The label sequences in NeMo's N-best containers, per row."""
    return [[plain_labels(hyp.y_sequence) for hyp in row.n_best_hypotheses] for row in found]


def without_padding(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """CTC's [B, T, V+1] log-probabilities, with blank certain in the frames behind each row's length, [B].

    NeMo's beam_batch scores padded frames as audio; a certain blank there leaves every score as it is.
    """
    padded = torch.arange(log_probs.shape[1], device=log_probs.device)[None, :] >= lengths[:, None]
    certain = log_probs.new_full((log_probs.shape[2],), _IMPOSSIBLE)
    certain[-1] = 0.0
    return torch.where(padded[..., None], certain, log_probs)


def band_of(model: Any, tolerance: float | None) -> Band | None:
    """How a model's transducer lattice is banded; None = exact.

    Args:
        model: a model of one of the supported classes.
        tolerance: the most that log p of a hypothesis may lose, in nats, 0 = exact; None: 0.001 where the joint's last
            layer is large enough for the band to pay, else exact.
    """
    if tolerance is None:
        last = list(model.joint.joint_net)[-1] if hasattr(model, "joint") else None
        large = isinstance(last, torch.nn.Linear) and last.in_features * last.out_features >= BAND_SIZE
        tolerance = BAND_TOLERANCE if large else 0.0
    return Band(tolerance) if tolerance else None


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
    ctc_decoder, tokenizer = model.decoder, getattr(model, "tokenizer", None)
    if hasattr(model, "joint"):
        ctc_decoder = getattr(model, "ctc_decoder", None)
        durations = model.cfg.loss.tdt_kwargs.durations if model.joint.num_extra_outputs > 0 else ()
        limits: dict[str, Any] = {"memory_budget_mb": memory_budget_mb, "band": band}
        vocabulary = Vocabulary(tokenizer, tuple(model.joint.vocabulary))
        heads.append(TransducerHead(model.decoder, model.joint, vocabulary, durations=durations, **limits))
    if ctc_decoder is not None:
        heads.append(CTCHead(ctc_decoder, Vocabulary(tokenizer, tuple(ctc_decoder.vocabulary))))
    chosen = [head for head in heads if which in ("auto", "both", head.name)]
    if not chosen or (which == "both" and len(heads) < 2):
        has = " and ".join(head.name for head in heads)
        raise ConfigError(f"feedback.heads={which}: {type(model).__name__} has only {has}; use feedback.heads=auto.")
    return chosen
