"""Exact log p(y|x) of RNN-T and TDT models for all hypotheses of a trie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_llm_feedback.asr.likelihood.band import Band, banded_scores
from nemo_llm_feedback.asr.likelihood.inputs import check_labels, clean_rows, empty_result
from nemo_llm_feedback.asr.likelihood.joint import JointSetting, TransducerJoint, arc_scores
from nemo_llm_feedback.asr.likelihood.lattice import lattice_log_prob
from nemo_llm_feedback.asr.likelihood.prediction import PredictionNetwork, prefix_outputs
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.trie import PrefixTrie


def rnnt_log_prob(
    encoded: Tensor,
    lengths: Tensor,
    trie: PrefixTrie,
    decoder: PredictionNetwork,
    joint: TransducerJoint,
    *,
    memory_budget_mb: float = 256,
    band: Band | None = None,
) -> Tensor:
    """log p(h | x) of an RNN-T model: the sum over all paths of T blanks and the labels of h, ending in a blank.

    With α(t, k) the log-probability of having emitted prefix k and consumed t frames (Graves 2012, arXiv:1211.3711),

        α(0, root) = 0,   α(t, k) = logsumexp( α(t−1, k) + log p(blank | t−1, k),
                                               α(t, parent(k)) + log p(token(k) | t, parent(k)) )
        log p(h)   = α(T−1, leaf(h)) + log p(blank | T−1, leaf(h))

    Args:
        encoded: [B, T, D] encoder output, i.e. NeMo's [B, D, T] transposed.
        lengths: [B] valid frames of each row, ≤ T. What stands behind them is never read.
        trie: the prefix trie of the H hypotheses.
        decoder: NeMo's prediction network.
        joint: NeMo's joint; blank is its last output. ``fuse_loss_wer`` and ``log_softmax`` do not matter.
        memory_budget_mb: the most MiB that the joint's activations and their gradients may take.
        band: leaves cells out of the lattice that hold next to no probability; log p is then too low by no more than
            ``band.tolerance`` nat, and ``band.report`` is told a bound of what was lost. None = exact. Needs the joint
            in eval mode.

    Returns:
        [H] natural-log probability in the trie's order, float32 (float64 for float64 input); NaN, with zero gradient,
        where the row's valid frames are not finite; −inf, with zero gradient, where no path exists.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
        ConfigError: the joint has duration outputs (use ``tdt_log_prob``), or cannot be banded.
    """
    if joint.num_extra_outputs:
        raise ConfigError(f"the joint has {joint.num_extra_outputs} duration outputs: use tdt_log_prob.")
    return _log_prob(
        encoded, lengths, trie, decoder, joint, durations=(), memory_budget_mb=memory_budget_mb, band=band
    )


def tdt_log_prob(
    encoded: Tensor,
    lengths: Tensor,
    trie: PrefixTrie,
    decoder: PredictionNetwork,
    joint: TransducerJoint,
    *,
    durations: Sequence[int],
    memory_budget_mb: float = 256,
    band: Band | None = None,
) -> Tensor:
    """log p(h | x) of a token-and-duration transducer (Xu et al. 2023, arXiv:2304.06795, eq. 7).

    The output of a cell is two independent softmaxes, over labels and blank and over durations. With
    p(v, l | t, k) = p(v | t, k) · p(l | t, k) and α as in ``rnnt_log_prob``,

        α(t, k)  = logsumexp over  α(t−l, k) + log p(blank, l | t−l, k)                  for durations l > 0
                                   α(t−l, parent(k)) + log p(token(k), l | t−l, parent(k))  for all durations l
        log p(h) = logsumexp over  α(T−l, leaf(h)) + log p(blank, l | T−l, leaf(h))      for durations l > 0

    The last move is a blank that reaches T exactly. (blank, 0), jumps beyond T and a label that lands on T belong to
    no complete path, so the probabilities of all label sequences sum to less than 1.

    Args:
        encoded, lengths, trie, decoder, memory_budget_mb, band: as in ``rnnt_log_prob``.
        joint: NeMo's joint with one extra output per duration, behind blank.
        durations: frames that each duration output stands for, ≥ 0, distinct, at least one > 0; NeMo's
            ``loss.tdt_kwargs.durations``.

    Returns:
        As ``rnnt_log_prob``.

    Raises:
        ValueError: shapes, lengths or labels do not fit together.
        ConfigError: the durations are no valid set or do not match the joint's extra outputs, or the joint cannot be
            banded.
    """
    if joint.num_extra_outputs != len(durations):
        raise ConfigError(
            f"{len(durations)} durations but the joint has {joint.num_extra_outputs} duration outputs: pass the "
            "checkpoint's own durations (rnnt_log_prob for a joint that has none)."
        )
    if len(set(durations)) != len(durations) or min(durations) < 0 or max(durations) < 1:
        raise ConfigError(f"durations {list(durations)} must be distinct, ≥ 0 and hold at least one > 0.")
    return _log_prob(
        encoded,
        lengths,
        trie,
        decoder,
        joint,
        durations=tuple(durations),
        memory_budget_mb=memory_budget_mb,
        band=band,
    )


def _log_prob(
    encoded: Tensor,
    lengths: Tensor,
    trie: PrefixTrie,
    decoder: PredictionNetwork,
    joint: TransducerJoint,
    *,
    durations: tuple[int, ...],
    memory_budget_mb: float,
    band: Band | None,
) -> Tensor:
    if trie.num_hyps == 0:
        return empty_result(encoded)
    num_labels = joint.num_classes_with_blank - joint.num_extra_outputs
    check_labels(trie, blank=num_labels - 1, num_classes=num_labels)
    trie = trie.to(encoded.device)
    encoded, host_lengths, row_ok = clean_rows(encoded, lengths, trie)
    frames, prefixes = joint.project_encoder(encoded), joint.project_prednet(prefix_outputs(decoder, trie))
    setting = JointSetting.of(frames, joint=joint, trie=trie, lengths=host_lengths, memory_budget_mb=memory_budget_mb)
    evaluated = None
    if band is not None:
        evaluated = banded_scores(frames, prediction=prefixes, setting=setting, durations=durations, band=band)
    scores = arc_scores(frames, prediction=prefixes, setting=setting, evaluated=evaluated)
    log_prob = lattice_log_prob(scores, trie=trie, lengths=lengths.to(encoded.device), durations=durations)
    return log_prob.masked_fill(~row_ok[trie.utterance[trie.leaf]], float("nan"))
