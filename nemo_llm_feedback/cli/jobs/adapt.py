"""The adapt job: checks the settings, logs a plan, trains, writes a plain ``.nemo``, and scores before and after.

It trains once, or several times with other seeds, and exports the mean of the weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.asr.checkpoints import remove_leftovers, supported_class
from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.jobs import run_choice, start
from nemo_llm_feedback.cli.jobs.devices import check_memory, one_device
from nemo_llm_feedback.cli.jobs.export import export
from nemo_llm_feedback.cli.jobs.runs import list_runs, runs_text
from nemo_llm_feedback.core.config import parse_run_config, plain
from nemo_llm_feedback.core.console import Session, quiet, show
from nemo_llm_feedback.core.errors import ConfigError, list_faults
from nemo_llm_feedback.core.run_folder import LOG_FILE, RESULT_FILE, SETTINGS_FILE, newest, write_json
from nemo_llm_feedback.core.version import __version__
from nemo_llm_feedback.data.audio import unreadable
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import CorpusScores
from nemo_llm_feedback.evaluation.model_card import plain_scores, public_name, write_model_card
from nemo_llm_feedback.evaluation.records import facts_text, to_plain
from nemo_llm_feedback.evaluation.report import adaptation_report, save_report, write_report
from nemo_llm_feedback.evaluation.report.changes import adapted_nbest, judged_changes
from nemo_llm_feedback.evaluation.tables import build_table, table_metrics
from nemo_llm_feedback.evaluation.transcribe import Decoded, score_sets
from nemo_llm_feedback.rewards import Reward
from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics, gain_name
from nemo_llm_feedback.training.inputs import labelled_rows
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.setup import check_settings
from nemo_llm_feedback.training.transcripts import StartTranscripts, transcribed


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
        gain: held-out gain of these weights over their generation's teacher, in the reward's unit; NaN without a
            reward.
        ended: why training ended before its last step; empty if it did not.
        steps: optimizer steps that were taken.
        share: share of the update that is exported; 1 = the adapted weights.
        general: how general speech was held or watched.
        guard_wer: the guard set's WER in % before and after; empty without one.
        history: the held-out measurements, in order.
        generation: the generation of the exported weights; ``alpha``, ``beta`` and ``boosting_weight`` are the last
            one's that began.
        held_out_rows: rows that were kept from training and measured; 0 = the measured rows were trained on.
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
    generation: int = 1
    held_out_rows: int = 0


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


def adapt(cfg: DictConfig, *, reward: Reward | None = None) -> AdaptResult:
    """Runs the whole job.

    Args:
        cfg: a composed configuration (``conf/adapt.yaml``).
        reward: judges hypotheses in place of what the section ``reward`` names.

    Raises:
        FeedbackError: settings, manifests, checkpoint or LLM cannot be used; raised before any training.
    """
    with quiet(verbose=bool(cfg.get("verbose"))) as session, start.stopping_by_signals(session):
        try:
            return _adapt(cfg, session, reward=reward)
        except SystemExit:
            if session.stop == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise


def _adapt(cfg: DictConfig, session: Session, *, reward: Reward | None) -> AdaptResult:
    tree = plain(cfg)
    config, first = check_settings(tree, reward).config, is_global_rank_zero()
    base = start.source(cfg)
    supported_class(read_config(base), origin=base)
    folders = start.result_folders(cfg)
    inputs = run_choice.input_digests(tree, base=base, llm=config.needs_llm) if first else {}
    pl.seed_everything(int(cfg.seed), workers=True)

    model = restore(base, map_location="cpu")
    trainer = start.make_trainer(cfg)
    with run_choice.run_folder(cfg, inputs) as manager, start.typed_if_full(folders):
        log_dir = start.make_folder(trainer, manager)
        target = Path(cfg.output).expanduser() if cfg.output else log_dir / f"{cfg.name}.nemo"
        start.keep_inputs(target, base, inputs)
        model.set_trainer(trainer)
        model.setup_feedback(cfg, work_dir=log_dir, reward=reward)
        start.check_room(folders, start.room(model, cfg, log_dir=log_dir, folders=folders))
        check_memory(model, cfg)
        if first:
            checkpoint = Path(trainer.ckpt_path).name if trainer.ckpt_path else None
            run_choice.record_start(cfg, log_dir, checkpoint=checkpoint, inputs=inputs)
            remove_leftovers(target)
        session.log.move_to(log_dir / (LOG_FILE if first else f"log_rank{trainer.global_rank}.txt"))
        show(start.plan_text(model, source=base, log_dir=log_dir))
        if first and target.is_file():
            show(f"warning: {target} is there and will be replaced at the end of the run.")
        try:
            before, after, pool = _train(model, target, batch_size=int(cfg.evaluate_batch_size))
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
    return f"stopped. The same command {what}:\n  {shlex.join(run_choice.own_command())}"


Changed = tuple[Sequence[Row], Decoded, Decoded]
# What a run took and gave, in its result and in what the exported checkpoint holds of it.
_TAKEN = ("learning_rate", "alpha", "beta", "boosting_weight", "steps", "kept_step", "generation", "gain", "ended")


def _train(
    model: Any, target: Path, *, batch_size: int
) -> tuple[dict[str, CorpusScores], dict[str, CorpusScores], Changed]:
    """Trains; gives the scores of the validation sets before and after, and the pool's sample with its transcripts.

    Should the second measurement fail, the checkpoint is written to ``target`` before the error goes on.
    """
    trainer, setup = model.trainer, model.feedback_setup
    sets, pool = setup.validation, setup.staged.held_out or setup.some_rows(setup.config.feedback.pool_utterances)
    start_transcripts = StartTranscripts(sets, pool, setup.config, batch_size=batch_size)
    trainer.callbacks.insert(0, start_transcripts)
    trainer.fit(model)
    before, pool_before = start_transcripts.found
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
    if setup.config.feedback.on_bad_audio == "skip":
        for name, rows in sets.items():
            kept = _readable(rows)
            sets[name] = [rows[i] for i in kept]
            before[name] = before[name].select(kept)
        kept = _readable(pool)
        pool, pool_before = [pool[i] for i in kept], pool_before.select(kept)
    try:
        after, pool_after = transcribed(model, sets, pool, setup.config, batch_size=batch_size)
    except BaseException:
        model.save_to(str(target))
        show(f"the adapted checkpoint is whole, and only its measurement failed: {target}")
        raise
    return before, after, (pool, pool_before, pool_after)


def _readable(rows: Sequence[Row]) -> list[int]:
    """Positions of the rows whose audio can still be read; the others are named."""
    lost = unreadable(rows)
    if lost:
        show(list_faults(f"warning: {len(lost)} row(s) left out, broken in the middle of the run:", lost.values()))
    return [i for i in range(len(rows)) if i not in lost]


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
        general=model.feedback_setup.general_speech(watched=stopping.watching),
        guard_wer=stopping.guard_wer,
        history=stopping.history,
        generation=stopping.kept_generation,
        held_out_rows=len(model.feedback_setup.staged.held_out),
    )


def summary(result: AdaptResult) -> str:
    """Before and after as text: tables where there were references, else changed transcripts; and the paths."""
    lines = _tables(result, "before", "after")
    if not result.before:
        lines.append(f"\nno validation manifest; {len(result.changed)} of the sampled pool transcripts changed, e.g.")
        lines += [f"  before: {a}\n  after:  {b}" for a, b in result.changed[:5]]
    weights = "" if result.alpha is None else f", alpha {result.alpha:g}, beta {result.beta:g}"
    gain = "" if result.gain != result.gain else f", {gain_name(result.held_out_rows)} {result.gain:+.2f}"
    part = f", generation {result.generation}" if result.generation > 1 else ""
    kept = f"step {result.kept_step} of {result.steps}{part}" if result.kept_step else "the start: no step gained"
    moved = f", {100 * result.share:.0f} % of the update" if result.share < 1 else ""
    wer = "; its WER {:.1f} → {:.1f} %".format(*result.guard_wer) if result.guard_wer else ""
    facts = {
        "settings": f"learning rate {result.learning_rate:g}{weights}, boosting weight {result.boosting_weight:g}",
        "kept": f"{kept}{gain}{moved}",
        "ended": result.ended or "all steps were taken",
        "general": f"{result.general}{wer}",
        "checkpoint": result.nemo,
        "report": result.log_dir / "report.html",
    }
    return "\n".join([*lines, "", facts_text(facts)])


def _tables(result: AdaptResult | AveragedRuns, old: str, new: str) -> list[str]:
    """A heading and a table of each validation set, under these names of the two systems."""
    lines = []
    for name, before in result.before.items():
        table = build_table({old: before, new: result.after[name]}, metrics=table_metrics(before), base=old)
        lines += [f"\n{name} ({len(before.references)} utterances):", table.to_text()]
    return lines


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
        pool=list(zip(pool[0], pool[1].texts, pool[2].texts, strict=True)),
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


def _facts(model: Any, source: Path, result: AdaptResult) -> dict[str, Any]:
    """Inert metadata for the exported configuration, the report and the model card; what is not known is None."""
    config, staged, context = model.feedback.config, model.feedback_setup.staged, model.feedback.config.context.load()
    digest = hashlib.sha256(json.dumps([context.description, context.terms]).encode()).hexdigest()
    rises = [found.wer_rise for found in result.history if found.step == result.kept_step]
    facts = {
        "plugin": f"nemo_llm_feedback {__version__}",
        "base": source.name,
        "llm": public_name(str(config.llm.model)) if config.llm and config.needs_llm else None,
        "objective": config.objective.name,
        "reward": start.reward_line(config.reward) if config.needs_reward else None,
        "pool_rows": staged.num_unlabeled,
        "pool_hours": round(staged.hours(unlabeled=True), 3),
        **{name: getattr(result, name) for name in (*_TAKEN, "share", "held_out_rows")},
        "generation": result.generation if config.feedback.generations > 1 else None,
        "decoder_type": "ctc" if hasattr(model, "ctc_decoder") and model.feedback.heads[0].name == "ctc" else None,
        "look_ahead": config.feedback.look_ahead,
        "general_wer_rise": rises[-1] if rises else None,
        "context_sha256": digest,
    }
    scores = {"before": plain_scores(result.before), "after": plain_scores(result.after)}
    plain: dict[str, Any] = to_plain(facts | scores)
    return plain


def _result_json(result: AdaptResult) -> dict[str, Any]:
    kept = {name: getattr(result, name) for name in ("nemo", *_TAKEN, "share", "guard_wer", "history")}
    changed = [{"before": a, "after": b} for a, b in result.changed]
    scores = {"before": plain_scores(result.before), "after": plain_scores(result.after)}
    plain: dict[str, Any] = to_plain({**kept, **scores, "changed": changed})
    return plain


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
    if reward is not None:  # what the run's settings say of it, in `runs` and to a resumed run
        cfg = copy.deepcopy(cfg)
        cfg.reward = {"name": "python"}
    config = parse_run_config(cfg)
    if cfg.get("runs", 1) == 1:
        return adapt(cfg, reward=reward)
    if not one_device(cfg.trainer.get("devices", 1)) or cfg.trainer.get("num_nodes", 1) != 1:
        raise ConfigError(
            f"runs={cfg.runs} trains on one device, one run after the other: set trainer.devices=1, or give a command "
            "per seed (runs=1 seed=1 …) and average them with `nemo-llm-feedback export`."
        )
    base, _ = start.source(cfg), start.result_folders(cfg)
    target = Path(cfg.output or Path(cfg.exp_manager.get("exp_dir") or ".") / f"{cfg.name}_mean.nemo").expanduser()
    inputs = run_choice.input_digests(plain(cfg), base=base, llm=config.needs_llm)
    start.keep_inputs(target, base, inputs)
    skip = config.feedback.on_bad_audio == "skip"
    validation = labelled_rows(cfg.model.validation_ds.get("manifest_filepath"), skip=skip)
    parts = [_one(cfg, seed) for seed in range(cfg.seed, cfg.seed + cfg.runs)]
    files = []
    for number, part in enumerate(parts, 1):
        finished = _finished(part, inputs)
        with quiet():
            state = "has finished and is taken as it is" if finished else "begins"
            show(f"\nrun {number} of {cfg.runs}, with the seed {part.seed}, {state}")
        files.append(finished or adapt(part, reward=reward).nemo)
    with quiet():
        export(files, output=target)
        device = start.make_trainer(cfg).strategy.root_device
        models = (restore(path, map_location=device) for path in (base, target) if validation)
        size = int(cfg.evaluate_batch_size)
        before, after = [score_sets(model, validation, config, batch_size=size) for model in models] or ({}, {})
        facts: Any = OmegaConf.to_container(read_config(target).adaptation)
        write_model_card(target, facts=facts, before=before, after=after, normalizer=config.feedback.normalizer)
    return AveragedRuns(target, tuple(file.parent for file in files), before, after)


def averaged_text(result: AveragedRuns) -> str:
    """The runs, the scores of base and mean on each validation set, and the path, for a terminal."""
    runs = [replace(list_runs(folder)[0], folder=f"{folder.parent.name}/{folder.name}") for folder in result.runs]
    still = [run.folder for run in runs if run.result["kept_step"] == 0 or run.result["share"] == 0]
    lines = [runs_text(runs), *_tables(result, "base", "mean")]
    if still:
        share = f"{len(still)} of {len(runs)} parts of the mean are the base's weights"
        lines.append(f"\nwarning: {', '.join(still)} gained nothing and kept the start: {share}.")
    return "\n".join([*lines, f"\nmean of {len(result.runs)} runs: {result.nemo}"])


def _one(cfg: DictConfig, seed: int) -> DictConfig:
    """The settings of the run with this seed, in a folder of its own."""
    part = copy.deepcopy(cfg)
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
        same = settings is not None and settings.read_text(encoding="utf-8") == run_choice.settings_text(cfg)
        if result and same and not run_choice.changed_inputs(place, inputs):
            nemo = Path(json.loads(result.read_text(encoding="utf-8"))["nemo"])
            if nemo.is_file():
                return nemo
    return None
