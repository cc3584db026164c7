"""Lightning callbacks of a run: logs, held-out metrics, guards, early stopping, and the search for a learning rate."""

from __future__ import annotations

import lightning.pytorch as pl

from nemo_llm_feedback.training.callbacks.early_stopping import HeldOutEarlyStopping
from nemo_llm_feedback.training.callbacks.entity_validation import EntityValidation
from nemo_llm_feedback.training.callbacks.loggers import HypothesisLog, ScalarNames
from nemo_llm_feedback.training.callbacks.lr_search import try_rates
from nemo_llm_feedback.training.callbacks.run_bar import RunBar
from nemo_llm_feedback.training.callbacks.score_ahead import ScoreAhead
from nemo_llm_feedback.training.callbacks.step_log import StepLog
from nemo_llm_feedback.training.state import FeedbackSetup

__all__ = ["HeldOutEarlyStopping", "callbacks_of", "try_rates"]


def callbacks_of(setup: FeedbackSetup) -> list[pl.Callback]:
    """The callbacks of a run; the step log first, since others write into its lines; the bar last."""
    every, stopping = setup.config.feedback.log_hypotheses_every, HeldOutEarlyStopping(setup)
    found: list[pl.Callback] = [StepLog(setup.work_dir), ScalarNames(), HypothesisLog(every, setup.work_dir)]
    if setup.config.feedback.score_ahead:
        found.append(ScoreAhead())  # behind the log of this step's hypotheses, before whatever asks the reward
    found.append(stopping)
    if setup.validation:
        found.append(EntityValidation(setup.validation))
    return [*found, RunBar(stopping)]
