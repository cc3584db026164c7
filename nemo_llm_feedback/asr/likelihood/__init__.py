"""Exact log p(y|x) of CTC, RNN-T and TDT models for N-best groups, at the cost of their distinct prefixes."""

from nemo_llm_feedback.asr.likelihood.band import Band, BandReport
from nemo_llm_feedback.asr.likelihood.ctc import ctc_log_prob
from nemo_llm_feedback.asr.likelihood.divergence import TransducerParts, ctc_divergence, transducer_divergence
from nemo_llm_feedback.asr.likelihood.transducer import rnnt_log_prob, tdt_log_prob

__all__ = [
    "Band",
    "BandReport",
    "TransducerParts",
    "ctc_divergence",
    "ctc_log_prob",
    "rnnt_log_prob",
    "tdt_log_prob",
    "transducer_divergence",
]
