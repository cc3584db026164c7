"""The adapt job: settings → plan → before → training → plain ``.nemo`` → after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.asr.checkpoints import read_config, supported_class
from nemo_llm_feedback.cli.jobs.inputs import (
    labelled_rows,
    prepare_model,
    rates_to_try,
    source,
    trainer_settings,
    with_sample_rate,
)
from nemo_llm_feedback.cli.jobs.plan import plan_text, reward_line
from nemo_llm_feedback.cli.jobs.start import check_room, experiment, record_start
from nemo_llm_feedback.core.config import RunConfig, parse_run_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.run_folder import RESULT_FILE, FolderLock, write_json
from nemo_llm_feedback.core.version import __version__
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.model_card import public_name, write_model_card
from nemo_llm_feedback.evaluation.report import adaptation_report, save_report, write_report
from nemo_llm_feedback.evaluation.report.changes import judged_changes, own_nbest
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.tables import build_table
from nemo_llm_feedback.evaluation.transcribe import transcribe_rows
from nemo_llm_feedback.training.callbacks.early_stopping import Finish, Watchman
from nemo_llm_feedback.training.callbacks.entity_validation import EntityValidation
from nemo_llm_feedback.training.callbacks.guards import Look
from nemo_llm_feedback.training.callbacks.hypothesis_log import HypothesisLog
from nemo_llm_feedback.training.callbacks.step_log import StepLog, StepLogger
from nemo_llm_feedback.training.callbacks.weights import snapshot
from nemo_llm_feedback.training.models import restore


@dataclass(frozen=True)
class AdaptResult:
    """What a run gave.

    Attributes:
        nemo: path of the adapted ``.nemo``.
        log_dir: folder of the run.
        before, after: validation set → scores; empty without a validation manifest.
        changed: unlabeled rows (those held out, or some of the pool) whose greedy transcript changed, as
            (before, after).
        ended: why training ended before its last step; empty if it did not.
        share: λ of the exported mix of start and adapted weights; 1 = the adapted ones.
        looks: the held-out looks, in order.
    """

    nemo: Path
    log_dir: Path
    before: dict[str, CorpusScores]
    after: dict[str, CorpusScores]
    changed: list[tuple[str, str]]
    ended: str = ""
    share: float = 1.0
    looks: list[Look] = field(default_factory=list)


def adapt(cfg: DictConfig) -> AdaptResult:
    """Runs the whole job.

    Args:
        cfg: a composed configuration (``conf/adapt.yaml``).

    Raises:
        FeedbackError: settings, manifests, checkpoint or LLM cannot be used; raised before any training.
    """
    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    config = parse_run_config(tree)
    rates = rates_to_try(cfg, config)
    base = source(cfg)
    supported_class(read_config(base), origin=base)
    validation = labelled_rows(cfg.model.validation_ds.get("manifest_filepath"))
    guard = [row for rows in labelled_rows(config.guards.manifest_filepath).values() for row in rows]
    manager = experiment(cfg)
    folders = {"run": Path(manager.get("explicit_log_dir") or manager.get("exp_dir") or "nemo_experiments")}
    if cfg.output:
        folders["output"] = Path(cfg.output).expanduser().absolute().parent
    check_room(folders, model_bytes=base.stat().st_size)
    pl.seed_everything(int(cfg.seed), workers=True)

    model = restore(base, map_location="cpu")
    trainer = pl.Trainer(**trainer_settings(cfg))
    log_dir = Path(exp_manager(trainer, manager))
    model.set_trainer(trainer)
    with _own_folder(cfg, log_dir, trainer):
        prepare_model(model, cfg, validation, rates=rates)
        model.setup_feedback(with_sample_rate(cfg, model), work_dir=log_dir)
        logging.info(plan_text(model, config, source=base, log_dir=log_dir, rates=rates))
        watchman = _watchman(model, config, guard, rates)
        before, after, pool = _train(model, config, cfg, watchman, validation=validation, log_dir=log_dir)
        target = Path(cfg.output) if cfg.output else log_dir / f"{cfg.name}.nemo"
        model._adaptation_facts = _facts(model._feedback.config, base, before, after, int(trainer.global_step))
        model.save_to(str(target))
        changed = [(a, b) for _, a, b in pool if a != b]
        result = AdaptResult(target, log_dir, before, after, changed, watchman.reason, watchman.share, watchman.looks)
        if is_global_rank_zero():
            _write_reports(result, model, config, tree, validation, pool)
            write_json(log_dir / RESULT_FILE, _result_json(result))
    return result


def _train(
    model: Any,
    config: RunConfig,
    cfg: DictConfig,
    watchman: Watchman,
    *,
    validation: Mapping[str, list[Row]],
    log_dir: Path,
) -> tuple[dict[str, CorpusScores], dict[str, CorpusScores], list[tuple[Row, str, str]]]:
    """Trains; gives the scores of the validation sets before and after, and the pool's sample with its transcripts."""
    trainer, finish, step_log = model.trainer, Finish(watchman), StepLog(log_dir)
    trainer.callbacks += [HypothesisLog(config.feedback.log_hypotheses_every), watchman]
    if validation:
        trainer.callbacks += [EntityValidation(validation, config)]
    trainer.loggers = [*trainer.loggers, StepLogger(step_log)]
    trainer.callbacks.insert(0, step_log)
    # exp_manager's comes first, and would write checkpoints that lack what the others do after this step.
    trainer.callbacks.sort(key=lambda callback: isinstance(callback, pl.callbacks.Checkpoint))
    trainer.callbacks.append(finish)
    # One rank evaluates; nothing here is shared work.
    sets, pool = (validation, _pool_sample(model, config)) if is_global_rank_zero() else ({}, [])
    before, pool_before = _evaluate(model, sets, cfg, config), transcribe_rows(model, pool)
    trainer.fit(model)
    if not finish.done:
        # Killed after its last step: Lightning finds nothing left to run and calls none of these.
        watchman.on_train_start(trainer, model)
        finish.on_train_end(trainer, model)
    logging.info(
        f"{len(model._feedback.reader.seen)} different unlabeled rows were read; rows that no loader could decode are "
        "not in it."
    )
    after, pool_after = _evaluate(model, sets, cfg, config), transcribe_rows(model, pool)
    return before, after, list(zip(pool, pool_before, pool_after, strict=True))


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
    if result.ended:
        lines.append(f"\ntraining ended early: {result.ended}")
    if result.share < 1:
        lines.append(f"\nexported: {100 * result.share:.0f} % of the update, as much as the guard set bears")
    lines.append(f"\nadapted checkpoint: {result.nemo}\nreport:             {result.log_dir / 'report.html'}")
    return "\n".join(lines)


def _write_reports(
    result: AdaptResult,
    model: Any,
    config: RunConfig,
    settings: Mapping[str, Any],
    validation: Mapping[str, list[Row]],
    pool: list[tuple[Row, str, str]],
) -> None:
    """Writes ``report.html`` into the run's folder and the model card beside the checkpoint."""
    data = adaptation_report(
        log_dir=result.log_dir,
        rows=validation,
        before=result.before,
        after=result.after,
        context=config.context.load(),
        normalizer=config.feedback.normalizer,
        facts=model._adaptation_facts,
        settings=settings,
        nbest={
            name: own_nbest(model, rows, result.before[name].hypotheses, result.after[name].hypotheses)
            for name, rows in validation.items()
        },
        changes=judged_changes(model, [row for row, _, _ in pool], [a for _, a, _ in pool], [b for _, _, b in pool]),
        surveyed=len(pool),
    )
    save_report(data, result.log_dir)
    write_report(data, result.log_dir / "report.html", audio=bool(settings.get("report_audio", True)))
    write_model_card(
        result.nemo,
        facts=model._adaptation_facts,
        before=result.before,
        after=result.after,
        normalizer=config.feedback.normalizer,
    )


def _own_folder(cfg: DictConfig, log_dir: Path, trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Marks the run folder as rank 0's while inside, and records the settings in it."""
    if not is_global_rank_zero():
        return nullcontext()
    lock = FolderLock(log_dir)
    if not lock.held:
        lock.release()
        raise ConfigError(f"another process is training in {log_dir}: wait for it, or choose another run folder.")
    record_start(cfg, log_dir, checkpoint=Path(trainer.ckpt_path).name if trainer.ckpt_path else None)
    return lock


def _watchman(model: Any, config: RunConfig, guard: list[Row], rates: tuple[float, ...]) -> Watchman:
    """Looks at held-out rows, or, of a pool too small or tarred, at rows that are also trained on."""
    staged = model._feedback.staged
    rows = list(staged.held_out)
    if config.guards.looks and not rows:
        rows = _spread(model, config.guards.held_out_utterances)
        logging.warning(
            f"no rows are held out (tarred audio, or too few for guards.held_out={config.guards.held_out}): "
            f"the guards look at {len(rows)} rows that are trained on."
        )
    if rates and not rows:
        raise ConfigError("no audio file can be read to judge a trial by (tarred audio): set model.optim.lr.")
    parameters = replace(config.parameters, lr_candidates=rates)
    return Watchman(config.guards, rows, guard, start=snapshot(model), parameters=parameters)


def _pool_sample(model: Any, config: RunConfig) -> list[Row]:
    """Unlabeled rows whose transcripts are compared before and after: those held out, or some of the pool."""
    return list(model._feedback.staged.held_out) or _spread(model, config.feedback.pool_utterances)


def _spread(model: Any, most: int) -> list[Row]:
    """Unlabeled rows with audio files, evenly spaced over the pool."""
    rows = [row for row in model._feedback.staged.rows if row.unlabeled and Path(row.audio).is_file()]
    return rows[:: max(1, len(rows) // most)][:most]


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
    context = config.context.load()
    digest = hashlib.sha256(json.dumps([context.description, context.terms]).encode()).hexdigest()
    return {
        "plugin": f"nemo_llm_feedback {__version__}",
        "base": source.name,
        "llm": public_name(str(config.llm.model)) if config.llm and config.needs_llm else None,
        "objective": config.objective.name,
        "reward": reward_line(config.reward) if config.needs_reward else None,
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
        "ended": result.ended,
        "share": result.share,
        "looks": [asdict(look) for look in result.looks],
        "before": {name: _plain(scores) for name, scores in result.before.items()},
        "after": {name: _plain(scores) for name, scores in result.after.items()},
        "changed": [{"before": a, "after": b} for a, b in result.changed],
    }
