"""Exact log p(y|x) of RNN-T and TDT models for all hypotheses of a trie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nemo_llm_feedback.asr.likelihood.band import Band, banded_scores
from nemo_llm_feedback.asr.likelihood.inputs import check_labels, empty_result
from nemo_llm_feedback.asr.likelihood.joint import MEMORY_BUDGET_MB, JointCells, arc_scores
from nemo_llm_feedback.asr.likelihood.lattice import lattice_log_prob
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.trie import PrefixTrie


def transducer_log_prob(
    encoded: Tensor,
    lengths: Tensor,
    trie: PrefixTrie,
    decoder: Any,
    joint: Any,
    *,
    durations: Sequence[int] = (),
    memory_budget_mb: float = MEMORY_BUDGET_MB,
    band: Band | None = None,
) -> Tensor:
    """log p(h | x) of a transducer: the sum over all paths with the labels of h that end in a blank.

    RNN-T (Graves 2012, arXiv:1211.3711): with α(t, k) the log-probability of having emitted prefix k and consumed t
    frames,

        α(0, root) = 0,   α(t, k) = logsumexp( α(t−1, k) + log p(blank | t−1, k),
                                               α(t, parent(k)) + log p(token(k) | t, parent(k)) )
        log p(h)   = α(T−1, leaf(h)) + log p(blank | T−1, leaf(h))

    TDT (token-and-duration transducer, Xu et al. 2023, arXiv:2304.06795, eq. 7): the output of a cell is two
    independent softmaxes, over labels and blank and over durations, p(v, l | t, k) = p(v | t, k) · p(l | t, k), and

        α(t, k)  = logsumexp over  α(t−l, k) + log p(blank, l | t−l, k)                  for durations l > 0
                                   α(t−l, parent(k)) + log p(token(k), l | t−l, parent(k))  for all durations l
        log p(h) = logsumexp over  α(T−l, leaf(h)) + log p(blank, l | T−l, leaf(h))      for durations l > 0

    The last move is a blank that reaches T exactly. (blank, 0), jumps beyond T and a label that lands on T belong to
    no complete path, so the probabilities of all of TDT's label sequences sum to less than 1.

    Args:
        encoded: [B, T, D] encoder output, i.e. NeMo's [B, D, T] transposed.
        lengths: [B] valid frames of each row, ≤ T. What stands behind them is never read.
        trie: the prefix trie of the H hypotheses.
        decoder: NeMo's prediction network (``RNNTDecoder`` or ``StatelessTransducerDecoder``).
        joint: NeMo's ``RNNTJoint``; its outputs are labels, blank, and one per duration. ``fuse_loss_wer`` and
            ``log_softmax`` do not matter.
        durations: frames that each duration output stands for, ≥ 0, distinct, at least one > 0; NeMo's
            ``loss.tdt_kwargs.durations``. Empty for RNN-T.
        memory_budget_mb: the most MiB that the joint's activations and their gradients may take.
        band: leaves cells out of the lattice that hold next to no probability; log p is then too low by no more than
            ``band.tolerance`` nats, and ``band.report`` is given a bound of the loss. None = exact. Needs the joint in
            eval mode.

    Returns:
        [H] natural-log probability in the trie's order, float32 (float64 for float64 input); NaN, with zero gradient,
        where the row's valid frames are not finite; −inf, with zero gradient, where no path exists.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
        ConfigError: the durations are not valid or do not match the joint's outputs, or the joint cannot be banded.
    """
    durations = tuple(durations)
    if joint.num_extra_outputs != len(durations):
        raise ConfigError(
            f"{len(durations)} durations but the joint has {joint.num_extra_outputs} duration outputs: pass the "
            "durations of the checkpoint (none for RNN-T)."
        )
    if durations and (len(set(durations)) != len(durations) or min(durations) < 0 or max(durations) < 1):
        raise ConfigError(f"durations {list(durations)} must be distinct, ≥ 0 and hold at least one > 0.")
    if trie.num_hyps == 0:
        return empty_result(encoded)
    check_labels(trie, num_classes=joint.num_classes_with_blank - joint.num_extra_outputs)
    cells = JointCells(encoded, lengths, trie, decoder, joint, memory_budget_mb=memory_budget_mb)
    evaluated = None if band is None else banded_scores(cells, durations=durations, band=band)
    scores = arc_scores(cells, evaluated=evaluated)
    log_prob = lattice_log_prob(scores, trie=cells.trie, lengths=cells.lengths, durations=durations)
    return log_prob.masked_fill(~cells.row_ok[cells.trie.utterance[cells.trie.leaf]], float("nan"))
