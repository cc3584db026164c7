"""The adapt job: checks the settings, logs a plan, trains, writes a plain ``.nemo``, and scores before and after."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.asr.checkpoints import remove_leftovers, supported_class
from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.jobs.inputs import input_digests
from nemo_llm_feedback.cli.jobs.plan import plan_text, reward_line
from nemo_llm_feedback.cli.jobs.run_choice import own_command, record_start, run_folder
from nemo_llm_feedback.cli.jobs.start import (
    check_room,
    make_folder,
    make_trainer,
    result_folders,
    room,
    source,
    stopping_by_signals,
    typed_if_full,
)
from nemo_llm_feedback.core.console import Session, progress, quiet, show
from nemo_llm_feedback.core.run_folder import LOG_FILE, RESULT_FILE, write_json
from nemo_llm_feedback.core.version import __version__
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.model_card import public_name, write_model_card
from nemo_llm_feedback.evaluation.report import adaptation_report, save_report, write_report
from nemo_llm_feedback.evaluation.report.changes import adapted_nbest, judged_changes
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.tables import build_table, table_metrics
from nemo_llm_feedback.evaluation.transcribe import Decoded, decode_rows
from nemo_llm_feedback.rewards import Reward
from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.setup import check_settings


@dataclass(frozen=True)
class AdaptResult:
    """The result of a run.

    Attributes:
        nemo: path of the adapted ``.nemo``.
        log_dir: folder of the run.
        before, after: validation set → scores; empty without a validation manifest.
        changed: unlabeled rows (those held out, or some of the pool) whose greedy transcript changed, as
            (before, after).
        learning_rate: peak of the run.
        alpha, beta: weights of the reward; None for a reward without any.
        boosting_weight: weight of the boosting tree.
        kept_step: the step whose weights are exported; 0 = the start.
        gain: held-out gain of these weights, in the reward's unit; NaN without a reward.
        ended: why training ended before its last step; empty if it did not.
        steps: optimizer steps that were taken.
        share: share of the update that is exported; 1 = the adapted weights.
        general: how general speech was held or watched.
        guard_wer: the guard set's WER in % before and after; empty without one.
        history: the held-out measurements, in order.
    """

    nemo: Path
    log_dir: Path
    before: dict[str, CorpusScores]
    after: dict[str, CorpusScores]
    changed: list[tuple[str, str]]
    learning_rate: float
    alpha: float | None
    beta: float | None
    boosting_weight: float
    kept_step: int
    gain: float
    ended: str = ""
    steps: int = 0
    share: float = 1.0
    general: str = ""
    guard_wer: tuple[float, ...] = ()
    history: list[HeldOutMetrics] = field(default_factory=list)


def adapt(cfg: DictConfig, *, reward: Reward | None = None) -> AdaptResult:
    """Runs the whole job.

    Args:
        cfg: a composed configuration (``conf/adapt.yaml``).
        reward: judges hypotheses in place of what the section ``reward`` names.

    Raises:
        FeedbackError: settings, manifests, checkpoint or LLM cannot be used; raised before any training.
    """
    with quiet(verbose=bool(cfg.get("verbose"))) as session, stopping_by_signals(session):
        try:
            return _adapt(cfg, session, reward=reward)
        except SystemExit:
            if session.stop == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise


def _adapt(cfg: DictConfig, session: Session, *, reward: Reward | None) -> AdaptResult:
    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    config, first = check_settings(tree, reward).config, is_global_rank_zero()
    base = source(cfg)
    supported_class(read_config(base), origin=base)
    folders = result_folders(cfg)
    inputs = input_digests(tree, base=base, llm=config.needs_llm) if first else {}
    pl.seed_everything(int(cfg.seed), workers=True)

    model = restore(base, map_location="cpu")
    trainer = make_trainer(cfg)
    with run_folder(cfg, inputs) as manager, typed_if_full(folders):
        log_dir = make_folder(trainer, manager)
        target = Path(cfg.output).expanduser() if cfg.output else log_dir / f"{cfg.name}.nemo"
        model.set_trainer(trainer)
        model.setup_feedback(tree, work_dir=log_dir, reward=reward)
        check_room(folders, room(model, cfg, log_dir=log_dir, folders=folders))
        if first:
            checkpoint = Path(trainer.ckpt_path).name if trainer.ckpt_path else None
            record_start(cfg, log_dir, checkpoint=checkpoint, inputs=inputs)
            remove_leftovers(target)
        session.log.move_to(log_dir / (LOG_FILE if first else f"log_rank{trainer.global_rank}.txt"))
        show(plan_text(model, source=base, log_dir=log_dir))
        try:
            before, after, pool = _train(model, batch_size=int(cfg.evaluate_batch_size))
        except SystemExit:
            show(_how_to_go_on(log_dir))
            raise
        result = _result(model, target, log_dir, before, after, pool)
        model._adaptation_facts = _facts(model, base, result) | {"base_model": cfg.init_from_pretrained_model}
        model.save_to(str(target))
        if first:
            _write_reports(result, model, tree, pool)
            write_json(log_dir / RESULT_FILE, _result_json(result))
    return result


def _how_to_go_on(log_dir: Path) -> str:
    saved = any(log_dir.glob("checkpoints/*.ckpt"))
    what = "goes on from its last checkpoint" if saved else "starts again (no step was saved yet)"
    return f"stopped. The same command {what}:\n  {shlex.join(own_command())}"


Changed = tuple[Sequence[Row], Decoded, Decoded]


def _train(model: Any, *, batch_size: int) -> tuple[dict[str, CorpusScores], dict[str, CorpusScores], Changed]:
    """Trains; gives the scores of the validation sets before and after, and the pool's sample with its transcripts."""
    trainer, setup = model.trainer, model.feedback_setup
    # One rank evaluates; nothing here is shared work.
    sample = setup.staged.held_out or setup.some_rows(setup.config.feedback.pool_utterances)
    sets, pool = (setup.validation, sample) if is_global_rank_zero() else ({}, ())
    model.to(trainer.strategy.root_device)
    before, pool_before = _evaluate(model, sets, batch_size), decode_rows(model, pool)
    trainer.fit(model)
    # Lightning has moved the model to the CPU when training ends.
    model.to(trainer.strategy.root_device)
    model.feedback.reference.to(model.device)
    stopping = _early_stopping(model)
    if not stopping.done:
        # Killed after its last step: Lightning finds nothing left to run and calls no callback.
        stopping.on_train_start(trainer, model)
        stopping.finish(trainer, model)
    seen, lost = len(setup.reader.seen), len(setup.reader.left_out)
    logging.info(f"{seen} different unlabeled rows were read; {lost} rows were left out in the middle of the run.")
    after, pool_after = _evaluate(model, sets, batch_size), decode_rows(model, pool)
    return before, after, (pool, pool_before, pool_after)


def _early_stopping(model: Any) -> HeldOutEarlyStopping:
    return next(c for c in model.trainer.callbacks if isinstance(c, HeldOutEarlyStopping))


def _result(model: Any, target: Path, log_dir: Path, before: Any, after: Any, pool: Changed) -> AdaptResult:
    stopping, config = _early_stopping(model), model.feedback.config
    alpha, beta = config.reward.weights if config.needs_reward and config.reward.weighed else (None, None)
    return AdaptResult(
        nemo=target,
        log_dir=log_dir,
        before=before,
        after=after,
        changed=[(a, b) for a, b in zip(pool[1].texts, pool[2].texts, strict=True) if a != b],
        learning_rate=float(model.cfg.optim.lr),
        alpha=alpha,
        beta=beta,
        boosting_weight=config.proposals.boosting_weight,
        kept_step=stopping.kept_step,
        gain=stopping.kept_gain,
        ended=stopping.reason,
        steps=int(model.trainer.global_step),
        share=stopping.share,
        general=model.feedback_setup.general_speech(),
        guard_wer=stopping.guard_wer,
        history=stopping.history,
    )


def summary(result: AdaptResult) -> str:
    """Before and after as text: tables where there were references, else changed transcripts; and the paths."""
    lines = []
    for name, before in result.before.items():
        systems = {"before": before, "after": result.after[name]}
        table = build_table(systems, metrics=table_metrics(before), base="before")
        lines += [f"\n{name} ({len(before.references)} utterances):", table.to_text()]
    if not result.before:
        lines.append(f"\nno validation manifest; {len(result.changed)} of the sampled pool transcripts changed, e.g.")
        lines += [f"  before: {a}\n  after:  {b}" for a, b in result.changed[:5]]
    lines.append("")
    weights = "" if result.alpha is None else f", alpha {result.alpha:g}, beta {result.beta:g}"
    gain = "" if result.gain != result.gain else f", held-out gain {result.gain:+.2f}"
    kept = f"step {result.kept_step} of {result.steps}" if result.kept_step else "the start: no step gained"
    moved = f", {100 * result.share:.0f} % of the update" if result.share < 1 else ""
    wer = "; its WER {:.1f} → {:.1f} %".format(*result.guard_wer) if result.guard_wer else ""
    lines += [
        f"settings    learning rate {result.learning_rate:g}{weights}, boosting weight {result.boosting_weight:g}",
        f"kept        {kept}{gain}{moved}",
        f"ended       {result.ended or 'all steps were taken'}",
        f"general     {result.general}{wer}",
        f"checkpoint  {result.nemo}",
        f"report      {result.log_dir / 'report.html'}",
    ]
    return "\n".join(lines)


def _write_reports(result: AdaptResult, model: Any, settings: Mapping[str, Any], pool: Changed) -> None:
    """Writes ``report.html`` into the run's folder and the model card beside the checkpoint."""
    config, validation = model.feedback.config, model.feedback_setup.validation
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
            name: adapted_nbest(model, rows, result.before[name].hypotheses, result.after[name].hypotheses)
            for name, rows in validation.items()
        },
        changes=judged_changes(model, *pool),
        surveyed=len(pool[0]),
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


def _evaluate(model: Any, validation: Mapping[str, list[Row]], batch_size: int) -> dict[str, CorpusScores]:
    config, scores = model.feedback_setup.config, {}
    for name, rows in validation.items():
        head = config.feedback.heads if config.feedback.heads != "both" else "auto"
        with progress(f"transcribing {name}", len(rows)) as on_batch:
            texts = decode_rows(model, rows, head=head, batch_size=batch_size, on_batch=on_batch).texts
        scores[name] = score_rows(
            rows, texts, run_context=config.context.load(), normalizer=config.feedback.normalizer
        )
    return scores


def _facts(model: Any, source: Path, result: AdaptResult) -> dict[str, Any]:
    """Inert metadata for the exported configuration, the report and the model card; what is not known is None."""
    config, staged, context = model.feedback.config, model.feedback_setup.staged, model.feedback.config.context.load()
    digest = hashlib.sha256(json.dumps([context.description, context.terms]).encode()).hexdigest()
    rises = [found.wer_rise for found in result.history if found.step == result.kept_step]
    taken = ("learning_rate", "alpha", "beta", "boosting_weight", "kept_step", "gain", "ended", "share")
    facts = {
        "plugin": f"nemo_llm_feedback {__version__}",
        "base": source.name,
        "llm": public_name(str(config.llm.model)) if config.llm and config.needs_llm else None,
        "objective": config.objective.name,
        "reward": reward_line(config.reward) if config.needs_reward else None,
        "pool_rows": staged.num_unlabeled,
        "pool_hours": round(staged.hours(unlabeled=True), 3),
        "steps": result.steps,
        **{name: getattr(result, name) for name in taken},
        "general_wer_rise": rises[-1] if rises else None,
        "context_sha256": digest,
    }
    return {key: None if value != value else value for key, value in facts.items()} | _plain_scores(result)


def _plain_scores(result: AdaptResult) -> dict[str, dict[str, dict[str, float]]]:
    """``before`` and ``after`` → validation set → metric → value."""
    names = ("wer", "cer", "ewer", "u_wer", "entity_recall", "false_alarms")

    def values(scores: CorpusScores) -> dict[str, float]:
        """The metrics that are defined."""
        return {name: round(value, 3) for name in names if (value := scores.value(name)) == value}

    both = {"before": result.before, "after": result.after}
    return {when: {name: values(scores) for name, scores in sets.items()} for when, sets in both.items()}


def _result_json(result: AdaptResult) -> dict[str, Any]:
    kept = ("learning_rate", "alpha", "beta", "boosting_weight", "steps", "kept_step", "ended", "share", "guard_wer")
    return {
        "nemo": str(result.nemo),
        **{name: getattr(result, name) for name in kept},
        "gain": result.gain if result.gain == result.gain else None,
        "history": [asdict(found) for found in result.history],
        **_plain_scores(result),
        "changed": [{"before": a, "after": b} for a, b in result.changed],
    }
