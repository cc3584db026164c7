"""The mixin that adds the feedback loss to a NeMo model. ``training_step`` and ``feedback_loss`` are the main path."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nemo.utils.get_rank import is_global_rank_zero
from torch import Tensor

from nemo_llm_feedback.checkpoints import atomic_path, stock_config
from nemo_llm_feedback.errors import TrainingError
from nemo_llm_feedback.groups import Audio, ScoredGroup
from nemo_llm_feedback.heads import heads_of
from nemo_llm_feedback.losses import group_loss, group_metrics
from nemo_llm_feedback.preparation import FeedbackState, prepare, start
from nemo_llm_feedback.reference import encode, evaluation_mode
from nemo_llm_feedback.supervision import exact_supervised_step, pseudo_labelled_batch
from nemo_llm_feedback.trie import PrefixTrie

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
            start(self, self._feedback)

    def training_step(self, batch: Any, batch_nb: int) -> dict[str, Any]:
        """Labelled rows through NeMo's own step, unlabeled rows through the feedback loss."""
        state = self._feedback
        if state is None:
            return super().training_step(batch, batch_nb)
        if state.config.feedback.weight == 0:
            return self._supervised_step(tuple(batch[:4]), batch_nb)
        labelled, unlabeled = state.reader.split(batch)
        if unlabeled is None:
            return self._supervised_step(labelled, batch_nb)
        output: dict[str, Any] = {"loss": torch.zeros((), device=self.device), "log": {}}
        if labelled is None:
            # As NeMo's own steps do; exp_manager's checkpoints are ordered by it.
            output["log"]["global_step"] = torch.tensor(float(self.trainer.global_step))
        if labelled is not None and state.config.feedback.supervised_weight > 0:
            output = {"log": {}, **self._supervised_step(labelled, batch_nb)}
            output["loss"] = output["loss"] * state.config.feedback.supervised_weight
        loss, metrics = self.feedback_loss(unlabeled, batch_nb)
        output["loss"] = output["loss"] + state.config.feedback.weight * loss
        output["log"].update({f"feedback/{name}": value for name, value in metrics.items()})
        if "reward_policy" in metrics:
            self.log("reward", float(metrics["reward_policy"]), prog_bar=True, logger=False)
        return output

    def feedback_loss(self, audio: Audio, batch_nb: int = 0) -> tuple[Tensor, dict[str, Any]]:
        """The feedback loss of unlabeled rows: encode, propose, reward, exact log p, objective.

        Args:
            audio: the unlabeled rows.
            batch_nb: handed to NeMo's step by augmented self-training.

        Returns:
            Scalar loss with gradient, and its metrics.
        """
        state = self._state()
        config = state.config
        with evaluation_mode(self):
            encoded, lengths = encode(self, audio.signal, audio.signal_len)
            groups = state.maker.get(audio, encoded, lengths, round=self._round())
            if config.objective.name == "self_training" and config.objective.augment:
                logp = None
            else:
                logp = {h.name: self._group_logp(h, encoded, lengths, groups) for h in state.heads}
        if logp is None:
            state.last_groups = groups
            batch, found = pseudo_labelled_batch(config.objective, audio, groups, head=state.heads[0].name)
            return self._supervised_step(batch, batch_nb)["loss"] if batch else encoded.sum() * 0, dict(found)
        total = torch.zeros((), device=self.device)
        metrics: dict[str, Any] = {}
        for head, weight in state.head_weights.items():
            groups = self._with_old_logp(groups, logp[head], head)
            result = group_loss(config.objective, logp[head], groups, head=head)
            total = total + weight * result.loss
            prefix = "" if head == state.heads[0].name else f"{head}/"
            metrics.update({prefix + name: value for name, value in result.metrics.items()})
        state.last_groups = groups
        metrics.update(group_metrics(groups, logp[state.heads[0].name], head=state.heads[0].name))
        return total, metrics

    def _supervised_step(self, batch: Any, batch_nb: int) -> dict[str, Any]:
        """NeMo's own step; for TDT on the CPU, where NeMo has no loss, the exact likelihood in its place."""
        state = self._state()
        if state.exact_supervision:
            return exact_supervised_step(self, heads_of(self), batch, state.config.feedback.memory_budget_mb)
        return super().training_step(batch, batch_nb)

    def _group_logp(self, head: Any, encoded: Tensor, lengths: Tensor, groups: list[ScoredGroup]) -> Tensor:
        """[B, N] policy log p of every member with gradient, on the prefix trie; −inf on padding."""
        labels = [list(h.tokens) for g in groups for h in g.group.hypotheses]
        rows = [b for b, g in enumerate(groups) for _ in g.group.hypotheses]
        trie = PrefixTrie.build(labels, rows).to(encoded.device)
        flat = head.log_prob(encoded, lengths, trie, memory_budget_mb=self._state().config.feedback.memory_budget_mb)
        sizes = [len(g.group) for g in groups]
        padded = flat.new_full((len(groups), max(sizes)), float("-inf"))
        columns = torch.tensor([n for size in sizes for n in range(size)], device=flat.device)
        return padded.index_put((torch.tensor(rows, device=flat.device), columns), flat)

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
            checkpoint[CHECKPOINT_KEY] = {**self._feedback.to_plain(), "base": self._source_path}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back what :meth:`on_save_checkpoint` stored."""
        super().on_load_checkpoint(checkpoint)
        if self._feedback is not None and CHECKPOINT_KEY in checkpoint:
            self._feedback.load_plain(checkpoint[CHECKPOINT_KEY])

    def save_to(self, save_path: str) -> None:
        """Writes a plain ``.nemo``: stock class, stock weights; a failed save leaves the file that was there."""
        with stock_config(self, target=self.stock_target, facts=self._adaptation_facts):
            if not is_global_rank_zero():
                super().save_to(save_path)
                return
            with atomic_path(save_path) as temporary:
                super().save_to(temporary)
