"""Chooses the learning rate without labels: short trials from the same start, judged by the held-out loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from nemo.utils import logging
from omegaconf import OmegaConf, open_dict

from nemo_llm_feedback.asr.look_ahead import look_aheads, looking_ahead
from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core import console
from nemo_llm_feedback.core.config.sections import RATIO_OBJECTIVES
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.hypotheses.nbest import NBestBatch, NBestCache
from nemo_llm_feedback.training.callbacks.guards import violations
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator
from nemo_llm_feedback.training.distributed import CollectiveBlock, average_gradients
from nemo_llm_feedback.training.losses import objective_loss
from nemo_llm_feedback.training.state import Feedback
from nemo_llm_feedback.training.weights import put_back, snapshot

# A short trial flatters large rates (short-horizon bias, Wu et al. 2018, arXiv 1803.02021): a smaller rate that gains
# nearly as much is taken.
_NEARLY = 0.8


def try_rates(model: Any, feedback: Feedback) -> Feedback:
    """Chooses the learning rate where none is given, and makes the optimizer anew with it.

    The ranks train together, each on its rows, as they do in the run. A resumed run takes the rate that it had.

    Args:
        model: the model in its starting weights, on its device, with a trainer.
        feedback: the run's state.

    Returns:
        ``feedback`` with the rate in its statistics.
    """
    statistics = feedback.statistics
    if not feedback.rates or statistics is None:
        return feedback
    rate = statistics.learning_rate
    if rate is None:
        rate = choose_rate(model, HeldOutEvaluator(model, feedback))
    with open_dict(model.cfg):
        model.cfg.optim.lr = rate
    model.trainer.strategy.setup_optimizers(model.trainer)
    return replace(feedback, statistics=replace(statistics, learning_rate=rate))


def choose_rate(model: Any, evaluator: HeldOutEvaluator) -> float:
    """Trains from the same weights with each rate in turn, on the same batches, and returns the best one.

    A trial is judged by how far the run's loss falls on held-out utterances, on hypotheses that the starting model
    proposes: greedy transcripts may get worse before they get better, and a dozen steps do not show which. A trial
    that breaks a guard is out, and so are the larger rates after it. The weights are as before in the end.

    Args:
        model: the model in its starting weights; its training state may be used up.
        evaluator: measures the held-out utterances.

    Returns:
        The smallest candidate with at least 0.8 of the greatest fall; the smallest where the loss fell with none.
    """
    feedback: Feedback = model.feedback
    config, tried, start = feedback.config, sorted(feedback.rates), snapshot(model)
    falls: dict[float, float] = {}
    with torch.random.fork_rng():
        held_out = HeldOutLoss(model, feedback, evaluator.audio)
        before = held_out(model)
        batches = _batches(model, config.parameters.lr_trial_steps * model.trainer.accumulate_grad_batches)
        # Groups of another rate's policy, with its log p, are no use to an objective that compares with it.
        shared = not config.on_policy or config.scores_in_phases
        if shared:
            _propose(model, batches)
        feedback.release_llm()
        sampler = feedback.generator.get_state()
        for rate in tried:
            put_back(model, start)
            feedback.generator.set_state(sampler)
            own = feedback if shared else replace(feedback, cache=NBestCache())
            with model.training_with(own), torch.random.fork_rng():  # the same dropout and masks for all
                _train(model, batches, rate)
            found = evaluator.measure(model, step=config.parameters.lr_trial_steps)
            beyond = violations(found, config.guards)
            fall = before - held_out(model)
            logging.info(
                f"learning rate {rate:g}: the held-out loss falls by {fall:.3f} of {before:.3f}, held-out gain "
                f"{found.gain:+.2f}; {'; '.join(beyond) or 'all guards pass'}"
            )
            if beyond:
                break
            falls[rate] = fall
        feedback.generator.set_state(sampler)
    best = smallest_good(falls) if falls else tried[0]
    put_back(model, start)
    logging.info(f"learning rate {best:g} is taken.")
    if not any(fall > 0 for fall in falls.values()):
        logging.warning(
            f"no learning rate lowered the held-out loss in {config.parameters.lr_trial_steps} steps within the "
            f"guards, so the trial shows nothing and the smallest, {best:g}, is taken: the run may learn next to "
            "nothing. Add smaller ones to parameters.lr_candidates, raise parameters.lr_trial_steps, or give "
            "model.optim.lr."
        )
    return best


def smallest_good(falls: Mapping[float, float]) -> float:
    """The smallest rate with nearly the greatest fall of the loss; the smallest of all where it fell with none.

    Args:
        falls: rate → fall of the held-out loss, NaN = not judged; at least one.
    """
    most = max((fall for fall in falls.values() if fall > 0), default=math.inf)
    return min((rate for rate, fall in falls.items() if fall >= _NEARLY * most), default=min(falls))


def _batches(model: Any, most: int) -> list[Any]:
    """Batches of this rank's share for the trial, on every rank as many: those with fewer repeat theirs."""
    with CollectiveBlock() as ranks:
        found = list(itertools.islice(model.pool_batches(), most))
        if not found:
            raise TrainingError(
                "this rank has no batch for the trial of learning rates: train on fewer devices, with a smaller "
                "model.train_ds.batch_size, or set model.optim.lr."
            )
        ranks.mine = len(found)
    return list(itertools.islice(itertools.cycle(found), max(ranks.all)))


@torch.no_grad()
def _propose(model: Any, batches: Sequence[Any]) -> None:
    """Has the groups of the batches proposed by the starting model, for all trials and the run's first refresh."""
    feedback = model.feedback
    with CollectiveBlock(), evaluation_mode(model), model.run_precision():
        for part in model.encoded_pool(batches):
            nbest = feedback.nbest(*part, refresh=0)
            if feedback.config.on_policy:  # whose ratios are of one look-ahead, and the frozen model has its own
                feedback.cache.put(nbest.with_old_logp(feedback.policy_logp(part.encoded, part.lengths, nbest)))
            else:
                feedback.cache.put(nbest.by_the_start())


def _train(model: Any, batches: Sequence[Any], rate: float) -> None:
    """Training steps as the run takes them: its optimizer at a constant rate, its precision, clipping, accumulation
    and mix of rows."""
    trainer, given = model.trainer, model.cfg.optim
    settings = OmegaConf.to_container(given, resolve=True)
    assert isinstance(settings, dict)
    settings.pop("sched", None)
    optimizer = model.setup_optimization(OmegaConf.create({**settings, "lr": rate}))
    model.cfg.optim = given  # NeMo keeps the trial's, and the run would have no schedule
    optimizer = optimizer[0] if isinstance(optimizer, tuple) else optimizer
    size, algorithm = trainer.accumulate_grad_batches, GradClipAlgorithmType(trainer.gradient_clip_algorithm or "norm")
    silent = mock.patch.multiple(model, log=mock.DEFAULT, log_dict=mock.DEFAULT)
    for first in console.track(range(0, len(batches), size), f"trying learning rate {rate:g}", unit="steps"):
        model._trial_step = first // size
        optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches[first : first + size]):
            with silent, trainer.precision_plugin.train_step_context():
                loss = model.training_step(batch, first + number)["loss"] / size
            if loss.requires_grad:
                loss.backward()
        average_gradients(model)
        model.on_before_optimizer_step(optimizer)
        trainer.precision_plugin.clip_gradients(optimizer, trainer.gradient_clip_val or 0, algorithm)
        optimizer.step()
    model.zero_grad(set_to_none=True)


class HeldOutLoss:
    """Objective and regularisers on hypotheses of held-out utterances that the model proposes when this is made.

    Transcripts jump, and a dozen updates may make them worse before they get better; the loss on hypotheses that stay
    the same moves with every update, and rises where updates are too large, since the regularisers are in it.

    Args:
        model: the policy, in its starting weights.
        feedback: state with proposer, reward, heads and objective. A clipped objective cannot be the measure: its
            gain on a group ends at the clip, which the smallest rate reaches, too. `distill` stands in for it, since
            its loss is the distance to where a KL-regularised objective goes.
        audio: this rank's share of the held-out utterances; those whose log p is NaN are left out.
    """

    def __init__(self, model: Any, feedback: Feedback, audio: Sequence[Audio]) -> None:
        self._feedback, self._objective = feedback, feedback.config.objective
        if self._objective.name in RATIO_OBJECTIVES:
            self._objective = replace(self._objective, name="distill")
        self._contexts: list[list[int] | None] = []
        self._audio: list[Audio] = []
        self._nbest: list[NBestBatch] = []
        # Those of a streaming checkpoint count the same.
        contexts: Sequence[list[int] | None] = look_aheads(model.encoder) or [None]
        with CollectiveBlock(), torch.no_grad(), evaluation_mode(model), model.run_precision():
            for context, part in itertools.product(contexts, audio):
                with looking_ahead(context, model.encoder):
                    encoded, lengths = encode(model, part.signal, part.signal_len)
                nbest = feedback.maker.make(part, encoded, lengths)
                logp = {head.name: head.score(encoded, lengths, nbest.labels) for head in feedback.heads}
                bad = torch.stack([scores.isnan().any(1) for scores in logp.values()]).any(0)
                sound = (~bad).nonzero().flatten().tolist()  # NaN of one utterance would be the mean of all
                if sound:
                    self._contexts.append(context)
                    self._audio.append(part.select(sound))
                    self._nbest.append(nbest.with_old_logp(logp).select(sound))

    @torch.no_grad()
    def __call__(self, model: Any) -> float:
        """The loss under the model's weights now, without SpecAugment and dropout: mean over the utterances of all
        ranks, in nats for the likelihood objectives, in the reward's unit for ``mwer``."""
        feedback, found = self._feedback, 0.0
        with CollectiveBlock() as ranks, evaluation_mode(model), model.run_precision():
            for context, part, nbest in zip(self._contexts, self._audio, self._nbest, strict=True):
                with looking_ahead(context, model.encoder):
                    encoded, lengths = encode(model, part.signal, part.signal_len)
                for head in feedback.heads:
                    logp = head.score(encoded, lengths, nbest.labels)
                    loss = objective_loss(self._objective, logp, nbest, head=head.name).total()
                    found += feedback.head_weights[head.name] * float(loss) * len(nbest)  # type: ignore[arg-type]
            ranks.mine = found, sum(map(len, self._nbest))
        total, count = (sum(parts) for parts in zip(*ranks.all, strict=True))
        return total / count if count else math.nan
