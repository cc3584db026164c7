"""One interface to the CTC and the transducer head of a NeMo model: log p(y | x), beam and greedy search, samples.

A :class:`Head` borrows the model's modules and is not a module itself, so it can be kept outside the module tree. The
policy that learns and the frozen reference both have heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr import likelihood
from nemo_llm_feedback.asr.likelihood import MEMORY_BUDGET_MB, Band, JointCells
from nemo_llm_feedback.asr.likelihood.autograd import in_modes
from nemo_llm_feedback.asr.sampling import collapse, sample_ctc, sample_transducer
from nemo_llm_feedback.asr.searches import (
    Boosting,
    Labels,
    Searches,
    beam_labels,
    fusion,
    plain_labels,
    states_of_beams,
    without_padding,
)
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.trie import PrefixTrie

UNKNOWN = ("<unk>", "[UNK]")
"""Labels that stand for whatever the checkpoint lacks."""

# The band's bounds cost as much as they save on a narrow joint (docs/performance.md): from this size of the joint's
# last layer on (labels × width) it is on by default, with this tolerance in nats.
BAND_SIZE, BAND_TOLERANCE = 160_000, 1e-3


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

    @cached_property
    def cased(self) -> bool:
        """Whether any label has an upper-case letter."""
        return any(label != label.lower() for label in self.labels)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Label → id."""
        return {label: i for i, label in enumerate(self.labels)}

    @cached_property
    def by_word(self) -> bool:
        """Whether the labels of a text are those of its words in turn, as no label spans a space (SentencePiece)."""
        if self.tokenizer is None or "▁" not in self.labels or any("▁" in label[1:] for label in self.labels):
            return False
        letter = next((label[-1] for label in self.labels if label[-1:].isalpha()), "")
        return bool(letter) and self.text_to_ids(f"{letter} {letter}") == 2 * self.text_to_ids(letter)

    @cached_property
    def _hash(self) -> int:
        return hash(self.labels)

    def __hash__(self) -> int:  # as a key of caches it is hashed per text
        return self._hash

    @cached_property
    def unknown(self) -> frozenset[int]:
        """Ids of the labels that stand for whatever the checkpoint lacks."""
        return frozenset(i for i, label in enumerate(self.labels) if label in UNKNOWN)

    def text_to_ids(self, text: str) -> list[int]:
        """Label ids of a text; characters the model lacks are left out (character models) or unknown (BPE)."""
        text = text if self.cased else text.lower()
        if self.tokenizer is not None:
            return list(self.tokenizer.text_to_ids(text))
        return [self.ids[c] for c in text if c in self.ids]

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
    _searches: Searches

    def cuda_graphs(self) -> AbstractContextManager[None]:
        """Inside, where no weight may change, :meth:`beam` and :meth:`greedy` run as NeMo's CUDA graphs on a GPU."""
        return self._searches.cuda_graphs()

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
        places = torch.tensor([(b, n) for b, row in enumerate(labels) for n in range(len(row))], dtype=torch.long)
        rows, columns = places.reshape(-1, 2).unbind(1)
        trie = PrefixTrie.build([list(y) for row in labels for y in row], rows).to(encoded.device)
        flat = self.log_prob(encoded, lengths, trie)
        shape = len(labels), max((len(row) for row in labels), default=0)
        where = rows.to(flat.device), columns.to(flat.device)
        return flat.new_full(shape, float("-inf")).index_put(where, flat)

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
        self._searches = Searches()

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

        def _make(graphs: bool) -> Any:
            options = {"return_best_hypothesis": False, "beam_beta": 0.0, "allow_cuda_graphs": graphs}
            return BatchedBeamCTCComputer(self.vocabulary.vocab_size, size, **options, **fusion(boosting))

        with torch.no_grad():
            log_probs = without_padding(self._log_probs(encoded), lengths)
            settings: dict[str, Any] = {"settings": (size,), "boosting": boosting, "dtype": log_probs.dtype}
            found = self._searches.run(_make, log_probs, lengths, kind="beam", **settings)
        return beam_labels(found, rows=len(lengths), by_length=False, collapse=True)

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
            decoder.batch_aggregate_states_beam = states_of_beams
        self.vocabulary = vocabulary
        self._searches = Searches()
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
        kind = BeamBatchedTDTInfer if self.durations else BeamBatchedRNNTInfer

        def _make(graphs: bool) -> Any:
            options = {"beam_size": size, "max_symbols_per_step": max_symbols, "allow_cuda_graphs": graphs}
            search = kind(search_type="malsd_batch", **modes, **options, **fusion(boosting), **self._modules())
            return lambda x, frames: search.decoding_computer(x=x.transpose(1, 2), out_len=frames)[0]

        parts = (*self._decoder.modules(), *self._joint.modules())
        with torch.inference_mode(), in_modes([(part, False) for part in parts]):
            found = self._run(_make, encoded, lengths, kind="beam", settings=(size, max_symbols), boosting=boosting)
            return beam_labels(found, rows=len(lengths), by_length=True, collapse=False)

    def _run(self, make: Any, encoded: Tensor, lengths: Tensor, **what: Any) -> Any:
        """See :meth:`Searches.run`."""
        # NeMo's graphs know the LSTM's state only.
        searches = Searches() if hasattr(self._decoder, "context_size") else self._searches
        dtype = next(self._joint.parameters()).dtype
        return searches.run(make, encoded.detach(), lengths, dtype=dtype, **what)

    def _modules(self) -> dict[str, Any]:
        """What NeMo's searches need of the model."""
        durations = {"durations": list(self.durations)} if self.durations else {}
        blank = self.vocabulary.vocab_size
        return {"decoder_model": self._decoder, "joint_model": self._joint, "blank_index": blank, **durations}

    def greedy(self, encoded: Tensor, lengths: Tensor, *, max_symbols: int) -> list[Labels]:
        """See :class:`Head`; NeMo's batched greedy search."""
        from nemo.collections.asr.parts.submodules import rnnt_greedy_decoding as nemo

        kind = nemo.GreedyBatchedTDTInfer if self.durations else nemo.GreedyBatchedRNNTInfer

        def _make(graphs: bool) -> Any:
            search = kind(max_symbols_per_step=max_symbols, use_cuda_graph_decoder=graphs, **self._modules())
            return lambda x, frames: search(encoder_output=x, encoded_lengths=frames)[0]

        found = self._run(_make, encoded, lengths, kind="greedy", settings=(max_symbols,))
        return [plain_labels(hyp.y_sequence) for hyp in found]

    def sample(self, encoded: Tensor, lengths: Tensor, *, size: int, generator: torch.Generator) -> list[list[Labels]]:
        """See :class:`Head`."""
        parts = encoded.transpose(1, 2), lengths, self._decoder, self._joint
        with torch.no_grad():
            return sample_transducer(*parts, size=size, durations=self.durations, generator=generator)


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
