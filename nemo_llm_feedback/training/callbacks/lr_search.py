"""The learning rate, chosen without a label: short trials from the same start, judged by the loss held out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.utils import logging

from nemo_llm_feedback.core.config import GuardConfig
from nemo_llm_feedback.training.callbacks.guards import violations
from nemo_llm_feedback.training.callbacks.held_out import HeldOutWatch
from nemo_llm_feedback.training.callbacks.held_out_loss import HeldOutLoss
from nemo_llm_feedback.training.callbacks.weights import put_back, snapshot
from nemo_llm_feedback.training.losses import total
from nemo_llm_feedback.training.survey import pool_audio

# A short trial flatters large rates (short-horizon bias, Wu et al. 2018, arXiv 1803.02021): a smaller rate that gains
# nearly as much is taken.
_NEARLY = 0.8


def choose_rate(
    model: Any, watch: HeldOutWatch, limits: GuardConfig, *, candidates: Sequence[float], steps: int
) -> float:
    """Trains from the same weights with each rate in turn, on the same batches, and returns the best one.

    A trial is judged by how far the run's own loss falls on held-out utterances, on groups that the starting model
    proposes: greedy transcripts may get worse before they get better, and a dozen steps then tell nothing. A trial
    whose look breaks a guard is out, and so are the larger rates after it. The weights, the kept groups and all random
    states are as before in the end. Nothing here talks to other ranks: one of them chooses for all.

    Args:
        model: in its starting weights.
        watch: looks at the held-out utterances.
        limits: the guards.
        candidates: peak learning rates of AdamW.
        steps: batches of a trial, at a constant rate.

    Returns:
        The smallest candidate with at least 0.8 of the greatest fall; the smallest where the loss fell with none.
    """
    start, tried = snapshot(model), sorted(candidates)
    state = model._feedback
    sampler, kept = state.maker.generator.get_state(), (state.maker.kept, state.filled_round)
    falls: dict[float, float] = {}
    with torch.random.fork_rng():
        held_out = HeldOutLoss(model, state, watch.audio)
        before = held_out(model)
        batches = list(itertools.islice(pool_audio(model, state), steps))
        for rate in tried:
            put_back(model, start)
            _train(model, batches, rate)
            look = watch.look(model, step=len(batches))
            beyond = violations(look, limits)
            fall = before - held_out(model)
            logging.info(
                f"learning rate {rate:g}: the held-out loss falls by {fall:.3f} of {before:.3f}, held-out gain "
                f"{look.gain:+.2f}; {'; '.join(beyond) or 'all guards pass'}"
            )
            if beyond:
                break
            falls[rate] = fall
    best = smallest_good(falls) if falls else tried[0]
    put_back(model, start)
    # A trial's policy proposed its groups; the run starts from its own.
    state.maker.kept, state.filled_round = kept
    state.maker.generator.set_state(sampler)
    model.nonfinite_steps = 0
    logging.info(f"learning rate {best:g} is taken.")
    if not any(fall > 0 for fall in falls.values()):
        logging.warning(nothing_learned(best, steps=len(batches)))
    return best


def nothing_learned(rate: float, *, steps: int) -> str:
    """What to tell of a trial that says nothing: the run would learn next to nothing, and look as if it could not.

    Args:
        rate: the one that is taken.
        steps: of the trial.
    """
    return (
        f"no learning rate lowered the held-out loss in {steps} steps within the guards, so the trial says nothing "
        f"and the smallest, {rate:g}, is taken: the run may learn next to nothing. Add smaller ones to "
        "parameters.lr_candidates, raise parameters.lr_trial_steps, or give model.optim.lr."
    )


def smallest_good(falls: Mapping[float, float]) -> float:
    """The smallest rate with nearly the greatest fall of the loss; the smallest of all where it fell with none.

    Args:
        falls: rate → fall of the held-out loss, NaN = not judged; at least one.
    """
    most = max((fall for fall in falls.values() if fall > 0), default=math.inf)
    return min((rate for rate, fall in falls.items() if fall >= _NEARLY * most), default=min(falls))


def scale_rates(trainer: pl.Trainer, factor: float) -> None:
    """Multiplies the rates of all parameter groups and of what their schedulers go back to."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for key in ("lr", "initial_lr"):
                if key in group:
                    group[key] *= factor
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        if getattr(scheduler, "min_lr", None):
            scheduler.min_lr *= factor


def _train(model: Any, batches: Sequence[Any], rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for audio in batches:
        optimizer.zero_grad(set_to_none=True)
        terms, _, _ = model.feedback_loss(audio)
        loss = total(terms)
        if loss.requires_grad:
            loss.backward()
            model.on_after_backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
