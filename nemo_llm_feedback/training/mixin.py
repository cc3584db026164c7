"""The mixin that adds the feedback loss to a NeMo model. ``training_step`` and ``feedback_loss`` are the main path."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from torch import Tensor

from nemo_llm_feedback.asr.checkpoints import atomic_path, stock_config
from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.lora import merged
from nemo_llm_feedback.asr.reference import encode, evaluation_mode, frozen_statistics, recomputed_layers
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.data.resumable_loader import ResumableLoader
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.training.distributed import (
    Report,
    Together,
    join_metrics,
    local_metrics,
    num_ranks,
    shares,
    touch_all,
)
from nemo_llm_feedback.training.losses import Term, group_loss, group_metrics, total
from nemo_llm_feedback.training.replay_kl import anchor_terms
from nemo_llm_feedback.training.resume import count_finished_batch, place_in_data
from nemo_llm_feedback.training.setup import FeedbackState, check_starts, prepare, start
from nemo_llm_feedback.training.supervision import exact_supervised_step, pseudo_labelled_batch
from nemo_llm_feedback.training.survey import fill_round

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

CHECKPOINT_KEY = "nemo_llm_feedback"


class LLMFeedbackMixin(_Base):
    """Put in front of a NeMo ASR class: rows without text are learned from feedback, rows with text as NeMo does.

    ``setup_feedback`` switches it on; until then, and in batches whose rows all have text, the model is the stock one,
    bit for bit.
    """

    stock_target: str
    """Dotted path of the stock class, written into every ``.nemo``."""

    _feedback: FeedbackState | None = None
    _adaptation_facts: dict[str, Any] | None = None
    _source_path: str = ""

    nonfinite_steps: int = 0
    """Optimizer steps in a row, up to now, that were skipped because a gradient was not finite."""

    def setup_feedback(self, cfg: Any, *, work_dir: str | Path | None = None) -> None:
        """Checks the configuration and the data, and prepares training; call once, before ``trainer.fit``.

        Args:
            cfg: mapping or OmegaConf config with ``model.train_ds`` and the plugin's sections.
            work_dir: folder for staged manifests and scores; a temporary one if None.

        Raises:
            FeedbackError: whatever is wrong with the settings, the manifests or the LLM, before any work.
        """
        self._feedback = prepare(self, cfg, work_dir=work_dir)

    def on_fit_start(self) -> None:
        """Places the frozen reference and the LLM on this rank's device and measures the pool."""
        super().on_fit_start()
        if self._feedback is not None:
            check_starts(self.trainer.ckpt_path)
            start(self, self._feedback)

    def training_step(self, batch: Any, batch_nb: int) -> dict[str, Any]:
        """Labelled rows through NeMo's own step, unlabeled rows through the feedback loss, anchored rows held."""
        state = self._feedback
        if state is None:
            return super().training_step(batch, batch_nb)
        if state.config.feedback.weight == 0 and not state.reader.anchors:
            return self._supervised_step(tuple(batch[:4]), batch_nb)
        labelled, anchored, unlabeled = state.reader.split(batch)
        if unlabeled is None and anchored is None and num_ranks() == 1:
            return self._supervised_step(labelled, batch_nb)
        output: dict[str, Any] = {"log": {}}
        with Together() as ranks:
            terms: dict[str, Term] = {}
            metrics: dict[str, Any] = {}
            counts: dict[str, float] = {}
            if anchored is not None:
                terms, metrics = anchor_terms(self, state, anchored)
                counts = dict.fromkeys(metrics, len(anchored[1]))
            if labelled is not None and (unlabeled is None or state.config.feedback.supervised_weight > 0):
                output = {"log": {}, **self._supervised_step(labelled, batch_nb)}
                terms["supervised"] = Term(output["loss"], len(labelled[1]), state.config.feedback.supervised_weight)
            if unlabeled is not None and state.config.feedback.weight > 0:
                found, own_metrics, own_counts = self.feedback_loss(unlabeled, batch_nb)
                metrics, counts = metrics | own_metrics, counts | own_counts
                weight = state.config.feedback.weight
                terms |= {name: dataclasses.replace(term, weight=weight * term.weight) for name, term in found.items()}
            rows = len(unlabeled.utterances) if unlabeled is not None else 0
            plain = {name: float(value) for name, value in metrics.items()}
            ranks.mine = Report({name: term.count for name, term in terms.items()}, plain, counts, rows)
        return self._joined(output, terms, ranks)

    def _joined(self, output: dict[str, Any], terms: dict[str, Term], ranks: Together) -> dict[str, Any]:
        """The step's loss and metrics over the rows of all ranks."""
        metrics = join_metrics(ranks.all)
        if not any(report.rows for report in ranks.all):
            # A batch in which every row has text counts as NeMo counts it, whatever the weight of replay.
            terms = {n: dataclasses.replace(t, weight=1.0) if n == "supervised" else t for n, t in terms.items()}
        # Where the feedback has no weight, a batch of unlabeled rows alone has no term.
        output["loss"] = total(terms, shares(ranks.mine, ranks.all)) if terms else touch_all(self)
        if num_ranks() > 1:
            output["loss"] = output["loss"] + touch_all(self)
        # As NeMo's own steps do; exp_manager's checkpoints are ordered by it.
        output["log"].setdefault("global_step", torch.tensor(float(self.trainer.global_step)))
        output["log"].update({f"feedback/{name}": value for name, value in metrics.items()})
        if "reward_policy" in metrics:
            self.log("reward", metrics["reward_policy"], prog_bar=True, logger=False)
        return output

    def on_after_backward(self) -> None:
        """Skips a step with a gradient that is not finite, on all ranks (their gradients are already one)."""
        super().on_after_backward()
        if self._feedback is None:
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        if bool(torch.isfinite(norm)):
            self.nonfinite_steps = 0
            return
        self.nonfinite_steps += 1
        logging.warning(f"step {self.trainer.global_step}: a gradient is not finite; the step is skipped.")
        # No gradient rather than a zero one: Adam's momentum would still move the weights.
        for parameter in self.parameters():
            parameter.grad = None

    def feedback_loss(
        self, audio: Audio, batch_nb: int = 0
    ) -> tuple[dict[str, Term], dict[str, Any], dict[str, float]]:
        """The feedback loss of unlabeled rows: encode, propose, reward, exact log p, objective.

        Args:
            audio: the unlabeled rows.
            batch_nb: handed to NeMo's step by augmented self-training.

        Returns:
            The terms of the loss with gradient (see ``losses.total``), its metrics, and the number of groups of those
            metrics that are means over other than all rows.
        """
        state = self._state()
        config = state.config
        self._fill_round()
        with evaluation_mode(self):
            augment = config.feedback.augment
            with recomputed_layers(self.encoder, active=config.parameters.recompute_encoder):
                with torch.set_grad_enabled(torch.is_grad_enabled() and not augment):
                    encoded, lengths = encode(self, audio.signal, audio.signal_len)
                groups = state.maker.get(audio, encoded, lengths, round=self._round())
                if augment:
                    encoded, lengths = encode(self, audio.signal, audio.signal_len, augment=True)
            if config.objective.name == "self_training" and config.objective.augment:
                logp = None
            else:
                logp = {h.name: self._group_logp(h, encoded, lengths, groups) for h in state.heads}
        if logp is None:
            state.last_groups = groups
            batch, found = pseudo_labelled_batch(config.objective, audio, groups, head=state.heads[0].name)
            with frozen_statistics(self, active=config.parameters.freeze_batchnorm):
                loss = self._supervised_step(batch, batch_nb)["loss"] if batch else encoded.sum() * 0
            return {"pseudo_labels": Term(loss, len(batch[1]) if batch else 0)}, dict(found), {}
        terms: dict[str, Term] = {}
        metrics: dict[str, Any] = {}
        counts: dict[str, float] = {}
        for head, weight in state.head_weights.items():
            groups = self._with_old_logp(groups, logp[head], head)
            result = group_loss(config.objective, logp[head], groups, head=head)
            for name, term in result.terms.items():
                terms[f"{head}/{name}"] = dataclasses.replace(term, weight=weight * term.weight)
            prefix = "" if head == state.heads[0].name else f"{head}/"
            metrics.update({prefix + name: value for name, value in result.metrics.items()})
            counts.update({prefix + name: count for name, count in result.metric_counts.items()})
        state.last_groups = groups
        metrics.update(group_metrics(groups, logp[state.heads[0].name], head=state.heads[0].name))
        hit_rate = float(getattr(state.maker.reward, "hit_rate", float("nan")))
        if hit_rate == hit_rate:
            metrics["cache_hit_rate"] = hit_rate
        return terms, metrics, counts

    def _supervised_step(self, batch: Any, batch_nb: int) -> dict[str, Any]:
        """NeMo's own step; for TDT on the CPU, where NeMo has no loss, the exact likelihood in its place."""
        state = self._state()
        if state.exact_supervision:
            budget = state.config.feedback.memory_budget_mb
            return exact_supervised_step(self, heads_of(self, memory_budget_mb=budget), batch)
        with local_metrics(self):
            return super().training_step(batch, batch_nb)

    def _group_logp(self, head: Any, encoded: Tensor, lengths: Tensor, groups: list[ScoredGroup]) -> Tensor:
        """[B, N] policy log p of every member with gradient, on the prefix trie; −inf on padding."""
        labels = [[h.tokens for h in g.group.hypotheses] for g in groups]
        scores: Tensor = head.score(encoded, lengths, labels)
        return scores

    def _with_old_logp(self, groups: list[ScoredGroup], logp: Tensor, head: str) -> list[ScoredGroup]:
        """Groups that are new remember the log p of the policy that proposed them (for ratios)."""
        out = []
        for b, scored in enumerate(groups):
            if head not in scored.old_logp:
                old = {**scored.old_logp, head: logp[b, : len(scored.group)].detach().tolist()}
                scored = dataclasses.replace(scored, old_logp=old)
                self._state().maker.kept[scored.group.utterance] = scored
            out.append(scored)
        return out

    def _fill_round(self) -> None:
        """Scores the whole pool where the LLM has a phase of its own."""
        state, number = self._state(), self._round()
        if state.config.scores_in_phases and state.filled_round != number:
            fill_round(self, state, round=number)
            state.filled_round = number

    def _round(self) -> int:
        return int(self.trainer.global_step) // self._state().config.feedback.refresh_every

    def _state(self) -> FeedbackState:
        if self._feedback is None:
            raise TrainingError("feedback is not set up: call model.setup_feedback(cfg) first.")
        return self._feedback

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs: the kept groups and the measured scales, as plain data."""
        super().on_save_checkpoint(checkpoint)
        if self._feedback is not None:
            learned = self._feedback.config.parameters
            lora = {"rank": learned.lora_rank, "alpha": learned.lora_alpha}
            checkpoint[CHECKPOINT_KEY] = {**self._feedback.to_plain(), "base": self._source_path, "lora": lora}
            count_finished_batch(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what :meth:`on_save_checkpoint` stored."""
        super().on_load_checkpoint(checkpoint)
        if self._feedback is not None and CHECKPOINT_KEY in checkpoint:
            self._feedback.load_plain(checkpoint[CHECKPOINT_KEY], rank=self.global_rank)
            if isinstance(self._train_dl, ResumableLoader):
                epoch, batches = place_in_data(checkpoint)
                self._train_dl.start_at(epoch=epoch, batches=batches)

    def on_train_start(self) -> None:
        """Takes up the random states of a checkpoint; what ran before this drew from others."""
        super().on_train_start()
        if self._feedback is not None:
            self._feedback.restore_random(rank=self.global_rank)

    def save_to(self, save_path: str) -> None:
        """Writes a plain ``.nemo``: stock class, stock weights; a failed save leaves the file that was there."""
        with stock_config(self, target=self.stock_target, facts=self._adaptation_facts):
            if not is_global_rank_zero():
                super().save_to(save_path)
                return
            with atomic_path(save_path) as temporary, merged(self):
                super().save_to(temporary)
