"""What a run checks and shows before it starts: checkpoint, trainer settings, output, disk space, the plan; and how it
may be stopped."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from nemo.utils.exceptions import NeMoBaseException
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nemo_llm_feedback.asr.look_ahead import look_aheads
from nemo_llm_feedback.cli.jobs.devices import check_gpu
from nemo_llm_feedback.core.config import SOURCE_NAMES, RewardConfig, RunConfig, plain
from nemo_llm_feedback.core.config.faults import refuse
from nemo_llm_feedback.core.console import Session
from nemo_llm_feedback.core.errors import CheckpointError, ConfigError, TrainingError, refused
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.llm import estimate_memory, pick_placement, resolve_folder
from nemo_llm_feedback.training.models import locate
from nemo_llm_feedback.training.setup import check_precision

_REFUSALS = (ValueError, TypeError, RuntimeError, MisconfigurationException, NeMoBaseException)
_SETTINGS = {"run": "exp_manager.exp_dir", "output": "output", "temporary files": "the environment's TMPDIR"}
_LITTLE = _MB = 2**20  # bytes


def source(cfg: DictConfig) -> Path:
    """The starting checkpoint's file.

    Raises:
        ConfigError, CheckpointError: none or two are given, the file does not exist, or the GPU cannot do it.
    """
    given = [key for key in ("init_from_nemo_model", "init_from_pretrained_model") if cfg.get(key)]
    if len(given) != 1:
        raise ConfigError(
            "give exactly one of init_from_nemo_model=FILE.nemo and init_from_pretrained_model=NAME, "
            f"got {' and '.join(given) or 'neither'}."
        )
    check_gpu(cfg)
    path = Path(str(cfg[given[0]])).expanduser() if given[0] == "init_from_nemo_model" else locate(str(cfg[given[0]]))
    if not path.is_file():
        raise CheckpointError(f"the base checkpoint {cfg[given[0]]} ({given[0]}): no such file.")
    return path


def trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    """Keyword arguments of Lightning's trainer.

    Raises:
        ConfigError: see ``check_precision``.
    """
    settings = plain(cfg.trainer)
    check_precision(settings.get("precision"))
    # Ours is one bar for the whole run (``training.callbacks.run_bar``).
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    if settings.get("limit_val_batches") == 0 or not cfg.model.validation_ds.get("manifest_filepath"):
        # Lightning refuses a step interval longer than the data when there is nothing to validate.
        settings.update(limit_val_batches=0, val_check_interval=None, check_val_every_n_epoch=1)
    if cfg.model.train_ds.get("use_lhotse"):
        # Lhotse's sampler already splits the data over the ranks; Lightning's would do it again.
        settings.setdefault("use_distributed_sampler", False)
    return settings


def make_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning's trainer by the section ``trainer``.

    Raises:
        ConfigError: Lightning refuses the settings.
    """
    settings = trainer_settings(cfg)
    with refused("Lightning refuses the section trainer:", *_REFUSALS):
        return pl.Trainer(**settings)


def make_folder(trainer: pl.Trainer, manager: DictConfig) -> Path:
    """The run's folder, made by NeMo's ``exp_manager``, which gives the trainer its loggers and checkpoints.

    Raises:
        ConfigError: NeMo or Lightning refuse the settings.
    """
    with refused("NeMo refuses the section exp_manager:", *_REFUSALS, AttributeError, OSError):
        return Path(exp_manager(trainer, manager))


def result_folders(cfg: DictConfig) -> dict[str, Path]:
    """Where a run writes: ``run``, ``temporary files`` and, where one is given, ``output``.

    Raises:
        ConfigError: ``output`` is a folder, or folders cannot be written to; all are listed.
    """
    manager = cfg.exp_manager
    folders = {"run": Path(manager.get("explicit_log_dir") or manager.get("exp_dir") or "nemo_experiments")}
    # Lightning writes a checkpoint to the folder of temporary files before it moves it.
    folders["temporary files"] = Path(tempfile.gettempdir())
    faults = []
    if cfg.output:
        output = Path(cfg.output).expanduser().absolute()
        folders["output"] = output.parent
        if output.is_dir():
            faults.append(f"output={cfg.output} is a folder: name the file, e.g. output={output / 'adapted.nemo'}.")
    for what, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            faults.append(
                f"the folder of the {what}, {folder}, cannot be written to ({error}): set {_SETTINGS[what]}."
            )
    refuse("the results could not be written;", faults)
    return folders


def keep_inputs(target: Path, base: Path, others: Iterable[str] = ()) -> None:
    """Refuses to write over what the run reads.

    Args:
        target: the file that will be written.
        base: the starting checkpoint.
        others: paths of manifests, terms and so on; what is no file is left out.

    Raises:
        ConfigError: ``target`` is one of them.
    """
    for path in (str(base), *others):
        if os.path.isfile(path) and target.is_file() and target.samefile(path):
            what = "the base checkpoint" if path == str(base) else path
            raise ConfigError(f"output={target} is {what}, which would be lost: choose another name.")


def check_room(folders: Mapping[str, Path], needed: Mapping[str, int]) -> None:
    """Refuses a run whose results the disks have no room for.

    Args:
        folders: what :func:`result_folders` gave.
        needed: bytes that will be written to each at most (:func:`room`).

    Raises:
        ConfigError: all disks with too little room.
    """
    disks: dict[int, list[str]] = {}
    for what, folder in folders.items():
        disks.setdefault(folder.stat().st_dev, []).append(what)
    faults = []
    for uses in disks.values():
        free, size = shutil.disk_usage(folders[uses[0]]).free, sum(needed[use] for use in uses)
        if free < size:
            faults.append(
                f"{folders[uses[0]]} has {free / 2**20:.0f} MB left and {' and '.join(uses)} need about "
                f"{size / 2**20:.0f} MB: free some, or set {' or '.join(_SETTINGS[use] for use in uses)}."
            )
    refuse("the results could not be written;", faults)


def room(model: Any, cfg: DictConfig, *, log_dir: Path, folders: Mapping[str, Path]) -> dict[str, int]:
    """Bytes that a run writes to each of its folders at most, beside logs.

    A checkpoint holds the weights, AdamW's two moments, with ``parameters.ema_decay`` the weights' average and with
    ``feedback.generations`` those of the teacher; beside it are the best weights up to there, at most one file for
    each. The best ones and the last are there while another is written: to the folder of temporary files, from where
    another disk has to take it whole.

    Args:
        model: after ``setup_feedback``.
        cfg: the composed configuration.
        log_dir: the run's folder; a resumed run has checkpoints there already.
        folders: what :func:`result_folders` gave.
    """
    nemo = sum(4 * value.numel() for value in model.state_dict().values())
    learned = sum(4 * value.numel() for value in model.parameters() if value.requires_grad)
    teacher = cfg.feedback.generations > 1
    checkpoint = nemo + learned * (2 + bool(cfg.parameters.ema_decay) + teacher)
    kept = 1 + max(1, int(cfg.exp_manager.checkpoint_callback_params.get("save_top_k", 1)))
    one_disk = folders["run"].stat().st_dev == folders["temporary files"].stat().st_dev
    there = sum(path.stat().st_size for path in log_dir.glob("checkpoints/*") if path.is_file())
    return {
        "run": max(0, (kept + (not one_disk)) * checkpoint + kept * learned - there) + nemo,
        "temporary files": max(checkpoint, 2 * nemo),
        "output": nemo,
    }


@contextmanager
def stopping_by_signals(session: Session) -> Iterator[None]:
    """While inside, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) stop a training run behind its step, with a
    checkpoint, and all else at once.

    The second signal stops at once. ``SystemExit`` has the status of the signal: 130, 143 or 129.
    """

    def stop(number: int, frame: Any) -> None:
        """Notes the signal, or leaves."""
        # A closed terminal sends its signal twice, by the shell and by the kernel.
        at_once = not session.in_training or (session.stop and number != signal.SIGHUP)
        session.stop = number
        if at_once:
            raise SystemExit(128 + number)
        session.show("stopping behind this step, with a checkpoint (once more: at once) …")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may answer signals
        return
    session.on_signal = stop
    stopping = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` asks to go on
        stopping.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in stopping}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def typed_if_full(folders: Mapping[str, Path]) -> Iterator[None]:
    """Turns the many errors of a full disk into one that names it.

    Args:
        folders: what :func:`result_folders` gave.

    Raises:
        TrainingError: a disk is full; what was saved before is still there.
    """
    try:
        yield
    except (OSError, RuntimeError, sqlite3.Error) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # torch and sqlite give no number.
        roomy = (shutil.disk_usage(folder).free > _LITTLE for folder in folders.values())
        if not full and (isinstance(error, OSError) or all(roomy)):
            raise
        places = " or ".join(map(str, folders.values()))
        raise TrainingError(
            f"the disk is full ({places}): {error}. The last checkpoint is still there: free some room and give the "
            "same command again."
        ) from error


def plan_text(model: Any, *, source: Path, log_dir: Path) -> str:
    """The plan as lines of text.

    Args:
        model: prepared by ``setup_feedback``.
        source: the checkpoint.
        log_dir: folder of the run.
    """
    setup = model.feedback_setup
    config, staged, rates = setup.config, setup.staged, setup.rates
    held = sum(row.replay == "kl" for row in staged.rows if not row.text)
    others = sum(bool(row.text) and not row.unlabeled for row in staged.rows)
    kind = "rows learned by the reward" if config.labelled == "reward" else "unlabeled rows"
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sources = ", ".join(f"{n} {name}" for name in SOURCE_NAMES if (n := getattr(config.proposals, name)))
    if staged.sources and config.proposals.external and not config.wants_samples:
        sources += f", {config.proposals.external} of each of {', '.join(staged.sources)}"
    context, many = config.context.load(), config.feedback.generations
    several, named = look_aheads(model.encoder), config.feedback.look_ahead
    look_ahead = several and f"{', '.join(map(str, several))}: all are learned and guarded"
    if named:
        look_ahead = f"{list(named)} alone is learned and guarded (feedback.look_ahead)"
    rate = f"by trial of {', '.join(f'{rate:g}' for rate in rates)}" if rates else f"{model.cfg.optim.lr:g}"
    llm = ""
    if config.llm is not None and config.needs_llm:
        device, dtype = pick_placement(config.llm)
        size = estimate_memory(resolve_folder(config.llm), config.llm)
        llm = f"{config.llm.model} ({config.llm.quantization}, {str(dtype)[6:]} on {device}, "
        llm += f"about {size / _MB:.0f} MB by estimate)"
    facts = {
        "checkpoint": f"{source.name}: {model.stock().__name__}, {parameters / 1e6:.1f} M parameters, "
        f"heads {' + '.join(h.name for h in setup.heads)}",
        "pool": f"{staged.num_unlabeled} {kind} ({staged.hours(unlabeled=True):.2f} h); others: "
        f"{others} with text, {held} without that hold the model ({staged.hours(unlabeled=False):.2f} h)",
        "left out": ", ".join(f"{len(n)} {why}" for why, n in staged.left_out.items()) or "no row",
        "general": setup.general_speech(),
        "context": f"{context.description or '(no description)'}; {len(context.terms)} terms",
        "look-aheads": look_ahead,
        "groups": f"{sources}; at most {config.proposals.max_members} members, "
        f"new every {config.feedback.refresh_every} steps",
        "sources": others_line(staged.rows, config),
        "generations": many > 1 and f"{many}: the best weights of one are the teacher of the next",
        "objective": f"{config.objective.name}{' under SpecAugment' if config.feedback.augment else ''}; "
        f"learning rate {rate}",
        "reward": config.needs_reward and reward_line(config.reward),
        "memory": f"model, gradients and AdamW {(4 * parameters + 12 * trainable) / _MB:.0f} MB (estimate); "
        f"frozen reference {setup.reference.memory_bytes / _MB:.0f} MB{', twice' if many > 1 else ''}; "
        f"joint at most {config.feedback.memory_budget_mb} MB",
        "LLM": llm,
        "run folder": log_dir,
    }
    return "\n".join(["plan", *(f"  {name:<11}  {value}" for name, value in facts.items() if value)])


def others_line(rows: Sequence[Row], config: RunConfig) -> str:
    """The other recognisers whose texts are hypotheses, and how they are trusted; "" where there are none."""
    counts = Counter(name for row in rows if row.unlabeled for name in {text.source for text in row.external})
    if not counts or not config.proposals.external:
        return ""
    trust = "by the pool" if config.reward.trusts_by_pool else config.reward.trust or "none: members like any"
    about = f"; reward.trust {trust}" if config.needs_reward else ""
    return ", ".join(f"{count} rows of {name}" for name, count in sorted(counts.items())) + about


def reward_line(config: RewardConfig) -> str:
    """The reward's name and weights, e.g. ``llm, alpha 1.4, beta 2.8``."""
    if config.scaled_by_pool:
        beta = "2·alpha" if config.beta is None else f"{config.beta:g}"
        return f"{config.name}, alpha by the pool's spread (factor {config.spread_factor:g}), beta {beta}"
    return f"{config.name}, alpha {config.weights[0]:g}, beta {config.weights[1]:g}" if config.weighed else config.name
