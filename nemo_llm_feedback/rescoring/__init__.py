"""LLM rescoring of the N-best lists of NeMo's beam decoders, at inference and without training.

enable_rescoring(model, LLMReward(scorer, alpha=1.0, beta=2.0), context=Context("an order at a coffee shop"))
model.transcribe(["a.wav"])            # and validation, WER, predict_step, after any change_decoding_strategy
"""

# ruff: noqa: F401  (what other modules import from here)

from nemo_llm_feedback.rescoring.decoding import NBest
from nemo_llm_feedback.rescoring.model import (
    RescoringMixin,
    attach,
    disable_rescoring,
    enable_rescoring,
    utterance_contexts,
)
from nemo_llm_feedback.rescoring.scoring import Rescorer, ScoredHypothesis
