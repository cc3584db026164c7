"""The adapt job: settings → plan → before → training → plain ``.nemo`` → after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_llm_feedback import __version__
from nemo_llm_feedback.callbacks import EntityValidation, HypothesisLog, PlateauStop
from nemo_llm_feedback.checkpoints import read_config, supported_class
from nemo_llm_feedback.config import RunConfig, parse_run_config
from nemo_llm_feedback.errors import CheckpointError, ConfigError, ManifestError
from nemo_llm_feedback.evaluation import score_rows, transcribe_rows
from nemo_llm_feedback.jobs.plan import plan_text
from nemo_llm_feedback.manifests import Row, expand_paths, read_manifest, unreadable
from nemo_llm_feedback.metrics import CorpusScores
from nemo_llm_feedback.models import locate, restore
from nemo_llm_feedback.tables import build_table


@dataclass(frozen=True)
class AdaptResult:
    """What a run gave.

    Attributes:
        nemo: path of the adapted ``.nemo``.
        log_dir: folder of the run.
        before, after: validation set → scores; empty without a validation manifest.
        changed: pool rows (of those surveyed) whose greedy transcript changed, as (before, after).
    """

    nemo: Path
    log_dir: Path
    before: dict[str, CorpusScores]
    after: dict[str, CorpusScores]
    changed: list[tuple[str, str]]


def adapt(cfg: DictConfig) -> AdaptResult:
    """Runs the whole job.

    Args:
        cfg: a composed configuration (``conf/adapt.yaml``).

    Raises:
        FeedbackError: settings, manifests, checkpoint or LLM cannot be used; raised before any training.
    """
    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    config = parse_run_config(tree)
    source = _source(cfg)
    supported_class(read_config(source), origin=source)
    validation = _validation_rows(cfg)
    pl.seed_everything(int(cfg.seed), workers=True)

    model = restore(source, map_location="cpu")
    trainer = pl.Trainer(**_trainer_settings(cfg))
    log_dir = Path(exp_manager(trainer, OmegaConf.create(OmegaConf.to_container(cfg.exp_manager, resolve=True))))
    model.set_trainer(trainer)
    _prepare_model(model, cfg, validation)
    model.setup_feedback(_with_sample_rate(cfg, model), work_dir=log_dir)
    logging.info(plan_text(model, config, source=source, log_dir=log_dir))

    trainer.callbacks += [
        HypothesisLog(config.feedback.log_hypotheses_every),
        PlateauStop(config.feedback.patience_rounds, config.feedback.refresh_every),
    ]
    if validation:
        trainer.callbacks += [EntityValidation(validation, config.context.load(), config.feedback.normalizer)]
    pool = _pool_sample(model, config)
    before, pool_before = _evaluate(model, validation, cfg, config), transcribe_rows(model, pool)
    trainer.fit(model)
    reader = model._feedback.reader
    logging.info(
        f"{len(reader.seen)} different unlabeled rows were read; rows that no loader could decode are not in it."
    )
    after, pool_after = _evaluate(model, validation, cfg, config), transcribe_rows(model, pool)

    target = Path(cfg.output) if cfg.output else log_dir / f"{cfg.name}.nemo"
    model._adaptation_facts = _facts(config, source, before, after, int(trainer.global_step))
    model.save_to(str(target))
    changed = [(a, b) for a, b in zip(pool_before, pool_after, strict=True) if a != b]
    result = AdaptResult(target, log_dir, before, after, changed)
    (log_dir / "result.json").write_text(json.dumps(_result_json(result), indent=1) + "\n", encoding="utf-8")
    return result


def summary(result: AdaptResult) -> str:
    """Before and after as text: tables where there were references, else changed transcripts; and the paths."""
    lines = []
    for name, before in result.before.items():
        metrics = ["wer", "cer"] + (["ewer", "entity_recall"] if before.column("entity_words").sum() else [])
        metrics += ["false_alarms"] if before.column("term_utterances").sum() else []
        systems = {"before": before, "after": result.after[name]}
        table = build_table(systems, metrics=metrics, base="before", samples=2000, seed=0)
        lines += [f"\n{name} ({len(before.references)} utterances):", table.to_text()]
    if not result.before:
        lines.append(f"\nno validation manifest; {len(result.changed)} of the sampled pool transcripts changed, e.g.")
        lines += [f"  before: {a}\n  after:  {b}" for a, b in result.changed[:5]]
    lines.append(f"\nadapted checkpoint: {result.nemo}\nrun folder:         {result.log_dir}")
    return "\n".join(lines)


def _source(cfg: DictConfig) -> Path:
    given = [key for key in ("init_from_nemo_model", "init_from_pretrained_model") if cfg.get(key)]
    if len(given) != 1:
        raise ConfigError(
            "give exactly one of init_from_nemo_model=FILE.nemo and init_from_pretrained_model=NAME, "
            f"got {' and '.join(given) or 'neither'}."
        )
    if str(cfg.trainer.get("accelerator")) in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator asks for a GPU and there is none; use trainer=cpu or trainer=auto.")
    path = Path(str(cfg[given[0]])).expanduser() if given[0] == "init_from_nemo_model" else locate(str(cfg[given[0]]))
    if not path.is_file():
        raise CheckpointError(f"{given[0]}={cfg[given[0]]}: no such file.")
    return path


def _validation_rows(cfg: DictConfig) -> dict[str, list[Row]]:
    """Name → rows of each validation manifest, all of which must have text and readable audio."""
    manifests = cfg.model.validation_ds.get("manifest_filepath")
    if not manifests:
        return {}
    sets: dict[str, list[Row]] = {}
    for path in expand_paths(manifests):
        rows = read_manifest(path)
        bare = [row.origin for row in rows if not row.text]
        bad = [reason for _, reason in unreadable(rows)]
        if bare or bad:
            listed = "".join(f"\n  {item}" for item in (bad or bare)[:20])
            what = "unreadable audio" if bad else "no `text`"
            raise ManifestError(f"{len(bad or bare)} row(s) of the validation manifest {path} have {what}:{listed}")
        stem = Path(path).stem
        name = stem if stem not in sets else f"{Path(path).parent.name}_{stem}"
        sets[name] = rows
    return sets


def _trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    settings: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    if not cfg.model.validation_ds.get("manifest_filepath"):
        # Lightning refuses a step interval longer than the data when there is nothing to validate.
        settings.update(limit_val_batches=0, val_check_interval=None, check_val_every_n_epoch=1)
    if cfg.model.train_ds.get("use_lhotse"):
        # Lhotse's sampler already splits the data over the ranks; Lightning's would do it again.
        settings.setdefault("use_distributed_sampler", False)
    return settings


def _prepare_model(model: Any, cfg: DictConfig, validation: Mapping[str, Any]) -> None:
    """Replaces the optimizer section as a whole (a merge would keep the old scheduler) and sets validation."""
    optim: Any = OmegaConf.to_container(cfg.model.optim, resolve=True)
    if optim.get("sched") is None:
        optim.pop("sched", None)  # NeMo writes into the section when the key is there, also when it is null
    with open_dict(model.cfg):
        model.cfg.optim = OmegaConf.create(optim)
    if hasattr(model, "compute_eval_loss") and model.cfg.get("loss", {}).get("loss_name") == "tdt":
        # NeMo has no TDT loss on the CPU; WER is what validation is for.
        model.compute_eval_loss = False
    model.wer.log_prediction = False
    if validation:
        model.setup_multiple_validation_data(_with_sample_rate(cfg, model).model.validation_ds)


def _with_sample_rate(cfg: DictConfig, model: Any) -> DictConfig:
    """The configuration with the checkpoint's sample rate where none is given."""
    cfg = DictConfig(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
    for section in (cfg.model.train_ds, cfg.model.validation_ds):
        if section.get("sample_rate") is None:
            section.sample_rate = int(model.cfg.preprocessor.sample_rate)
    return cfg


def _pool_sample(model: Any, config: RunConfig) -> list[Row]:
    """Unlabeled rows, evenly spaced over the pool, whose transcripts are compared before and after."""
    staged = model._feedback.staged
    rows = [row for row in staged.rows if not row.text and Path(row.audio).is_file()]
    step = max(1, len(rows) // config.feedback.survey_utterances)
    return rows[::step][: config.feedback.survey_utterances]


def _evaluate(
    model: Any, validation: Mapping[str, list[Row]], cfg: DictConfig, config: RunConfig
) -> dict[str, CorpusScores]:
    scores = {}
    for name, rows in validation.items():
        logging.info(f"transcribing {name} ({len(rows)} utterances) …")
        head = config.feedback.heads if config.feedback.heads != "both" else "auto"
        texts = transcribe_rows(model, rows, head=head, batch_size=int(cfg.evaluate_batch_size))
        scores[name] = score_rows(
            rows, texts, run_context=config.context.load(), normalizer=config.feedback.normalizer
        )
    return scores


def _facts(config: RunConfig, source: Path, before: Any, after: Any, steps: int) -> dict[str, Any]:
    """Inert metadata for the exported configuration."""
    import hashlib

    context = config.context.load()
    digest = hashlib.sha256(json.dumps([context.description, context.terms]).encode()).hexdigest()
    return {
        "plugin": f"nemo_llm_feedback {__version__}",
        "base": source.name,
        "llm": config.llm.model if config.llm and config.needs_reward else None,
        "objective": config.objective.name,
        "steps": steps,
        "context_sha256": digest,
        "before": {name: _plain(scores) for name, scores in before.items()},
        "after": {name: _plain(scores) for name, scores in after.items()},
    }


def _plain(scores: CorpusScores) -> dict[str, float]:
    out = {m: scores.value(m) for m in ("wer", "cer", "ewer", "u_wer", "entity_recall", "false_alarms")}
    return {name: round(value, 3) for name, value in out.items() if value == value}


def _result_json(result: AdaptResult) -> dict[str, Any]:
    return {
        "nemo": str(result.nemo),
        "before": {name: _plain(scores) for name, scores in result.before.items()},
        "after": {name: _plain(scores) for name, scores in result.after.items()},
        "changed": [{"before": a, "after": b} for a, b in result.changed],
    }
