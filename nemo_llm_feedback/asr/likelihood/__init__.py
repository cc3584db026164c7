"""Exact log p(y|x) of CTC, RNN-T and TDT models for N-best groups, at the cost of their distinct prefixes."""

# ruff: noqa: F401  (what other modules import from here)

from nemo_llm_feedback.asr.likelihood.band import Band, BandReport
from nemo_llm_feedback.asr.likelihood.ctc import ctc_log_prob
from nemo_llm_feedback.asr.likelihood.divergence import ctc_divergence, transducer_divergence
from nemo_llm_feedback.asr.likelihood.joint import MEMORY_BUDGET_MB, JointCells
from nemo_llm_feedback.asr.likelihood.transducer import transducer_log_prob
