"""What ``score``, ``calibrate`` and ``tune`` share: settings from flags, rows, the model, and its scored groups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from nemo_llm_feedback.asr.checkpoints import read_config, supported_class
from nemo_llm_feedback.cli.options import ProbeOptions
from nemo_llm_feedback.core.config import RunConfig, parse_run_config
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ConfigError, LLMError, ManifestError, RewardError
from nemo_llm_feedback.data.manifests import Row, read_manifest, unreadable
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.hypotheses.scored_nbest import Corrector, NBestSettings, scored_groups
from nemo_llm_feedback.llm import LLMScorer, check_llm_folder, open_llm
from nemo_llm_feedback.rewards import Reward, corrector_from_config, reward_faults
from nemo_llm_feedback.training.models import locate, restore
from nemo_llm_feedback.training.setup import make_reward


@dataclass(frozen=True)
class Judge:
    """What judges the groups; the LLM's weights wait for the first score that the cache lacks.

    Attributes:
        scorer: the LLM, or None where none is needed.
        reward: of the configuration.
        corrector: of the proposals, if they have one.
    """

    scorer: LLMScorer | None
    reward: Reward
    corrector: Corrector | None

    @property
    def hit_rate(self) -> float:
        """Share of the scores so far that the cache knew; NaN for a reward without cache."""
        return float(getattr(self.reward, "hit_rate", float("nan")))

    def llm_line(self, hit_rate: float) -> str:
        """Whether the LLM was needed at all, and which share of the scores the cache knew."""
        if self.scorer is None:
            return "no LLM in this reward"
        loaded = f"{self.scorer.memory_bytes / 2**20:.0f} MB"
        use = loaded if self.scorer.loaded else "not loaded: every score was in the cache"
        return f"{self.scorer.identity} ({use})" + (
            f"; cache hit rate {100 * hit_rate:.1f} %" if hit_rate == hit_rate else ""
        )


@dataclass(frozen=True)
class Look:
    """Everything checked, nothing loaded.

    Attributes:
        config: of the plugin's sections.
        rows: those to look at.
        total: rows of the manifest.
        settings: how the groups are made.
        checkpoint: path of the ``.nemo``.
    """

    config: RunConfig
    rows: tuple[Row, ...]
    total: int
    settings: NBestSettings
    checkpoint: Path

    def open_judge(self) -> Judge:
        """The reward of the configuration, and its LLM, not yet loaded.

        Raises:
            LLMError, RewardError: settings or files cannot be used.
        """
        config = self.config
        scorer = open_llm(config.llm) if config.needs_llm and config.llm is not None else None
        corrector = corrector_from_config(config, scorer) if config.proposals.llm_correction else None
        return Judge(scorer, make_reward(config, scorer), corrector)

    def make_groups(self, model: Any, judge: Judge) -> list[ScoredGroup]:
        """The scored groups of the rows, in their order."""
        return scored_groups(
            model,
            self.rows,
            settings=self.settings,
            reward=judge.reward,
            corrector=judge.corrector,
            on_batch=progress("N-best", len(self.rows)),
        )

    def load_model(self) -> Any:
        """The recogniser, on the GPU if there is one."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = restore(self.checkpoint, map_location=device)
        model.eval()
        return model


def open_look(options: ProbeOptions) -> Look:
    """Checks everything that can be checked before any work.

    Raises:
        ConfigError, LLMError, RewardError, ManifestError, CheckpointError: the message names the fix.
    """
    config = _config(options)
    if config.llm is not None and config.needs_llm and (faults := check_llm_folder(config.llm)):
        raise LLMError("the LLM cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))
    if faults := reward_faults(config):
        raise RewardError("the reward cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))
    checkpoint = locate(options.checkpoint)
    supported_class(read_config(checkpoint), origin=checkpoint)
    all_rows = read_manifest(options.manifest)
    rows = spread(all_rows, options.utterances)
    bad = [reason for _, reason in unreadable(rows)]
    if bad:
        raise ManifestError(f"{len(bad)} row(s) of {options.manifest} have unreadable audio, e.g. {bad[0]}")
    settings = NBestSettings(
        proposals=config.proposals,
        run_context=config.context.load(),
        head=config.feedback.heads,
        normalizer=config.feedback.normalizer,
        batch_size=options.batch_size,
        memory_budget_mb=config.feedback.memory_budget_mb,
    )
    return Look(config, tuple(rows), len(all_rows), settings, checkpoint)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """``count`` rows at even distances, since neighbours in a manifest are often alike; all of them for 0."""
    if not 0 < count < len(rows):
        return list(rows)
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def progress(label: str, total: int) -> Callable[[int], None]:
    """A function that shows how many of ``total`` are done, on a terminal only."""

    def show(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{label}: {done}/{total}", end="\n" if done >= total else "", file=sys.stderr, flush=True)

    return show


def baseline(scored: ScoredGroup) -> int:
    """The member that the recogniser alone would give: greedy, which comes first; of samples the most probable."""
    group = scored.group
    if all(hypothesis.source == "samples" for hypothesis in group.hypotheses):
        return max(range(len(group)), key=group.ref_logp.__getitem__)
    return 0


def _config(options: ProbeOptions) -> RunConfig:
    if options.utterances < 0 or options.batch_size < 1:
        raise ConfigError(
            f"--utterances must be ≥ 0 and --batch-size ≥ 1, got {options.utterances} and {options.batch_size}."
        )
    cfg = compose_config(options.judge.overrides)
    for key, value in (
        ("llm.model", options.judge.llm),
        ("context.description", options.judge.description),
        ("context.terms_file", options.judge.terms_file),
        ("reward.alpha", options.judge.alpha),
        ("reward.beta", options.judge.beta),
        ("reward.cache", options.cache),
        ("feedback.heads", options.head),
    ):
        if value is not None:
            OmegaConf.update(cfg, key, value)
    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    return parse_run_config(tree)
