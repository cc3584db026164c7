"""Makes the N-best lists of some rows with their rewards, as ``adapt`` would make them, without training."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_llm_feedback.asr.checkpoints import supported_class
from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.options import torch_device
from nemo_llm_feedback.core.config import parse_run_config
from nemo_llm_feedback.core.console import progress, quiet
from nemo_llm_feedback.core.errors import ManifestError, list_faults
from nemo_llm_feedback.data.manifests import read_manifest, spread
from nemo_llm_feedback.evaluation.entities import row_entities
from nemo_llm_feedback.hypotheses.maker import judged
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.scored_nbest import scored_nbest
from nemo_llm_feedback.hypotheses.trust import Trust
from nemo_llm_feedback.llm import open_llm
from nemo_llm_feedback.rewards import Reward, corrector_from_config, reward_from_config
from nemo_llm_feedback.training.inputs import readable
from nemo_llm_feedback.training.models import locate, restore
from nemo_llm_feedback.training.setup import check_judges, warn_of_external, warn_of_terms


class NBestProbe:
    """Rows, recogniser and reward; checked when it is made, loaded when it is needed.

    Args:
        model: ``.nemo`` file or pretrained name.
        manifest: NeMo manifest, with text or without.
        cfg: a composed configuration.
        utterances: rows that are taken, spread evenly over the manifest; 0 = all.
        batch_size: utterances per batch of the recogniser.
        device: where the recogniser runs, ``auto`` = a GPU if there is one.

    Attributes:
        config: the plugin's sections.
        rows: those that are taken.
        total: rows of the manifest.
        scorer: the LLM, whose weights wait for the first score that the cache lacks; None where none is needed.
        reward: the reward that the configuration names.
        batch_size: utterances per batch of the recogniser.

    Raises:
        ConfigError, LLMError, RewardError, ManifestError, CheckpointError: the message names the fix.
    """

    @quiet()
    def __init__(
        self,
        model: str | Path,
        manifest: str | Path,
        cfg: DictConfig,
        *,
        utterances: int = 10,
        batch_size: int = 16,
        device: str = "auto",
    ) -> None:
        self.config = config = parse_run_config(cfg)
        check_judges(config, None)
        self._checkpoint, self._device = locate(model), torch_device(device)
        supported_class(read_config(self._checkpoint), origin=self._checkpoint)
        all_rows = read_manifest(manifest)
        self.total, self.rows = len(all_rows), readable(spread(all_rows, utterances), manifest)
        if config.reward.needs_text and not all(row.text for row in self.rows):
            bare = [row.origin for row in self.rows if not row.text]
            raise ManifestError(list_faults(f"reward={config.reward.name} needs the `text` of these rows:", bare))
        row_entities([row for row in self.rows if row.text])  # raises for what could not be scored after all the work
        self.batch_size = batch_size
        self.scorer = open_llm(config.llm) if config.needs_llm and config.llm is not None else None
        self.reward: Reward = reward_from_config(config, self.scorer)

    @functools.cached_property
    def model(self) -> Any:
        """The recogniser, on its device."""
        model = restore(self._checkpoint, map_location=self._device).eval()
        vocabulary = heads_of(model)[0].vocabulary
        listed = [*self.config.context.load().terms, *(term for row in self.rows for term in row.context.terms)]
        warn_of_terms(listed, vocabulary)
        warn_of_external(self.rows, vocabulary, self.config.proposals, self.config.feedback.normalizer)
        return model

    def nbest(self) -> NBestBatch:
        """The N-best of every row, in the rows' order, judged by the reward."""
        corrector = corrector_from_config(self.config, self.scorer) if self.config.proposals.llm_correction else None
        with progress("N-best", len(self.rows)) as on_batch:
            return scored_nbest(
                self.model,
                self.rows,
                config=self.config,
                reward=self.reward,
                corrector=corrector,
                batch_size=self.batch_size,
                on_batch=on_batch,
            )

    def llm_line(self) -> str:
        """Whether the LLM was needed at all, and which share of the scores so far the cache knew."""
        if self.scorer is None:
            return "no LLM in this reward"
        loaded = f"{self.scorer.memory_bytes / 2**20:.0f} MB"
        use = loaded if self.scorer.loaded else "not loaded: every score was in the cache"
        hit_rate = float(getattr(self.reward, "hit_rate", math.nan))
        hits = f"; cache hit rate {100 * hit_rate:.1f} %" if hit_rate == hit_rate else ""
        return f"{self.scorer.identity} ({use}){hits}"


def judged_by(reward: Reward, nbest: NBestBatch, trust: Trust | None, *, texts: Sequence[str] = ()) -> NBestBatch:
    """The same N-best judged by another reward, or with another trust in other recognisers.

    Args:
        reward: judges.
        nbest: B utterances.
        trust: in other recognisers; None = their texts are members like any.
        texts: B normalised transcripts, for a reward that reads them.
    """
    return judged(nbest.utterances, nbest.contexts, nbest.hypotheses, nbest.ref_logp, reward, trust, texts=texts)


def greedy_members(nbest: NBestBatch) -> list[int]:
    """Per utterance the member that the recogniser alone would give: the first, greedy; of samples the likeliest."""
    (ref_logp, *_) = nbest.ref_logp.values()
    likeliest = ref_logp.argmax(dim=1).tolist()
    sampled = [all(member.source == "samples" for member in row) for row in nbest.hypotheses]
    return [n if only_samples else 0 for n, only_samples in zip(likeliest, sampled, strict=True)]
