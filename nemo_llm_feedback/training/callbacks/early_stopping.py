"""Early stopping without labels: measures held-out utterances, stops, goes back, and picks the weights to export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.core.errors import RewardError, TrainingError
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics, as_good, violations
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator
from nemo_llm_feedback.training.callbacks.step_log import log_values
from nemo_llm_feedback.training.distributed import gather, this_rank
from nemo_llm_feedback.training.state import Feedback, FeedbackSetup
from nemo_llm_feedback.training.weights import (
    MovingAverage,
    Weights,
    holding,
    interpolated,
    kept_name,
    load_kept,
    put_back,
    save_kept,
    snapshot,
)


class HeldOutEarlyStopping(pl.Callback):
    """Measures held-out utterances every few steps and decides, without a label, when to stop and what to keep.

    What the run gives are the latest weights whose held-out reward is the highest, or below it by less than chance
    explains (``guards.standard_errors``): the rate falls to 0, so of equals the later ones have the less noise. Where
    there is no reward (plain self-training), they are those of the last measurement that passed. At the end of a
    generation they are the next one's teacher. With ``parameters.ema_decay`` measurements, choice and export use the
    moving average. Every rank decides, by the numbers that all have.

    Args:
        setup: the run's set-up.

    Attributes:
        history: all measurements of the run, in order.
        reason: why training ended before its last step; empty if it did not.
        share: share of the update that is exported; 1 = the adapted weights.
        guard_wer: the guard set's WER in % under the starting model and under the weights that are exported; empty
            without a guard set in a language that the model knows.
        kept_step: the step whose weights are kept; 0 = the start.
        done: whether :meth:`finish` has run.
        held_out_rows: rows that are kept from training and measured; 0 = the measured rows are trained on.
    """

    def __init__(self, setup: FeedbackSetup) -> None:
        self._limits, self._parameters = setup.config.guards, setup.config.parameters
        self._rows, self._guard_rows, self._start = setup.held_out_rows(), setup.guard_rows, setup.start
        self.held_out_rows = len(setup.staged.held_out)
        self._evaluator: HeldOutEvaluator | None = None
        self._average: MovingAverage | None = None
        self._best: Weights | None = None
        self._folder: Path | None = None  # of the checkpoints
        self._saved = -1  # step of the best weights that are there
        self._restored: dict[str, Any] = {}
        self._since, self._last_step = 0, -1
        self._violated, self._every, self._generations = False, 0, setup.config.feedback.generations
        self.history: list[HeldOutMetrics] = []
        self.reason, self.share, self.kept_step, self.done = "", 1.0, 0, False
        self.guard_wer: tuple[float, ...] = ()

    @property
    def watching(self) -> bool:
        """Whether the guard set, where there is one, says anything of general speech to this model."""
        return self._evaluator is None or self._evaluator.watching

    @property
    def kept_gain(self) -> float:
        """Held-out gain of the kept weights, in the reward's unit; NaN without a reward."""
        if self._evaluator is None or not self._evaluator.rewarded:
            return math.nan
        return next((found.gain for found in self.history if found.step == self.kept_step), 0.0)

    @property
    def kept_generation(self) -> int:
        """The generation of the kept weights."""
        return next((found.generation for found in self.history if found.step == self.kept_step), 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Prepares the measurements; a resumed run takes its best weights back, and one that had stopped stays so."""
        self._last_step = trainer.global_step
        if self.reason:
            trainer.should_stop = True
        savers = trainer.checkpoint_callbacks
        # Of several folders of checkpoints none holds the weights that all of them name.
        folder = getattr(savers[0], "dirpath", None) if len(savers) == 1 else None
        self._folder = Path(folder) if folder else None
        for saver in savers if trainer.ckpt_path else ():
            # Else the first batch behind it, in the middle of an accumulated step, is saved over it, without gradient.
            saver._last_global_step_saved = trainer.global_step
        if name := self._restored.get("best_file"):
            beside = [Path(trainer.ckpt_path).parent] if trainer.ckpt_path else []
            self._best = load_kept(name, *beside, Path(self._restored["best_folder"]))
            self._saved = self.kept_step if self._folder in beside else -1
        if self._parameters.ema_decay:
            start = self._restored.get("average") or snapshot(pl_module)
            self._average = MovingAverage(self._parameters.ema_decay, start, pl_module.device)
            self._average.updates = self._restored.get("average_updates", 0)
        if not self._limits.measures or not self._rows:
            return
        self._every = self._limits.interval(trainer.estimated_stepping_batches)
        self._evaluator = HeldOutEvaluator(pl_module, pl_module.feedback)
        if self._guard_rows:
            known = self._restored.get("start_wer")
            self._evaluator.start_wer = self._evaluator.wer(pl_module) if known is None else known
            if not self._evaluator.watching:
                logging.warning(
                    f"nothing watches general speech: a WER of {self._evaluator.start_wer:.0f} % on the English "
                    "sentences that ship looks like another language. Name a set by guards.manifest_filepath."
                )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Measures when it is time, once per optimizer step."""
        step = trainer.global_step
        if step == self._last_step:
            return  # gradients of this optimizer step are still being accumulated
        self._last_step = step
        failed = any(gather(pl_module.nonfinite_steps >= self._limits.max_nonfinite_steps))
        if self._average is not None:
            self._average.update(pl_module)
        if failed:
            self._stop(trainer, f"{pl_module.nonfinite_steps} steps in a row had a gradient that is not finite")
        elif self._evaluator is not None and not self._measured(step):
            ends = self._generations > 1 and step == _last_step(trainer, pl_module.feedback)
            if ends or step % self._every == 0:
                self._measure(trainer, pl_module, step)
            if (ends or self.reason) and not self._violated:
                self._end_generation(trainer, pl_module)

    def finish(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Puts the weights in place that the run gives; behind the last checkpoint, which is there to go on from."""
        step, self.done = trainer.global_step, True
        if self._evaluator is not None and not self.reason and not self._measured(step):
            self._measure(trainer, pl_module, step)
        if self._violated and self._limits.on_violation == "stop":
            self.kept_step = step
            return
        if self._evaluator is not None:
            put_back(pl_module, self._best or self._start)
            what = f"step {self.kept_step}" if self._best else "the start: no measurement passed with a gain"
            logging.info(f"the weights of {what} are kept (held-out gain {self.kept_gain:+.2f}).")
        else:
            self.kept_step = step
            if self._average is not None:
                put_back(pl_module, self._average.weights)
        self._interpolate(pl_module)

    def _measured(self, step: int) -> bool:
        return bool(self.history) and self.history[-1].step >= step

    def _measure(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        assert self._evaluator is not None
        with holding(pl_module, self._average.weights if self._average is not None else None):
            found = self._evaluator.measure(pl_module, step=step)
            self.history.append(found)
            log_values(trainer, found.metrics(), step=step)
            logging.info(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.metrics().items()))
            beyond = violations(found, self._limits)
            if beyond:
                self._stop(trainer, "; ".join(beyond))
            else:
                self._choose(trainer, pl_module, found)

    def _choose(self, trainer: pl.Trainer, pl_module: Any, found: HeldOutMetrics) -> None:
        """Keeps the weights of a measurement that passed if none is better beyond chance; counts those without a rise,
        before the first gain only those that are worse than the start beyond chance: transcripts that are about to
        learn the domain lose some reward first.
        """
        assert self._evaluator is not None
        over_this_teacher = [known for known in self.history if known.generation == found.generation]
        best = max(over_this_teacher, key=lambda known: max(0.0, known.gain))  # the first of equals; NaN counts as 0
        gained = best.gain > 0
        rises = not self._evaluator.rewarded or (gained and best is found)
        reached = best.gains if gained else (0.0,) * len(found.gains)
        good = as_good(found.gains, reached, standard_errors=self._limits.standard_errors)
        if rises or (good and found.gain > 0):
            self._best, self.kept_step = snapshot(pl_module), found.step
        self._since = 0 if rises or (good and not gained) else self._since + 1
        if self._limits.patience and self._since >= self._limits.patience:
            self.reason = f"the held-out reward has not risen for {self._since} measurements"
            logging.info(f"stopped at step {found.step}: {self.reason}.")
            trainer.should_stop = True

    def _end_generation(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The kept weights become the next generation's teacher; behind the last one, or without gain, training ends.

        How far the weights may be from the starting model is limited at the end of the run, as in any.
        """
        assert self._evaluator is not None
        generation, trainer.should_stop = pl_module.feedback.generation, True
        if generation.number == self._generations:
            return
        if self.kept_step <= generation.began:
            self.reason = self.reason or f"generation {generation.number} gained nothing"
            return
        assert self._best is not None
        put_back(pl_module, self._best)
        try:
            pl_module.begin_generation()
        except (TrainingError, RewardError) as error:
            self.reason = f"generation {generation.number + 1} has nothing to learn from: {error}"
            logging.warning(self.reason)
            return
        start_wer, self._evaluator = self._evaluator.start_wer, HeldOutEvaluator(pl_module, pl_module.feedback)
        self._evaluator.start_wer = start_wer
        self._since = 0
        if self._average is not None:
            self._average = MovingAverage(self._parameters.ema_decay, snapshot(pl_module), pl_module.device)
        self.reason, trainer.should_stop = "", False
        logging.info(f"generation {generation.number + 1}: its teacher has the weights of step {self.kept_step}.")

    def _stop(self, trainer: pl.Trainer, why: str) -> None:
        back = "; going back to the best weights that passed" if self._limits.on_violation == "rollback" else ""
        self.reason, self._violated = why, True
        logging.warning(f"guard: stopped at step {trainer.global_step}: {why}{back}.")
        trainer.should_stop = True

    def _interpolate(self, pl_module: Any) -> None:
        """Moves the update back towards the start: by the share asked for, or as far as the guard set needs it."""
        if self._limits.interpolation is not None:
            self.share = self._limits.interpolation
        elif self._evaluator is not None and self._guard_rows and self._best:
            self.share = self._largest_share(pl_module, self._evaluator)
            logging.info(f"{100 * self.share:.0f} % of the update keep the guard set's WER within its limit.")
        if self.share < 1:
            put_back(pl_module, interpolated(self._start, snapshot(pl_module), self.share))
        if self._evaluator is not None and self._guard_rows:
            self.guard_wer = self._guard_wer(pl_module, self._evaluator)

    @staticmethod
    def _guard_wer(pl_module: Any, evaluator: HeldOutEvaluator) -> tuple[float, ...]:
        before = evaluator.start_wer if evaluator.watching else None
        return () if before is None else (before, evaluator.wer(pl_module))

    def _largest_share(self, pl_module: Any, evaluator: HeldOutEvaluator) -> float:
        """The largest tenth of the update under which the guard set's WER keeps its limit, by bisection."""
        if not evaluator.watching:
            return 1.0
        end, fits, fails = snapshot(pl_module), 0, 11
        number = 10
        while fails - fits > 1:
            put_back(pl_module, interpolated(self._start, end, number / 10))
            if evaluator.wer_rise(pl_module) <= self._limits.max_wer_rise:
                fits = number
            else:
                fails = number
            number = (fits + fails) // 2
        put_back(pl_module, end)
        return fits / 10

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from.

        The best weights up to here are in a file beside the checkpoints that have the same; in the state itself where
        it is not known where those are.
        """
        average, name = self._average, None
        if self._best is not None and self._folder is not None:
            name = kept_name(self.kept_step)
            if self._saved != self.kept_step and this_rank() == 0:
                save_kept(self._folder, self.kept_step, self._best)
            self._saved = self.kept_step
        return {
            "best": None if name else self._best,
            "best_file": name,
            "best_folder": str(self._folder) if name else None,
            "best_step": self.kept_step,
            "since": self._since,
            "reason": self.reason,
            "violated": self._violated,
            "start_wer": self._evaluator.start_wer if self._evaluator is not None else None,
            "history": [vars(found) for found in self.history],
            "average": average.weights if average is not None else None,
            "average_updates": average.updates if average is not None else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._restored = state_dict
        self._best = state_dict["best"]
        self.kept_step, self._since = state_dict["best_step"], state_dict["since"]
        self.reason, self._violated = state_dict.get("reason", ""), state_dict.get("violated", False)
        self.history = [HeldOutMetrics(**found) for found in state_dict["history"]]


def _last_step(trainer: pl.Trainer, feedback: Feedback) -> int:
    """The step at which the run's generation ends."""
    return feedback.generation.began + feedback.generation_steps(trainer.max_steps)
