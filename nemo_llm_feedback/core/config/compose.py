"""Composes a run's settings with Hydra from the shipped folder and, before it, one of the user's."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm_feedback.core.config import SECTIONS, check_keys, plain
from nemo_llm_feedback.core.config.faults import keys_of, refuse
from nemo_llm_feedback.core.config.nemo_sections import TopLevel
from nemo_llm_feedback.core.config.renames import renamed
from nemo_llm_feedback.core.errors import ConfigError

# Sections that NeMo owns: they take any key, as in NeMo's scripts.
_OPEN = ("model", "trainer", "exp_manager")
_TOP = [*keys_of(TopLevel), *SECTIONS, *_OPEN, "hydra"]
# Keys of NeMo's example scripts.
_NEMO_NAMES = {
    "model_path": "init_from_nemo_model",
    "pretrained_name": "init_from_pretrained_model",
    "dataset_manifest": "++model.train_ds.manifest_filepath",
    "output_filename": "output",
}
_GROUPS = {"objective": "mwer", "reward": "entity", "llm": "int8", "trainer": "gpu"}


def conf_dir() -> Path:
    """The folder of the shipped configurations: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parents[2] / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "conf"


def compose_config(
    overrides: Sequence[str], *, config_name: str = "adapt", config_dir: str | None = None
) -> DictConfig:
    """Composes the configuration of ``adapt``.

    Args:
        overrides: Hydra overrides, ``key=value``; NeMo's sections accept new keys without ``+``.
        config_name: the configuration to start from.
        config_dir: a folder of the user's, searched before the shipped one.

    Raises:
        ConfigError: an override or a configuration that Hydra cannot use, or an unknown key of ours.
    """
    folder = Path(config_dir).expanduser().absolute() if config_dir else conf_dir()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder.")
    search = [f"hydra.searchpath=[file://{conf_dir()}]"] if config_dir else []
    _refuse_choices(overrides)
    outer = get_gh_backup()  # of a program that uses Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            groups = {entry.name for base in (folder, conf_dir()) for entry in base.iterdir() if entry.is_dir()}
            cfg = compose(config_name, overrides=search + [_open(o, groups) for o in overrides])
            tree = plain(cfg)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(_kind(error, overrides)) from None
    finally:
        restore_gh_from_backup(outer)
    OmegaConf.set_struct(cfg, False)
    for key in ("exp_manager.exp_dir", "exp_manager.explicit_log_dir"):
        if str(where := OmegaConf.select(cfg, key)).startswith("~"):  # else a folder of this name is made
            OmegaConf.update(cfg, key, os.path.expanduser(where))
    check_keys(tree)
    # A key of the user's own may stand at the top where it is read by ``${key}``.
    used = OmegaConf.to_yaml(cfg)
    top = [key for key in map(str, tree) if key not in _TOP and f"${{{key}" not in used]
    refuse("the configuration has", [_unknown(key) for key in top])
    return cfg


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _TOP, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_TOP[:-1])}."
    return renamed(key) or f"unknown key {key}; {hint}"


def _kind(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's error in one line; of a first word that nothing knows, the nearest known one."""
    said = " ".join(str(error).split())
    heads = [re.split(r"[.@=]", override.lstrip("+~"), maxsplit=1)[0] for override in overrides]
    strange = [head for head in heads if head not in _TOP and re.search(rf"\b{re.escape(head)}\b", said)]
    if "Could not override" in said and strange:
        return _unknown(strange[0])
    hint = " Quote such a value, as in 'context.description=\"größer\"', or give the flag." if "Lexer" in said else ""
    return f"{said}{hint}" if said else f"Hydra cannot use {' '.join(overrides)}."


def _refuse_choices(overrides: Sequence[str]) -> None:
    """Refuses what Hydra takes for a choice of files and what is none: ``objective=[a,b]``, ``trainer=3``."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if key in _GROUPS and not re.fullmatch(r"[\w./-]*[A-Za-z_][\w./-]*", value) and equals:
            raise ConfigError(f"{override}: give one name, as in {key}={_GROUPS[key]}; its keys are set one by one.")


def with_defaults(settings: Any) -> dict[str, Any]:
    """The settings of a run as plain nested mappings, over the defaults of the command ``adapt``.

    Args:
        settings: mapping or OmegaConf config of any of its sections; what :func:`compose_config` gave is complete.

    Raises:
        ConfigError: unknown keys of ours, or a section of the wrong type.
    """
    given = OmegaConf.create(settings)
    chosen = {group: OmegaConf.select(given, f"{group}.name") for group in ("objective", "reward")}
    known = [f"{group}={name}" for group, name in chosen.items() if (conf_dir() / group / f"{name}.yaml").is_file()]
    if OmegaConf.select(given, "model.optim.name") not in (None, "adamw"):
        known.append("~model.optim.betas")  # other optimizers have none
    return plain(given if "exp_manager" in given else OmegaConf.merge(compose_config(known), given))


def _open(override: str, groups: set[str]) -> str:
    """Lets keys be set that the YAML does not show: NeMo's by right, ours are checked by name afterwards."""
    key, equals, value = override.partition("=")
    if key in _NEMO_NAMES:
        return f"{_NEMO_NAMES[key]}{equals}{value}"
    if override[:1] in "+~" or key in groups or "=" not in override:
        return override
    section = key.split(".", 1)[0]
    return f"++{override}" if "." in key and section in (*_OPEN, *SECTIONS) else override
