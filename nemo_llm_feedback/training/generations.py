"""The generations of a run: the best weights of one teach the next, and what the pool sets is measured anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from nemo_llm_feedback.core.config import RunConfig
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.hypotheses.nbest import NBestCache
from nemo_llm_feedback.training.pool import EncodedAudio
from nemo_llm_feedback.training.setup import measured
from nemo_llm_feedback.training.state import Feedback, FeedbackSetup, Generation
from nemo_llm_feedback.training.weights import snapshot


def check_generations(config: RunConfig, trainer: Any) -> None:
    """Raises a ConfigError unless the trainer's steps can be split over the generations; without a trainer, later."""
    number = config.feedback.generations
    if number > 1 and trainer is not None and trainer.max_steps < number:
        steps = "is not set" if trainer.max_steps < 0 else f"is {trainer.max_steps}"
        raise ConfigError(
            f"feedback.generations={number} splits trainer.max_steps, which {steps}: set it to {number} or more "
            "(an ordinary run's steps for each generation), or feedback.generations=1."
        )


def next_generation(model: Any, setup: FeedbackSetup, feedback: Feedback, pool: Iterable[EncodedAudio]) -> Feedback:
    """The state of the generation whose teacher is the model as it is now: the pool is measured and the groups are
    proposed anew. Nothing of the old state is changed; reference, guards and learning rate stay.

    Args:
        model: the model in the weights that the generation before gave.
        setup: the run's set-up, with the settings as given.
        feedback: the state of the generation before.
        pool: batches of this rank's share of the pool.

    Raises:
        TrainingError, RewardError: the new groups have no signal to learn from.
    """
    teacher, before, config = setup.reference.retaken(model), feedback.statistics, setup.config
    began = int(model.trainer.global_step)
    generation = Generation(number=feedback.generation.number + 1, began=began, weights=snapshot(model))
    cache, statistics = NBestCache(), None
    cache.start(began // config.feedback.refresh_every)
    if before is not None:
        statistics = measured(setup, pool, lambda settings: feedback.build(settings, teacher), cache)
        statistics = replace(statistics, learning_rate=before.learning_rate)
        config = statistics.applied_to(config)
    return replace(
        feedback,
        config=config,
        maker=feedback.build(config, teacher),
        teacher=teacher,
        generation=generation,
        cache=cache,
        statistics=statistics,
    )
