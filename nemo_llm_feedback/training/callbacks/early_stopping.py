"""The callback that lets a run be left alone: looks, stops, goes back to good weights, and picks what is exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from nemo_llm_feedback.core.config import GuardConfig, ParametersConfig
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.training.callbacks.guards import Look, violations
from nemo_llm_feedback.training.callbacks.held_out import HeldOutWatch
from nemo_llm_feedback.training.callbacks.lr_search import choose_rate, scale_rates
from nemo_llm_feedback.training.callbacks.weights import MovingAverage, Weights, holding, mixed, put_back, snapshot
from nemo_llm_feedback.training.distributed import Together, gather


class Watchman(pl.Callback):
    """Looks at held-out utterances every few steps and decides, without a label, when to stop and what to keep.

    The weights of the look with the highest held-out reward are what the run gives; where there is no reward (plain
    self-training), those of the last look that passed. With ``parameters.ema_decay`` looks, choice and export use the
    moving average. Every decision is rank 0's.

    Args:
        limits: the guards.
        rows: held-out rows.
        guard_rows: labelled general-domain rows; may be empty.
        start: the starting model's weights, taken before a resumed run's are loaded.
        parameters: with the decay of the moving average and the learning rates to try.

    Attributes:
        looks: all looks of the run, in order.
        reason: why training ended before its last step; empty if it did not.
        share: λ of the exported mix; 1 = the adapted weights.
    """

    def __init__(
        self,
        limits: GuardConfig,
        rows: Sequence[Row],
        guard_rows: Sequence[Row],
        *,
        start: Weights,
        parameters: ParametersConfig,
    ) -> None:
        self._limits, self._rows, self._guard_rows = limits, rows, guard_rows
        self._start, self._last_step = start, -1
        self._parameters = parameters
        self._watch: HeldOutWatch | None = None
        self._average: MovingAverage | None = None
        self._best: Weights | None = None
        self._restored: dict[str, Any] = {}
        self._best_gain, self._best_step, self._since = 0.0, 0, 0
        self._violated, self._every = False, 0
        self.looks: list[Look] = []
        self.reason, self.share = "", 1.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Prepares the looks; a resumed run takes its best weights back."""
        if self._parameters.ema_decay:
            self._average = MovingAverage(
                self._parameters.ema_decay, self._restored.get("average") or snapshot(pl_module)
            )
            self._average.updates = self._restored.get("average_updates", 0)
        if not self._limits.looks or not self._rows:
            return
        self._every = self._limits.interval(trainer.estimated_stepping_batches)
        self._watch = HeldOutWatch(pl_module, pl_module._feedback, self._rows, self._guard_rows)
        self._watch.start_wer = self._restored.get("start_wer")
        if self._watch.start_wer is None:
            self._watch.wer_rise(pl_module)
        if self._parameters.lr_candidates and not self._restored:
            self._choose_rate(trainer, pl_module)

    def _choose_rate(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """By rank 0 on its own rows: the others wait, as nothing in a trial joins gradients."""
        assert self._watch is not None
        with Together() as ranks:
            if trainer.is_global_zero:
                ranks.mine = choose_rate(
                    pl_module,
                    self._watch,
                    self._limits,
                    candidates=self._parameters.lr_candidates,
                    steps=self._parameters.lr_trial_steps,
                )
        rate = ranks.all[0]
        scale_rates(trainer, rate / float(pl_module.cfg.optim.lr))
        pl_module.cfg.optim.lr = rate

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Looks when it is time, once an optimizer step."""
        step = trainer.global_step
        if step == self._last_step:
            return  # gradients of this optimizer step are still being accumulated
        self._last_step = step
        # While gradients are accumulated, one that is not finite is seen by its own rank only.
        failed = any(gather(pl_module.nonfinite_steps >= self._limits.max_nonfinite_steps))
        if self._average is not None:
            self._average.update(pl_module)
        if failed:
            self._stop(trainer, f"{pl_module.nonfinite_steps} steps in a row had a gradient that is not finite")
        elif self._watch is not None and step % self._every == 0 and not self._looked_at(step):
            self._look(trainer, pl_module, step)

    def finish(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Puts the weights in place that the run gives; behind the last checkpoint, which is there to go on from."""
        step = trainer.global_step
        if self._watch is not None and not self.reason and not self._looked_at(step):
            self._look(trainer, pl_module, step)
        if self._violated and self._limits.on_violation == "stop":
            return
        if self._watch is not None:
            put_back(pl_module, self._best or self._start)
            what = f"step {self._best_step}" if self._best else "the start: no look passed with a gain"
            logging.info(f"the weights of {what} are kept (held-out gain {self._best_gain:+.2f}).")
        elif self._average is not None:
            put_back(pl_module, self._average.weights)
        self._mix(trainer, pl_module)

    def _looked_at(self, step: int) -> bool:
        return bool(self.looks) and self.looks[-1].step >= step

    def _look(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        assert self._watch is not None
        average = self._average.weights if self._average is not None else None
        with holding(pl_module, average):
            with Together() as ranks:
                ranks.mine = self._watch.look(pl_module, step=step) if trainer.is_global_zero else None
            look = ranks.all[0]
            self.looks.append(look)
            for logger in trainer.loggers:
                logger.log_metrics(look.metrics(), step=step)
            logging.info(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in look.metrics().items()))
            beyond = violations(look, self._limits)
            if beyond:
                self._stop(trainer, "; ".join(beyond))
            elif look.gain > self._best_gain or not self._watch.rewarded:
                self._best, self._best_gain, self._best_step = snapshot(pl_module), look.gain, step
                self._since = 0
            else:
                self._since += 1
                if self._limits.patience and self._since >= self._limits.patience:
                    self.reason = f"the held-out reward has not risen for {self._since} looks"
                    logging.info(f"stopped at step {step}: {self.reason}.")
                    trainer.should_stop = True

    def _stop(self, trainer: pl.Trainer, why: str) -> None:
        back = "; going back to the best weights that passed" if self._limits.on_violation == "rollback" else ""
        self.reason, self._violated = why, True
        logging.warning(f"guard: stopped at step {trainer.global_step}: {why}{back}.")
        trainer.should_stop = True

    def _mix(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Mixes the update with the start: by the share asked for, or as much of it as the guard set bears."""
        if self._limits.interpolation is not None:
            self.share = self._limits.interpolation
        elif self._watch is not None and self._guard_rows and self._best:
            with Together() as ranks:
                ranks.mine = self._largest_share(pl_module) if trainer.is_global_zero else None
            self.share = ranks.all[0]
            logging.info(f"{100 * self.share:.0f} % of the update keep the guard set's WER within its limit.")
        if self.share < 1:
            put_back(pl_module, mixed(self._start, snapshot(pl_module), self.share))

    def _largest_share(self, pl_module: Any) -> float:
        """The largest tenth of the update under which the guard set's WER keeps its limit, by bisection."""
        assert self._watch is not None
        end, fits, fails = snapshot(pl_module), 0, 11
        number = 10
        while fails - fits > 1:
            put_back(pl_module, mixed(self._start, end, number / 10))
            if self._watch.wer_rise(pl_module) <= self._limits.max_wer_rise:
                fits = number
            else:
                fails = number
            number = (fits + fails) // 2
        put_back(pl_module, end)
        return fits / 10

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from, with the best weights up to here; a file of their own could be newer."""
        average = self._average
        return {
            "best": self._best,
            "best_gain": self._best_gain,
            "best_step": self._best_step,
            "since": self._since,
            "start_wer": self._watch.start_wer if self._watch is not None else None,
            "looks": [vars(look) for look in self.looks],
            "average": average.weights if average is not None else None,
            "average_updates": average.updates if average is not None else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._restored = state_dict
        self._best = state_dict["best"]
        self._best_gain, self._best_step = state_dict["best_gain"], state_dict["best_step"]
        self._since = state_dict["since"]
        self.looks = [Look(**look) for look in state_dict["looks"]]


class Finish(pl.Callback):
    """Lets the watchman finish at the end of training; to be placed behind the callback that writes checkpoints.

    Args:
        watchman: of the run.

    Attributes:
        done: whether it has; Lightning ends no training in a run that was killed after its last step.
    """

    def __init__(self, watchman: Watchman) -> None:
        self._watchman = watchman
        self.done = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """See :meth:`Watchman.finish`."""
        self._watchman.finish(trainer, pl_module)
        self.done = True
