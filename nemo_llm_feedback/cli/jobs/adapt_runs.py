"""The adapt job for one run, or for several that differ in their seed and of whose weights the mean is exported."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.jobs.adapt import AdaptResult, adapt
from nemo_llm_feedback.cli.jobs.export import export
from nemo_llm_feedback.cli.jobs.inputs import changed_inputs, input_digests
from nemo_llm_feedback.cli.jobs.run_choice import inputs_of, settings_text
from nemo_llm_feedback.cli.jobs.runs import list_runs, runs_text
from nemo_llm_feedback.cli.jobs.start import source
from nemo_llm_feedback.core.config import RunConfig, parse_run_config
from nemo_llm_feedback.core.console import quiet, show
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.run_folder import RESULT_FILE, SETTINGS_FILE, newest
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.model_card import write_model_card
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.tables import build_table, table_metrics
from nemo_llm_feedback.evaluation.transcribe import transcribe_rows
from nemo_llm_feedback.rewards import Reward
from nemo_llm_feedback.training.inputs import labelled_rows
from nemo_llm_feedback.training.models import restore


@dataclass(frozen=True)
class AveragedRuns:
    """The mean of several runs.

    Attributes:
        nemo: path of the ``.nemo`` with the mean of their weights.
        runs: their folders, in the order of the seeds.
        before, after: validation set → scores of the base and of the mean; empty without a validation manifest.
    """

    nemo: Path
    runs: tuple[Path, ...]
    before: dict[str, CorpusScores]
    after: dict[str, CorpusScores]


def adapt_runs(cfg: DictConfig, *, reward: Reward | None = None) -> AdaptResult | AveragedRuns:
    """Trains once, or ``runs`` times with the seeds ``seed``, ``seed + 1`` … and averages the weights.

    Each run has a folder of its own beside the others. The same command after an interruption takes finished runs as
    they are and goes on with the unfinished one.

    Args:
        cfg: a composed configuration.
        reward: judges hypotheses in place of what the section ``reward`` names.

    Raises:
        FeedbackError: settings, manifests, checkpoint or LLM cannot be used; raised before any training.
    """
    config = parse_run_config(cfg if reward is None else {**_plain(cfg), "reward": {"name": "python"}})
    if cfg.get("output") and Path(cfg.output).expanduser().is_dir():
        raise ConfigError(f"output={cfg.output} is a folder: give the name of a file in it, e.g. adapted.nemo.")
    if cfg.get("runs", 1) == 1:
        return adapt(cfg, reward=reward)
    if str(cfg.trainer.get("devices", 1)).strip("[]") not in ("0", "1") or cfg.trainer.get("num_nodes", 1) != 1:
        raise ConfigError(
            f"runs={cfg.runs} trains on one device, one run after the other: set trainer.devices=1, or give a command "
            "per seed (runs=1 seed=1 …) and average them with `nemo-llm-feedback export`."
        )
    base = source(cfg)
    target = Path(cfg.output or Path(cfg.exp_manager.get("exp_dir") or ".") / f"{cfg.name}_mean.nemo").expanduser()
    validation = labelled_rows(cfg.model.validation_ds.get("manifest_filepath"))
    parts = [_one(cfg, seed) for seed in range(cfg.seed, cfg.seed + cfg.runs)]
    inputs = input_digests(_plain(cfg), base=base, llm=config.needs_llm)
    files = []
    for number, part in enumerate(parts, 1):
        finished = _finished(part, inputs)
        with quiet():
            state = "has finished and is taken as it is" if finished else "begins"
            show(f"\nrun {number} of {cfg.runs}, with the seed {part.seed}, {state}")
        files.append(finished or adapt(part, reward=reward).nemo)
    with quiet():
        export(files, output=target)
        size = int(cfg.evaluate_batch_size)
        before, after = (_scores(path, validation, config, size) if validation else {} for path in (base, target))
        facts: Any = OmegaConf.to_container(read_config(target).adaptation)
        write_model_card(target, facts=facts, before=before, after=after, normalizer=config.feedback.normalizer)
    return AveragedRuns(target, tuple(file.parent for file in files), before, after)


def averaged_text(result: AveragedRuns) -> str:
    """The runs, the scores of base and mean on each validation set, and the path, for a terminal."""
    runs = [replace(list_runs(folder)[0], folder=f"{folder.parent.name}/{folder.name}") for folder in result.runs]
    lines = [runs_text(runs)]
    for name, before in result.before.items():
        systems = {"base": before, "mean": result.after[name]}
        table = build_table(systems, metrics=table_metrics(before), base="base")
        lines += [f"\n{name} ({len(before.references)} utterances):", table.to_text()]
    lines.append(f"\nmean of {len(result.runs)} runs: {result.nemo}")
    return "\n".join(lines)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    return tree


def _one(cfg: DictConfig, seed: int) -> DictConfig:
    """The settings of the run with this seed, in a folder of its own."""
    part = OmegaConf.create(_plain(cfg))
    part.seed, part.runs, part.output = seed, 1, None
    part.exp_manager.name = f"{part.exp_manager.get('name') or part.name}_seed{seed}"
    if part.exp_manager.get("explicit_log_dir"):
        part.exp_manager.explicit_log_dir = f"{part.exp_manager.explicit_log_dir}_seed{seed}"
    return part


def _finished(cfg: DictConfig, inputs: dict[str, str]) -> Path | None:
    """The ``.nemo`` of a finished run of these settings and inputs, unless ``resume=never``."""
    folder = Path(cfg.exp_manager.get("exp_dir") or "nemo_experiments") / cfg.exp_manager.name
    explicit = cfg.exp_manager.get("explicit_log_dir")
    places = [Path(explicit)] if explicit else sorted(folder.glob("*"))
    for place in places if cfg.get("resume", "auto") == "auto" else ():
        settings, result = newest(place, SETTINGS_FILE), newest(place, RESULT_FILE)
        if settings and result and settings.read_text(encoding="utf-8") == settings_text(cfg):
            if changed_inputs(inputs_of(place) or inputs, inputs):
                continue
            nemo = Path(json.loads(result.read_text(encoding="utf-8"))["nemo"])
            if nemo.is_file():
                return nemo
    return None


def _scores(path: Path, validation: Any, config: RunConfig, batch_size: int) -> dict[str, CorpusScores]:
    """Set → scores of a checkpoint's greedy transcripts."""
    model, head = restore(path, map_location="cpu"), config.feedback.heads
    context, normalizer = config.context.load(), config.feedback.normalizer
    found = {}
    for name, rows in validation.items():
        texts = transcribe_rows(model, rows, head="auto" if head == "both" else head, batch_size=batch_size)
        found[name] = score_rows(rows, texts, run_context=context, normalizer=normalizer)
    return found
