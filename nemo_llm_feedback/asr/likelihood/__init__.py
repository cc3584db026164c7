"""Exact log p(y|x) of CTC, RNN-T and TDT models for N-best groups, at the cost of their distinct prefixes."""

from nemo_llm_feedback.asr.likelihood.band import Band, BandReport
from nemo_llm_feedback.asr.likelihood.ctc import ctc_log_prob
from nemo_llm_feedback.asr.likelihood.divergence import ctc_divergence, transducer_divergence
from nemo_llm_feedback.asr.likelihood.joint import MEMORY_BUDGET_MB, JointCells
from nemo_llm_feedback.asr.likelihood.transducer import transducer_log_prob

__all__ = [
    "MEMORY_BUDGET_MB",
    "Band",
    "BandReport",
    "JointCells",
    "ctc_divergence",
    "ctc_log_prob",
    "transducer_divergence",
    "transducer_log_prob",
]
