"""The bar of the whole run: steps, what they gain, and the time that is left, held-out measurements included."""

from __future__ import annotations

import math
import signal
import sys
import time
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import lightning.pytorch as pl

from nemo_llm_feedback.core import console
from nemo_llm_feedback.training.callbacks.early_stopping import HeldOutEarlyStopping
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics, gain_name
from nemo_llm_feedback.training.distributed import gather

# Steps between two lines where there is no terminal.
_EVERY = 10


class RunBar(pl.Callback):
    """Shows the run's progress, and ends it after a step when a signal has asked for that.

    Args:
        stopping: measures held-out utterances; its callback comes first.
    """

    def __init__(self, stopping: HeldOutEarlyStopping) -> None:
        self._stopping = stopping
        self._open = ExitStack()
        self._update: Any = None
        self._clock = RunClock()
        self._shown = self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Shows what was found on the pool, and opens the bar."""
        self._last_step = start = trainer.global_step
        self._shown = len(self._stopping.history)
        session = console.session()
        if session is not None:
            session.in_training = True
            if session.on_signal is not None:
                # Lightning has put an answer of its own before it, which leaves with status 0 and without a checkpoint
                # where the signal comes after this callback's turn.
                signal.signal(signal.SIGTERM, session.on_signal)
        if session is None or not trainer.is_global_zero:
            return
        console.show(_found(pl_module))
        total = int(trainer.estimated_stepping_batches)
        limits = pl_module.feedback.config.guards
        self._clock = RunClock(start=start, total=total, every=limits.interval(total) if limits.measures else 0)
        self._update = self._open.enter_context(console.progress("training", total, unit="steps"))
        self._update(start)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Moves the bar by an optimizer step."""
        step, session, history = trainer.global_step, console.session(), self._stopping.history
        if step == self._last_step or session is None:
            return
        self._last_step = step
        measured, self._shown = history[self._shown :], len(history)
        if self._update is not None:
            self._clock.tick(step, measured=bool(measured))
            note = self._note(trainer)
            left = f"{_time(self._clock.left())} left"
            self._update(step, note=note, left=left)
            if not session.bars and (step % _EVERY == 0 or step == self._clock.total):
                console.show(f"  step {step:>4}/{self._clock.total}: {note}   {left}")
            for found in measured:
                kept, held = found.step == self._stopping.kept_step, bool(self._stopping.held_out_rows)
                console.show(_held_out_line(found, kept=kept, held_out=held))
        if (stop := max(gather(session.stop))) and step < self._clock.total:
            self._save_and_leave(trainer, stop)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Closes the bar."""
        self._close()

    def _close(self) -> None:
        self._open.close()
        if (session := console.session()) is not None:
            session.in_training = False

    def _save_and_leave(self, trainer: pl.Trainer, number: int) -> None:
        saver: Any = trainer.checkpoint_callback
        if saver is not None:
            saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
            console.show(f"a checkpoint of step {trainer.global_step} is saved.")
        sys.exit(128 + number)

    def _note(self, trainer: pl.Trainer) -> str:
        values = trainer.callback_metrics
        rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else math.nan
        history = self._stopping.history
        shown = {
            "group gain": _number(values.get("feedback/reward_gain"), "+.2f"),
            "KL": _number(values.get("feedback/kl_reference"), ".3f"),
            "rate": f"{rate:.1e}",
            gain_name(self._stopping.held_out_rows): _number(history[-1].gain, "+.2f") if history else "",
        }
        return "   ".join(f"{name} {value}" for name, value in shown.items() if value)


class RunClock:
    """Estimates the time that is left of a run from its steps and its measurements so far.

    Args:
        start: steps done before this attempt.
        total: steps of the run.
        every: steps between two held-out measurements; 0 = none.
    """

    def __init__(self, *, start: int = 0, total: int = 0, every: int = 0) -> None:
        self._start, self.total, self._every = start, total, every
        self._step, self._since = start, time.monotonic()
        self._steps: list[float] = []
        self._measurements: list[float] = []

    def tick(self, step: int, *, measured: bool) -> None:
        """Counts a step that has just ended, with the held-out measurement behind it where there was one."""
        now = time.monotonic()
        (self._measurements if measured else self._steps).append(now - self._since)
        self._step, self._since = step, now

    def left(self) -> float:
        """Seconds; there must have been a step."""
        a_step = fmean(self._steps or self._measurements)
        left = (self.total - self._step) * a_step
        if self._every and self._measurements:
            extra = fmean(self._measurements) - a_step
            # The last step is always measured.
            left += max(0.0, extra) * (-(-self.total // self._every) - self._step // self._every)
        return left


def _found(model: Any) -> str:
    """What the pool and the trial have set, one line each."""
    feedback = model.feedback
    statistics, config, number = feedback.statistics, feedback.config, feedback.generation.number
    lines = []
    if statistics is not None:
        share = f"{100 * statistics.signal_fraction:.0f} % of {statistics.utterances} utterances have a reward signal"
        lines.append(f"  pool         {share}, {statistics.members:.1f} hypotheses each")
        if statistics.alpha is not None and statistics.beta is not None:
            lines.append(f"  weights      alpha {statistics.alpha:g}, beta {statistics.beta:g}")
        for source, heard in (statistics.heard or {}).items():
            trust = (statistics.trust or {})[source]
            lines.append(f"  {source:<12} heard {100 * heard:.0f} % of its utterances, trust {trust:g} nat per label")
        if config.proposals.boosted and config.context.load().terms:
            lines.append(f"  boosting     weight {statistics.boosting_weight:g}")
    rate = model.cfg.optim.lr
    lines.append(f"  rate         {rate:g}" + (", by the trial" if feedback.rates else ""))
    return "\n".join(
        [f"generation {number}, whose teacher is the model as it was best" if number > 1 else "found", *lines]
    )


def _held_out_line(found: HeldOutMetrics, *, kept: bool, held_out: bool) -> str:
    """One measurement for readers of the terminal."""
    parts = {
        "gain": _number(found.gain, "+.2f"),
        "KL": _number(found.kl, ".3f"),
        "length": f"×{found.length_ratio:.2f}",
        "changed": f"{100 * found.changed:.0f} %",
        "guard WER": f"{100 * found.wer_rise:+.1f} %" if found.wer_rise == found.wer_rise else "",
    }
    shown = "   ".join(f"{name} {value}" for name, value in parts.items() if value)
    return (
        f"  step {found.step:>4} {'held out' if held_out else 'measured'}: {shown}{'   (kept so far)' if kept else ''}"
    )


def _number(value: Any, form: str) -> str:
    return "" if value is None or math.isnan(float(value)) else format(float(value), form)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
