"""The mixin that adds the feedback loss to a NeMo model: ``training_step`` and ``feedback_loss`` are the main path.

The paper (arXiv 2506.11091) lets an LLM that is given the context score hypotheses: the scores are the reward of
reinforcement learning. What it leaves open, and what stands for it here:

- where hypotheses come from: beam, boosted beam, term swaps, samples, corrections (``hypotheses.proposals``);
- the reward: α·log p_LLM + log p_ASR under the frozen teacher, at first the start, + β·length (``rewards.lm``);
- the objective: seven, by default the distillation of the KL-regularised optimum (``training.objectives``);
- what keeps the general domain: replay rows, held to the starting model by KL (``training.replay_kl``).

What the mixin leaves to others: everything before the first step (``setup``, ``pool``), the exact likelihood
(``asr.likelihood``), sums over ranks (``losses``), and held-out metrics, guards and logs (``callbacks``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import OmegaConf
from torch import Tensor

from nemo_llm_feedback.asr.checkpoints import atomic_path, stock_config
from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.look_ahead import draw_look_ahead, looking_ahead
from nemo_llm_feedback.asr.lora import merged
from nemo_llm_feedback.asr.reference import encode, evaluation_mode, frozen_statistics, recomputed_layers
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.run_folder import STATISTICS_FILE, write_json
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.data.resumable_loader import ResumableLoader, resumable
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.rewards import Reward
from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping, callbacks_of, try_rates
from nemo_llm_feedback.training.distributed import gather, local_metrics, num_ranks, zero_grad_for_unused
from nemo_llm_feedback.training.generations import check_generations, next_generation
from nemo_llm_feedback.training.losses import LossSum, nbest_metrics, objective_loss
from nemo_llm_feedback.training.pool import EncodedAudio, fill_cache, pool_share
from nemo_llm_feedback.training.replay_kl import replay_kl
from nemo_llm_feedback.training.resume import count_finished_batch, place_in_data
from nemo_llm_feedback.training.setup import build_setup, check_precision, check_starts, start
from nemo_llm_feedback.training.state import Feedback, FeedbackSetup
from nemo_llm_feedback.training.supervision import exact_supervised_step, pseudo_labelled_batch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

CHECKPOINT_KEY = "nemo_llm_feedback"


class LLMFeedbackMixin(_Base):
    """Put in front of a NeMo ASR class: rows without text are learned from feedback, rows with text as NeMo does.

    ``setup_feedback`` switches it on; until then, and in batches whose rows all have text (with an encoder that learns
    and ``feedback.supervised_weight=1``), the model is the stock one, bit for bit.
    """

    _setup: FeedbackSetup | None = None
    _feedback: Feedback | None = None
    _resumed: dict[str, Any] | None = None
    _adaptation_facts: dict[str, Any] | None = None
    _source_path: str = ""
    _in_step: tuple[Any, ...] = ()  # what names the rows of the batches since the last optimizer step
    _train_dl: Any
    _trial_step: int | None = None  # of a trial of a learning rate, which the trainer does not count

    nonfinite_steps: int = 0
    """Consecutive optimizer steps, up to now, that were skipped because a gradient was not finite."""

    # ------------------------------------------------------------------------------------------------- the main path

    def training_step(self, batch: Any, batch_nb: int) -> dict[str, Any]:
        """Replay rows are held, labelled rows learned by NeMo's step, unlabeled rows by the feedback loss."""
        feedback = self._feedback
        if feedback is None:
            return super().training_step(batch, batch_nb)
        self._in_step += (batch[-1],)
        weights, output = feedback.config.feedback, dict[str, Any](log={})
        with LossSum() as loss:  # one exchange between ranks; if one fails, all do
            rows = feedback.reader.split(batch)
            if rows.all_labelled and num_ranks() == 1 and weights.supervised_weight == 1:
                return self._labelled_step(rows.labelled, batch_nb)
            if rows.replay is not None:
                loss.join(replay_kl(self, feedback, rows.replay), weight=weights.replay_weight)
            if rows.labelled is not None and weights.supervised_weight > 0:
                output |= self._labelled_step(rows.labelled, batch_nb)
                loss.add("supervised", output["loss"], count=len(rows.labelled[1]), weight=weights.supervised_weight)
            if rows.unlabeled is not None and weights.weight > 0:
                loss.feedback_rows = len(rows.unlabeled.utterances)
                loss.join(self.feedback_loss(rows.unlabeled, batch_nb), weight=weights.weight)
        return self._output(output, loss)

    def feedback_loss(self, audio: Audio, batch_nb: int = 0) -> LossSum:
        """The feedback loss of unlabeled rows: encode, propose, reward, exact log p, objective.

        Args:
            audio: B unlabeled utterances.
            batch_nb: handed to NeMo's step by augmented self-training.

        Returns:
            The terms of the loss with gradient, and their metrics.
        """
        feedback = self.feedback
        config = feedback.config
        augment, by_nemo = config.feedback.augment, config.learns_by_nemo
        with evaluation_mode(self), recomputed_layers(self.encoder, active=config.parameters.recompute_encoder):
            learned = not (augment or by_nemo)  # from this pass
            if learned or config.on_policy or feedback.stale(audio, refresh=self._refresh()):
                encoded, lengths = self._encode(audio, gradient=learned)  # [B, D, T], [B]
                feedback.nbest(audio, encoded, lengths, refresh=self._refresh())
                clean = encoded, lengths
            nbest = feedback.cache.get(audio.utterances)  # [B, N], no gradient
            if augment:
                encoded, lengths = self._encode(audio, augment=True)
            heads = () if by_nemo else feedback.heads
            logp = {head.name: head.score(encoded, lengths, nbest.labels) for head in heads}  # [B, N], gradient on
            if augment and config.on_policy:
                logp = self._with_clean_values(logp, clean, nbest)
        if by_nemo:
            return self._pseudo_label_loss(audio, nbest, batch_nb, zero=zero_grad_for_unused(self))
        nbest = nbest.with_old_logp(logp)
        feedback.cache.put(nbest)
        loss, first = LossSum(), feedback.heads[0].name
        for head, weight in feedback.head_weights.items():
            part = objective_loss(config.objective, logp[head], nbest, head=head)
            loss.join(part, weight=weight, head=head, prefix="" if head == first else f"{head}/")
        loss.log(nbest_metrics(nbest, logp[first], head=first), count=len(nbest))
        hit_rate = float(getattr(feedback.maker.reward, "hit_rate", float("nan")))
        if hit_rate == hit_rate:
            loss.log({"cache_hit_rate": hit_rate}, count=len(nbest))
        return loss

    # --------------------------------------------------------------------------------------------- parts of the path

    def _encode(
        self, audio: Audio, *, gradient: bool = True, augment: bool = False, refresh: int | None = None
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.is_grad_enabled() and gradient
        with torch.set_grad_enabled(gradient), looking_ahead(self.look_ahead(refresh), self.encoder):
            return encode(self, audio.signal, audio.signal_len, augment=augment)

    def _with_clean_values(
        self, logp: dict[str, Tensor], clean: tuple[Tensor, Tensor], nbest: NBestBatch
    ) -> dict[str, Tensor]:
        """[B, N] log p under the masked audio with the values of the clean audio: ratios to the policy that made the
        group compare the two policies, not two masks; the gradient is that of the masked audio."""
        with torch.no_grad():
            values = {head.name: head.score(clean[0], clean[1], nbest.labels) for head in self.feedback.heads}
        gradient = {name: masked - masked.detach() for name, masked in logp.items()}  # NaN where log p is −inf
        return {n: torch.where(values[n].isneginf(), values[n], values[n] + gradient[n]) for n in logp}

    def _pseudo_label_loss(self, audio: Audio, nbest: Any, batch_nb: int, *, zero: Tensor) -> LossSum:
        """NeMo's step on one pseudo-label per utterance; ``zero`` stands for it where no label passed the filter."""
        feedback, loss = self.feedback, LossSum()
        batch, found = pseudo_labelled_batch(feedback.config.objective, audio, nbest, head=feedback.heads[0].name)
        with frozen_statistics(self, active=feedback.config.parameters.freeze_batchnorm):
            value = self._labelled_step(batch, batch_nb)["loss"] if batch else zero
        loss.add("pseudo_labels", value, count=len(batch[1]) if batch else 0)
        loss.log(found, count=len(nbest))
        return loss

    def _labelled_step(self, batch: Any, batch_nb: int) -> dict[str, Any]:
        """NeMo's step; for TDT on the CPU, where NeMo has no loss, the exact likelihood in its place."""
        feedback, parameters = self.feedback, self.feedback.config.parameters
        still = parameters.freeze_encoder or parameters.lora_rank > 0
        with local_metrics(self), frozen_statistics(self.encoder, active=still):
            if not feedback.exact_supervision:
                return super().training_step(batch, batch_nb)
            budget = feedback.config.feedback.memory_budget_mb
            return exact_supervised_step(self, heads_of(self, memory_budget_mb=budget), batch)

    def _output(self, output: dict[str, Any], loss: LossSum) -> dict[str, Any]:
        """The step's loss and metrics over the rows of all ranks."""
        metrics, total = loss.joined_metrics(), loss.total()
        output["loss"] = zero_grad_for_unused(self) if total is None else total
        if num_ranks() > 1:
            output["loss"] = output["loss"] + zero_grad_for_unused(self)
        # As NeMo's steps do; exp_manager's checkpoints are ordered by it.
        output["log"].setdefault("global_step", torch.tensor(float(self.trainer.global_step)))
        output["log"].update({f"feedback/{name}": value for name, value in metrics.items()})
        if "reward_policy" in metrics:
            self.log("reward", metrics["reward_policy"], prog_bar=True, logger=False)
        return output

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Skips a step with a gradient that is not finite, or with none at all as nothing could be judged.

        It does so on all ranks: their gradients are already one.
        """
        super().on_before_optimizer_step(optimizer)
        if self._feedback is None:
            return
        ids, self._in_step = self._in_step, ()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        if bool(torch.isfinite(norm)):
            self.nonfinite_steps = 0
            if float(norm) > 0:
                return
        else:
            self.nonfinite_steps += 1
            names = ", ".join(name for part in ids for name in self._feedback.reader.names(part))
            logging.warning(
                f"step {self.trainer.global_step}: a gradient is not finite; the step is skipped. "
                f"Its utterances: {', '.join(gather(names))}."
            )
        # No gradient rather than a zero one: Adam's momentum would still move the weights.
        for parameter in self.parameters():
            parameter.grad = None

    # ------------------------------------------------------------------------------------------ before the first step

    def setup_feedback(self, cfg: Any, *, work_dir: str | Path | None = None, reward: Reward | None = None) -> None:
        """Checks the configuration and the data, and prepares training; call once, before ``trainer.fit``.

        Args:
            cfg: the settings of the command ``adapt`` (``compose_config``), as mapping or OmegaConf config.
            work_dir: folder for staged manifests, scores and logs; a temporary one if None.
            reward: judges hypotheses in place of what the section ``reward`` names.

        Raises:
            FeedbackError: whatever is wrong with the settings, the manifests or the LLM, before any work.
        """
        self._setup, self._feedback = build_setup(self, cfg, work_dir=work_dir, judge=reward), None
        check_generations(self._setup.config, self._trainer)

    def configure_callbacks(self) -> list[Any]:
        """Logs, held-out metrics and guards; Lightning adds them to the trainer's when training starts."""
        return [*super().configure_callbacks(), *(callbacks_of(self._setup) if self._setup is not None else [])]

    def on_fit_start(self) -> None:
        """Measures the pool on this rank's device, and takes the learning rate by trial where none is given."""
        super().on_fit_start()
        if self._setup is None:
            return
        check_precision(getattr(self.trainer, "precision", None))
        check_starts(self.trainer.ckpt_path)
        with evaluation_mode(self), self.run_precision():
            self._feedback = start(self, self._setup, self.encoded_pool, self._resumed)
        if self._resumed:
            self._feedback.load_nbest(self._resumed, rank=self.global_rank)
        self._feedback = try_rates(self, self._feedback)
        self._write_statistics()

    def begin_generation(self) -> None:
        """Makes the model as it is now the teacher of the rest of the run, with an optimizer and a schedule anew.

        Raises:
            TrainingError, RewardError: the new teacher's groups have no signal; the old one stays.
        """
        with evaluation_mode(self), self.run_precision():
            self._feedback = next_generation(self, self.feedback_setup, self.feedback, self.encoded_pool())
        self.trainer.strategy.setup_optimizers(self.trainer)
        self._write_statistics()

    def configure_optimizers(self) -> Any:
        """NeMo's optimizer and schedule, which runs over the steps of a generation."""
        if self._setup is None or self._setup.config.feedback.generations == 1:
            return super().configure_optimizers()
        check_generations(self._setup.config, self.trainer)
        loop = self.trainer.fit_loop.epoch_loop  # NeMo reads the schedule's length there
        with mock.patch.object(loop, "max_steps", self._setup.generation_steps(loop.max_steps)):
            return super().configure_optimizers()

    def _write_statistics(self) -> None:
        if self.feedback.statistics is not None and is_global_rank_zero():
            write_json(self.feedback_setup.work_dir / STATISTICS_FILE, asdict(self.feedback.statistics))

    def pool_batches(self) -> Iterator[Any]:
        """NeMo's batches of this rank's share of the training data, by a loader for this purpose."""
        settings = self.feedback_setup.train_ds
        # NeMo's Lhotse loader repeats several manifests and tarred data for ever, unless it is told to end, and every
        # worker reads all of tarred data.
        once: dict[str, Any] = {"force_finite": True, "max_open_streams": None} if settings.get("use_lhotse") else {}
        once |= {"num_workers": 0} if once and settings.get("tarred_audio_filepaths") else {}
        loader = self._setup_dataloader_from_config(OmegaConf.merge(settings, once))
        self.feedback_setup.reader.attach(loader)
        yield from map(self._here, pool_share(loader, rank=self.global_rank))

    def _here(self, batch: Any) -> list[Any]:
        return [item.to(self.device) if isinstance(item, Tensor) else item for item in batch]

    @torch.no_grad()
    def encoded_pool(
        self,
        batches: Iterable[Any] | None = None,
        *,
        unless: Callable[[str], bool] | None = None,
        refresh: int | None = None,
    ) -> Iterator[EncodedAudio]:
        """The unlabeled rows of batches, or of :meth:`pool_batches`, encoded; the caller sets evaluation mode.

        Args:
            batches: as NeMo's loader gives them.
            unless: says by an utterance's name whether its row is left out.
            refresh: for which they are encoded; None = this step's.
        """
        for batch in self.pool_batches() if batches is None else batches:
            audio = self.feedback_setup.reader.split(self._here(batch)).unlabeled
            rows = [b for b, name in enumerate(audio.utterances) if not (unless and unless(name))] if audio else []
            if audio is not None and rows:
                part = EncodedAudio(audio, *self._encode(audio, refresh=refresh))
                yield part if len(rows) == len(audio.utterances) else part.select(rows)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Scores the whole pool at the start of each refresh where the LLM works between the steps."""
        super().on_train_batch_start(batch, batch_idx)
        feedback = self._feedback
        if feedback is None or not feedback.config.scores_in_phases:
            return
        refresh = self._refresh()
        if feedback.cache.filled == refresh:
            return
        with torch.random.fork_rng(), evaluation_mode(self), self.run_precision(), torch.no_grad():
            torch.manual_seed(refresh)
            fill_cache(feedback, self.encoded_pool(), refresh=refresh)

    def run_precision(self) -> Any:
        """The context of the run's precision, for what is computed outside of Lightning's steps: what is measured is
        what is trained."""
        return self.trainer.precision_plugin.forward_context()

    def look_ahead(self, refresh: int | None = None) -> list[int] | None:
        """The attention context of this step, of a streaming checkpoint that has several; None for others.

        Drawn per step; per refresh, this step's if None, where the loss compares log p with that of the step that
        proposed.
        """
        if self.feedback_setup.config.on_policy:
            return draw_look_ahead(self.encoder, self._refresh() if refresh is None else refresh)
        step = int(self.trainer.global_step) if self._trial_step is None else self._trial_step
        return draw_look_ahead(self.encoder, step)

    def _refresh(self) -> int:
        """Index of the refresh of hypotheses that this step belongs to."""
        return int(self.trainer.global_step) // self.feedback_setup.config.feedback.refresh_every

    @classmethod
    def stock(cls) -> type:
        """The stock NeMo class behind this one, whose name is written into every ``.nemo``."""
        return cls.__mro__[cls.__mro__.index(LLMFeedbackMixin) + 1]

    @property
    def feedback_setup(self) -> FeedbackSetup:
        """What ``setup_feedback`` built.

        Raises:
            TrainingError: it was not called.
        """
        if self._setup is None:
            raise TrainingError("feedback is not set up: call model.setup_feedback(cfg) first.")
        return self._setup

    @property
    def feedback(self) -> Feedback:
        """What training uses, from its start on.

        Raises:
            TrainingError: it has not started.
        """
        if self._feedback is None:
            raise TrainingError("feedback has not started: call model.setup_feedback(cfg), then trainer.fit(model).")
        return self._feedback

    @contextmanager
    def training_with(self, feedback: Feedback) -> Iterator[None]:
        """Inside this context the model trains with another state, for trials."""
        before, self._feedback = self._feedback, feedback
        try:
            yield
        finally:
            self._feedback, self.nonfinite_steps, self._trial_step = before, 0, None

    def set_training_data(self, nemo_ds: Any, *, shown: Any, shuffle: bool) -> Any:
        """Gives the model a training loader that a resumed run can take up in its middle.

        Args:
            nemo_ds: NeMo's settings of the loader.
            shown: settings for the exported file, with the user's paths: the staged ones are gone when it is read.
            shuffle: whether the classic loader shuffles.

        Returns:
            NeMo's loader.
        """
        share = self._trainer.limit_train_batches if self._trainer is not None else 1
        if nemo_ds.get("use_lhotse") and isinstance(share, float):
            # NeMo asks a stream for its length, which it has not, where this is a share; Lightning takes all of it.
            self._trainer.limit_train_batches = 1
            self.setup_training_data(nemo_ds)
            self._trainer.limit_train_batches = share
        else:
            self.setup_training_data(nemo_ds)
        loader = self._train_dl
        self._train_dl = resumable(loader, rank=self.global_rank, num_ranks=self.world_size, shuffle=shuffle)
        self._update_dataset_config("train", shown)
        return loader

    # -------------------------------------------------------------------------------------------- checkpoints and end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs: the kept hypotheses and the pool's statistics, as plain data."""
        super().on_save_checkpoint(checkpoint)
        if self._feedback is not None:
            learned = self._feedback.config.parameters
            lora = {"rank": learned.lora_rank, "alpha": learned.lora_alpha}
            checkpoint[CHECKPOINT_KEY] = {**self._feedback.to_plain(), "base": self._source_path, "lora": lora}
            count_finished_batch(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what :meth:`on_save_checkpoint` stored."""
        super().on_load_checkpoint(checkpoint)
        if self._setup is not None and CHECKPOINT_KEY in checkpoint:
            self._resumed = checkpoint[CHECKPOINT_KEY]
            if isinstance(self._train_dl, ResumableLoader):
                epoch, batches = place_in_data(checkpoint)
                self._train_dl.start_at(epoch=epoch, batches=batches)

    def on_train_start(self) -> None:
        """Takes up the random states of a checkpoint; what ran before this drew from others."""
        super().on_train_start()
        if self._feedback is not None and self._resumed:
            self._feedback.load_random(self._resumed, rank=self.global_rank)
            self._resumed = None

    def on_train_end(self) -> None:
        """Puts the weights in place that the run gives; all callbacks, and so the last checkpoint, are done by now."""
        super().on_train_end()
        for callback in self.trainer.callbacks:
            if isinstance(callback, HeldOutEarlyStopping):
                callback.finish(self.trainer, self)

    def save_to(self, save_path: str) -> None:
        """Writes a plain ``.nemo``: stock class, stock weights; a failed save leaves the file that was there."""
        stock = self.stock()
        with stock_config(self, target=f"{stock.__module__}.{stock.__name__}", facts=self._adaptation_facts):
            if not is_global_rank_zero():
                super().save_to(save_path)
                return
            with atomic_path(save_path) as temporary, merged(self):
                super().save_to(temporary)
