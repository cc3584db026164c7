"""Reads the parts of a ``.nemo`` that may be damaged or hostile: one error per fault, bounded sizes, nothing executed.

NeMo trusts what it restores: it resolves ``${oc.env:…}`` in the configuration, takes a tokenizer from any path and
puts both into the next ``.nemo``, expands YAML aliases without end, and allocates what the configuration asks for.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm_feedback.core.errors import CheckpointError

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"

# The files of an archive may be this many times as large as the archive, which weights do not let compress.
_MAX_GROWTH, _MAX_FILES = 20, 1000
# The largest configurations of released models have some 30,000 values (three lists of a large vocabulary).
_MAX_CONFIG_BYTES, _MAX_VALUES, _MAX_DEPTH = 16 * 2**20, 10**6, 50
# No size of a layer is larger.
_MAX_SIZE = 10**6
_SIZED = ("preprocessor", "encoder", "decoder", "joint", "aux_ctc")
# Files that NeMo's decoders read when a model is built.
_READ_BY_DECODERS = ("ngram_lm_model", "kenlm_path", "model_path", "key_phrases_file")
# NeMo would write files by these, wherever they say.
_DEBUGGING = ("nsys_profile", "memory_profile", "chakra_profile", "dump_debug_info", "dump_debug_info_to_file")
# Key of the tokenizer's section → the file's name in old archives, which do not name it.
_TOKENIZER = {"model_path": "tokenizer.model", "vocab_path": "vocab.txt", "spe_tokenizer_vocab": "tokenizer.vocab"}


def read_files(path: str | Path, names: Mapping[str, int]) -> tuple[dict[str, int], dict[str, bytes]]:
    """Checks an archive and reads some of its files.

    Args:
        path: a ``.nemo``.
        names: files to read, each with the most bytes that it may have.

    Returns:
        Name → size in bytes of all files, and name → content of those asked for.

    Raises:
        CheckpointError: no such file, not an archive, or one that is damaged, lacks a file, grows beyond all measure
            when it is unpacked, or has names outside it, links or devices.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a .nemo checkpoint or a pretrained NeMo name.")
    try:
        with _opened(file) as archive:
            members = _members(archive, path, limit=_MAX_GROWTH * file.stat().st_size + 2**20)
            for name, most in names.items():
                if name not in members:
                    raise CheckpointError(f"{path} is not a .nemo checkpoint: it has no {name}.")
                if members[name].size > most:
                    raise CheckpointError(f"{path}: its {name} has {members[name].size} bytes, {most} at most.")
            content = {name: archive.extractfile(members[name]).read() for name in names}  # type: ignore[union-attr]
            return {name: member.size for name, member in members.items()}, content
    except CheckpointError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise CheckpointError(
            f"{path} is not a .nemo checkpoint, or a damaged one ({type(error).__name__}: {error}); get it again. A "
            "Lightning .ckpt becomes one by `nemo-llm-feedback export CKPT --base BASE.nemo`."
        ) from None


def _opened(file: Path) -> tarfile.TarFile:
    """A plain tar, or a gzipped one of NeMo before 1.7; NeMo opens no others."""
    try:
        return tarfile.open(file, "r:")
    except tarfile.ReadError:
        return tarfile.open(file, "r:gz")


def _members(archive: tarfile.TarFile, path: str | Path, *, limit: int) -> dict[str, tarfile.TarInfo]:
    """Name → member of all files; the sizes are known before a byte is unpacked."""
    files: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        name = posixpath.normpath(member.name)
        if name.startswith(("/", "..")) or not (member.isreg() or member.isdir()):
            raise CheckpointError(f"{path} is unsafe: {member.name[:100]!r} leads out of the archive or is no file.")
        if member.isdir():
            continue
        limit -= member.size
        if name in files or limit < 0 or len(files) > _MAX_FILES:
            raise CheckpointError(f"{path} is unsafe: it has two files of one name, too many, or huge ones: {name!r}.")
        files[name] = member
    return files


def read_config(path: str | Path) -> DictConfig:
    """The model configuration inside a ``.nemo``, made safe to restore; the weights are not touched.

    Paths of the tokenizer name files of the archive, and what would make NeMo write debugging files is left out.

    Raises:
        CheckpointError: the file is missing or not a ``.nemo``; or its configuration cannot be read, refers to the
            environment or to files outside the archive, or asks for absurd sizes.
    """
    files, content = read_files(path, {CONFIG: _MAX_CONFIG_BYTES})
    try:
        text = content[CONFIG].decode("utf-8")
        _check_size(text)
        tree: Any = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: its {CONFIG} cannot be read ({type(error).__name__}: {reason}).") from None
    if not isinstance(tree, dict) or "model" in tree:
        raise CheckpointError(f"{path}: its {CONFIG} is not the configuration of a model.")
    for key, value in _leaves(tree, ()):
        _check_value(path, key, value)
    if isinstance(tree.get("tokenizer"), dict):
        _take_inside(tree["tokenizer"], path, files)
    return DictConfig({key: value for key, value in tree.items() if key not in _DEBUGGING})


def _check_size(text: str) -> None:
    """Raises a ValueError for YAML that is nested or, by its aliases, multiplied beyond all measure."""
    known: dict[str, int] = {}  # anchor → values that an alias of it stands for
    levels: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append((event.anchor, 0))
        elif isinstance(event, yaml.AliasEvent):
            size = known.get(event.anchor, _MAX_VALUES + 1)  # an alias inside what it stands for has no end
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor:
                known[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, inner = levels.pop()
            size = inner + 1
            if anchor:
                known[anchor] = size
        levels[-1] = levels[-1][0], levels[-1][1] + size
        if levels[-1][1] > _MAX_VALUES or len(levels) > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_VALUES} values, or nested deeper than {_MAX_DEPTH}")


def _leaves(tree: Any, key: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(key path, value) of everything that is neither mapping nor list."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield key, tree
        return
    for name, value in items:
        yield from _leaves(value, (*key, name))


def _check_value(path: str | Path, key: tuple[Any, ...], value: Any) -> None:
    """Refuses a value that would read something outside the archive, or allocate without end."""
    where = f"{path}: {'.'.join(map(str, key))} in its configuration"
    if isinstance(value, str) and "${" in value:
        raise CheckpointError(
            f"{where} is {value[:80]!r}. NeMo writes no such references into a .nemo, and one could put a variable of "
            "this machine's environment into what is exported: restore it where you trust it and save it again."
        )
    read = key[-1] in _READ_BY_DECODERS and "decoding" in key and isinstance(value, str)
    # A file that is missing may stand in a section that NeMo does not read.
    if read and os.path.exists(value) and not os.path.isfile(value):
        raise CheckpointError(f"{where} names {value[:80]}, which is no regular file: set it to null.")
    if isinstance(value, int) and abs(value) > _MAX_SIZE and key[0] in _SIZED:
        raise CheckpointError(f"{where} is {value}, larger than any layer ({_MAX_SIZE} at most).")


def _take_inside(tokenizer: dict[str, Any], path: str | Path, files: Mapping[str, int]) -> None:
    """Names every file of a tokenizer as the file of the archive that it is; one that is optional may be missing."""
    wanted = {"vocab_path"} if tokenizer.get("type") == "wpe" else {"model_path", "vocab_path"}
    if tokenizer.get("type") == "agg":
        return
    for key in wanted | {"spe_tokenizer_vocab"}:
        given = str(tokenizer.get(key) or _TOKENIZER[key])
        name = posixpath.basename(given.removeprefix("nemo:"))
        if name not in files and key in wanted:
            raise CheckpointError(
                f"{path}: tokenizer.{key} in its configuration is {given[:80]!r}, which is not inside the archive; "
                "restore it where that file is and save it again."
            )
        tokenizer[key] = f"nemo:{name}" if name in files else None
