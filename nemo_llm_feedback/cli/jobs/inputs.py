"""What a run reads, known by contents: manifests with audio, terms, templates, the starting checkpoint, the LLM."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_llm_feedback.data.manifests import expand_paths, read_manifest
from nemo_llm_feedback.llm.folder import local_folder

# Sections whose values may name files; the run writes the score cache itself.
_SECTIONS, _WRITTEN = ("model", "context", "guards", "reward", "llm"), ("cache",)
# Larger files are known by their size and blocks spread over them: a changed weight changes a file everywhere.
_WHOLE, _WHOLE_AUDIO = 2**26, 2**16
_BLOCKS, _BLOCK = 16, 2**12


def input_digests(tree: Mapping[str, Any], *, base: Path, llm: bool) -> dict[str, str]:
    """What a run reads → a digest of its contents.

    Args:
        tree: all sections of ``adapt`` as plain mappings, checked.
        base: the starting checkpoint.
        llm: whether the LLM of the section ``llm`` is asked.

    Raises:
        ManifestError: a manifest cannot be read.
    """
    named = [Path(text).expanduser() for text in _texts([tree.get(name) for name in _SECTIONS])]
    files = {str(path): [path] for path in [base, *named] if os.path.isfile(path)}
    if llm and not os.path.isfile(Path(tree["llm"]["model"]).expanduser()):
        folder = local_folder(tree["llm"]["model"], tree["llm"].get("revision"), key="llm.model")
        files["llm.model"] = sorted(path for path in folder.iterdir() if path.is_file())
    found = {name: _digest(paths, whole=_WHOLE) for name, paths in files.items()}
    for section in (tree["model"].get("train_ds"), tree["model"].get("validation_ds"), tree.get("guards")):
        section = section or {}
        for manifest in expand_paths(section.get("manifest_filepath") or []):
            tarred = bool(section.get("is_tarred") or section.get("tarred_audio_filepaths"))
            audio = {} if tarred else {row.audio: Path(row.audio) for row in read_manifest(manifest)}
            found[f"the audio of {manifest}"] = _digest(filter(os.path.isfile, audio.values()), whole=_WHOLE_AUDIO)
    return found


def changed_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what differs, or is read only then or only now."""
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


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
