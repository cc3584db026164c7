"""The folder of a run: a new one, or that of an unfinished run of the same settings and inputs; locked before use.

Inputs are known by contents: manifests with audio, terms, templates, the starting checkpoint, the LLM.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.core import run_folder as files
from nemo_llm_feedback.core.config import LLMConfig, plain
from nemo_llm_feedback.core.console import show
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.secrets import masked, masked_command
from nemo_llm_feedback.data.manifests import expand_paths, read_manifest
from nemo_llm_feedback.llm.folder import resolve_folder

# The folder that rank 0 chose, for the ranks that Lightning starts as copies of this process.
_CHOICE = "NEMO_LLM_FEEDBACK_RUN"
# Keys that another start of the same run may change.
_FREE_KEYS = ("resume", "hydra", "verbose", "output")
# Sections whose values may name files; the run writes the score cache itself.
_SECTIONS, _WRITTEN = ("model", "context", "guards", "reward", "llm"), ("cache",)
# Larger files are known by their size and blocks spread over them: a changed weight changes a file everywhere.
_WHOLE, _WHOLE_AUDIO = 2**26, 2**16
_BLOCKS, _BLOCK = 16, 2**12


@contextmanager
def run_folder(cfg: DictConfig, inputs: Mapping[str, str]) -> Iterator[DictConfig]:
    """Chooses the run's folder, and marks it as this process's while inside, before anything in it is touched.

    A run that was stopped or killed goes on when the same command is given again (``resume=auto``): its folder holds
    the same settings and digests of inputs, no result, and no living process. ``exp_manager.resume_if_exists=true``
    keeps NeMo's meaning. A new folder is removed again if the run is refused before it begins.

    Args:
        cfg: the composed configuration.
        inputs: what the run reads (:func:`input_digests`).

    Yields:
        The settings of NeMo's ``exp_manager``.

    Raises:
        ConfigError: another process trains in the folder.
    """
    manager: Any = OmegaConf.create(plain(cfg.exp_manager))
    # NeMo's answer to SIGTERM ends a job with status 0, as if it were done.
    manager.create_preemption_callback = False
    first, created = is_global_rank_zero(), None
    base = Path(manager.get("exp_dir") or "nemo_experiments") / str(manager.get("name") or "default")
    folder: Path | None
    if manager.get("explicit_log_dir") or manager.get("version") or manager.get("resume_if_exists"):
        folder = Path(manager.get("explicit_log_dir") or base / str(manager.get("version") or ""))
    elif not first and os.environ.get(_CHOICE):
        folder = Path(os.environ[_CHOICE])
        manager.resume_if_exists = any(folder.glob("checkpoints/*.ckpt"))
    else:
        resumes = cfg.get("resume", "auto") == "auto"
        folder = _unfinished(base, settings_text(cfg), inputs) if resumes else None
        if folder is not None:
            manager.resume_if_exists = True
            show(f"going on with the unfinished run in {folder} (resume=never starts anew).")
        elif first:
            folder = created = _new_folder(base, dated=bool(manager.get("use_datetime_version")))
    if folder is not None:
        manager.explicit_log_dir, manager.exp_dir, manager.version = str(folder), None, None  # NeMo takes one of them
    if not first or folder is None:
        _take_up(manager)
        yield manager
        return
    os.environ[_CHOICE] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.FolderLock(folder) as lock:
        if not lock.held:
            raise ConfigError(f"another process is training in {folder}: wait for it, or choose another run folder.")
        files.collect(folder)
        if manager.get("resume_if_exists") and (changed := changed_inputs(folder, inputs)):
            show(f"warning: {', '.join(changed)} changed since this run began, and it goes on as you ask for it.")
        _take_up(manager)
        try:
            yield manager
        finally:
            os.environ.pop(_CHOICE, None)
            if created is not None and files.newest(created, files.RUN_FILE) is None:
                shutil.rmtree(created, ignore_errors=True)


def settings_text(cfg: DictConfig) -> str:
    """The composed configuration as YAML without secrets, by which runs are known to be the same."""
    return OmegaConf.to_yaml(OmegaConf.create(masked({k: v for k, v in plain(cfg).items() if k not in _FREE_KEYS})))


def record_start(cfg: DictConfig, folder: Path, *, checkpoint: str | None, inputs: Mapping[str, str]) -> None:
    """Writes ``settings.yaml`` and ``run.json`` (versions, command, date of every attempt, digests of the inputs;
    nothing about the host, and no secrets).

    Args:
        cfg: the composed configuration.
        folder: the run's folder.
        checkpoint: file name of what this attempt goes on from; None at the start.
        inputs: what the run reads (:func:`input_digests`).
    """
    files.collect(folder)
    settings, run = folder / files.SETTINGS_FILE, folder / files.RUN_FILE
    attempts = json.loads(run.read_text(encoding="utf-8"))["attempts"] if run.is_file() and settings.is_file() else []
    attempts.append({"started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "from": checkpoint})
    if (nemos := folder / "cmd-args.log").is_file():  # exp_manager's copy of the command
        nemos.write_text(" ".join(own_command()), encoding="utf-8")
    content = {"command": own_command(), "versions": files.package_versions(), "attempts": attempts, "inputs": inputs}
    files.write_json(run, content)
    (folder / files.RESULT_FILE).unlink(missing_ok=True)
    files.write_text(settings, settings_text(cfg))


def changed_inputs(folder: Path, now: Mapping[str, str]) -> list[str]:
    """Names of what a run has read otherwise than it would now, or not at all; none if it has recorded nothing.

    Args:
        folder: of the run, which an earlier version of this package may have begun.
        now: what it would read (:func:`input_digests`).
    """
    run = files.newest(folder, files.RUN_FILE)
    then: dict[str, str] = (json.loads(run.read_text(encoding="utf-8")).get("inputs") if run else None) or {}
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name)) if then else []


def input_digests(tree: Mapping[str, Any], *, base: Path, llm: bool) -> dict[str, str]:
    """What a run reads → a digest of its contents.

    Args:
        tree: all sections of ``adapt`` as plain mappings, checked.
        base: the starting checkpoint.
        llm: whether the LLM of the section ``llm`` is asked.

    Raises:
        ManifestError: a manifest cannot be read.
    """
    # `~` of a description is no user's name, for which `Path.expanduser` raises.
    named = [Path(os.path.expanduser(text)) for text in _texts([tree.get(name) for name in _SECTIONS])]
    parts = {str(path): [path] for path in [base, *named] if os.path.isfile(path)}
    if llm and not os.path.isfile(os.path.expanduser(tree["llm"]["model"])):
        folder = Path(os.path.expanduser(tree["llm"]["model"]))
        if not folder.is_dir():  # of a hub id the small files are judged before the weights are fetched
            folder = resolve_folder(LLMConfig(**tree["llm"]))
        parts["llm.model"] = sorted(path for path in folder.iterdir() if path.is_file())
    found = {name: _digest(paths, whole=_WHOLE) for name, paths in parts.items()}
    for section in (tree["model"].get("train_ds"), tree["model"].get("validation_ds"), tree.get("guards")):
        section = section or {}
        for manifest in expand_paths(section.get("manifest_filepath") or []):
            tarred = bool(section.get("is_tarred") or section.get("tarred_audio_filepaths"))
            audio = {} if tarred else {row.audio: Path(row.audio) for row in read_manifest(manifest)}
            found[f"the audio of {manifest}"] = _digest(filter(os.path.isfile, audio.values()), whole=_WHOLE_AUDIO)
    return found


def own_command() -> list[str]:
    """The command of this process, without secrets."""
    return masked_command([Path(sys.argv[0]).name, *sys.argv[1:]])


def _new_folder(base: Path, *, dated: bool) -> Path:
    """Makes the folder of a new run, named as NeMo names it; of two processes each gets one."""
    base.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix("version_") for path in base.glob("version_*")]
    number = max((int(name) for name in taken if name.isdigit()), default=-1) + 1
    while True:
        folder = base / (time.strftime("%Y-%m-%d_%H-%M-%S") if dated else f"version_{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            time.sleep(1.0 if dated else 0.0)


def _unfinished(base: Path, settings: str, inputs: Mapping[str, str]) -> Path | None:
    """The newest folder of the same settings and inputs that has no result and no living process."""
    first = is_global_rank_zero()
    folders = [path for path in base.iterdir() if path.is_dir()] if base.is_dir() else []
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if first and files.in_use(folder):
            continue
        # A rank that the launcher started reads while rank 0, which may hold the folder already, moves its files.
        known = files.newest(folder, files.SETTINGS_FILE)
        if known is None or files.newest(folder, files.RESULT_FILE) is not None:
            continue
        if known.read_text(encoding="utf-8") != settings:
            show(f"{folder} holds an unfinished run of other settings; its command goes on with it.")
        elif first and (changed := changed_inputs(folder, inputs)):
            show(
                f"{folder} holds an unfinished run of these settings, but {', '.join(changed)} changed since: a new "
                "run begins. To go on with that one on what there is now, add "
                f"exp_manager.explicit_log_dir={folder} exp_manager.resume_if_exists=true."
            )
        else:
            return folder
    return None


def _take_up(manager: DictConfig) -> None:
    """Names the checkpoint to go on from where NeMo would not find it."""
    if manager.get("resume_if_exists") and manager.get("explicit_log_dir"):
        checkpoint = _newest_checkpoint(Path(manager.explicit_log_dir) / "checkpoints")
        if checkpoint is not None and not checkpoint.stem.endswith("last"):
            manager.resume_from_checkpoint = str(checkpoint)


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, after removing what a kill has left of others.

    NeMo refuses a folder with two checkpoints named ``last``, which a kill between writing one and removing the other
    leaves, as does every second resumption; and one whose only ``last`` is unfinished.
    """
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    whole = [path for path in found if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)]
    lasts = [path for path in whole if path.stem.endswith("last")]
    if is_global_rank_zero():
        for path in [path for path in found if path not in whole] + lasts[:-1]:
            path.unlink()
        for marker in folder.glob(f"*{NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX}"):
            marker.unlink()
    return lasts[-1] if lasts else (whole[-1] if whole else None)


def _texts(node: Any) -> Iterator[str]:
    """Every text of nested settings, lists in NeMo's notation spread out."""
    if isinstance(node, Mapping):
        yield from _texts([value for key, value in node.items() if key not in _WRITTEN])
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield from (node, *expand_paths(node))


def _digest(paths: Iterable[Path], *, whole: int) -> str:
    """One digest of the contents of some files.

    Args:
        paths: existing files, in a fixed order.
        whole: largest size of a file that is read whole, in bytes.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode())
            if size <= whole:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
