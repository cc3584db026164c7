"""Damaged and hostile ``.nemo`` files, each made from a good one: what was changed, and what the error must name."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

CONFIG, WEIGHTS = "./model_config.yaml", "./model_weights.ckpt"
Files = dict[str, bytes]


class Code:
    """Unpickled, it runs a command that leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def unpack(nemo: Path) -> Files:
    """Name → content of the files of an archive."""
    with tarfile.open(nemo) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]


def pack(
    path: Path, files: Files, *, mode: str = "w:", extra: Callable[[tarfile.TarFile], None] | None = None
) -> Path:
    """Writes an archive; ``extra`` may add what is no plain file."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if extra is not None:
            extra(archive)
    return path


def with_config(files: Files, change: Callable[[dict[str, Any]], None]) -> Files:
    """The files with another configuration."""
    config = yaml.safe_load(files[CONFIG])
    change(config)
    return files | {CONFIG: yaml.safe_dump(config).encode()}


def with_value(files: Files, key: str, value: Any) -> Files:
    """The files with one value of the configuration changed; ``key`` is dotted."""

    def change(config: dict[str, Any]) -> None:
        *sections, last = key.split(".")
        for section in sections:
            config = config.setdefault(section, {})
        config[last] = value

    return with_config(files, change)


def with_weights(files: Files, change: Callable[[dict[str, Any]], Any]) -> Files:
    """The files with other weights."""
    weights = torch.load(io.BytesIO(files[WEIGHTS]), weights_only=True)
    changed = change(weights)
    buffer = io.BytesIO()
    torch.save(weights if changed is None else changed, buffer)
    return files | {WEIGHTS: buffer.getvalue()}


def _spoil(value: float) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        weights["encoder.pre_encode.out.weight"][0] = value

    return change


def _reshape(weights: dict[str, Any]) -> None:
    weights["encoder.pre_encode.out.weight"] = torch.zeros(3, 3)


def _link(kind: bytes, target: str) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo("./link")
        member.type, member.linkname = kind, target
        archive.addfile(member)

    return add


def _aliases(levels: int) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines).encode()


def _deflated(files: Files) -> Files:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**24)
    return files | {WEIGHTS: buffer.getvalue()}


def _hostile_weights(files: Files, marker: Path) -> dict[str, tuple[Files, str]]:
    """Name → archive with damaged or hostile weights, and a part of the message that it must give."""
    weights = files[WEIGHTS]
    return {
        "weights cut": (files | {WEIGHTS: weights[: len(weights) // 2]}, "cannot be restored"),
        "weights empty": (files | {WEIGHTS: b""}, "cannot be restored"),
        "weights are text": (files | {WEIGHTS: b"hello"}, "cannot be restored"),
        "weights run code": (files | {WEIGHTS: pickle.dumps(Code(marker))}, "cannot be restored"),
        "weights by torch run code": (with_weights(files, lambda _: {"a": Code(marker)}), "cannot be restored"),
        "weights are a list": (with_weights(files, lambda _: [1, 2]), "cannot be restored"),
        "weights compressed": (_deflated(files), "compressed"),
        "wrong shapes": (with_weights(files, _reshape), "size mismatch"),
        "a weight is missing": (with_weights(files, lambda w: dict(list(w.items())[1:])), "Missing key"),
        "NaN weight": (with_weights(files, _spoil(float("nan"))), "NaN or infinite"),
        "infinite weight": (with_weights(files, _spoil(float("inf"))), "NaN or infinite"),
    }


def hostile_files(good: Path, folder: Path, marker: Path) -> dict[str, tuple[Path, str]]:
    """Name → file and a part of the message that it must give.

    Args:
        good: a BPE checkpoint.
        folder: where they are written.
        marker: what appears where code of one of them has run.
    """
    files = unpack(good)
    model_path = next(name for name in files if name.endswith("tokenizer.model"))
    outside = folder / "secret.txt"
    outside.write_text("a secret\n")
    text = files[CONFIG].decode()
    lost = {name: {k: v for k, v in files.items() if k != name} for name in (CONFIG, WEIGHTS, model_path)}
    parts = with_config(files, lambda c: c.update({"a": "$", "b": "{oc.env:NEMO_SECRET}", "c": "${a}${b}"}))
    code = f"a: !!python/object/apply:os.system ['touch {marker}']".encode()
    foreign = {"_target_": "builtins.exec", "_args_": ["1"]}
    made: dict[str, tuple[Files, str]] = {
        "no configuration": (lost[CONFIG], "has no model_config.yaml"),
        "no weights": (lost[WEIGHTS], "has no model_weights.ckpt"),
        "no tokenizer": (lost[model_path], "not inside the archive"),
        "tokenizer of this machine": (
            with_value(files, "tokenizer.vocab_path", str(outside)),
            "not inside the archive",
        ),
        "tokenizer above": (with_value(files, "tokenizer.model_path", "nemo:../../etc/passwd"), "not inside"),
        "tokenizer is broken": (files | {model_path: b"\x07nonsense"}, "cannot be restored"),
        "environment": (with_value(files, "train_ds.manifest_filepath", "${oc.env:NEMO_SECRET}"), "environment"),
        "environment by parts": (parts, "no such references"),
        "reference": (with_value(files, "sample_rate", "${a.b}"), "no such references"),
        "broken YAML": (files | {CONFIG: text.encode() + b"\n  - {"}, "cannot be read"),
        "YAML is a list": (files | {CONFIG: b"- a\n- b\n"}, "not the configuration of a model"),
        "YAML is a word": (files | {CONFIG: b"hello"}, "no target class"),
        "YAML is empty": (files | {CONFIG: b""}, "no target class"),
        "YAML is binary": (files | {CONFIG: b"\xff\xfe\x00\x01"}, "cannot be read"),
        "YAML with a Python object": (files | {CONFIG: code}, "cannot be read"),
        "YAML bomb of aliases": (files | {CONFIG: _aliases(9)}, "more than"),
        "YAML alias inside itself": (files | {CONFIG: b"a: &a [*a]"}, "more than"),
        "deep YAML": (files | {CONFIG: b"a: " + b"[" * 2000 + b"]" * 2000}, "nest"),
        "YAML of 20 MB": (files | {CONFIG: b"a: " + os.urandom(10 * 2**20).hex().encode()}, "at most"),
        "number of 5000 digits": (files | {CONFIG: b"a: " + b"9" * 5000}, "cannot be read"),
        "section model": (with_value(files, "model", {"target": "x"}), "not the configuration of a model"),
        "foreign class": (with_value(files, "target", "os.system"), "cannot be adapted"),
        "foreign part": (with_value(files, "encoder._target_", "os.system"), "unsafe target"),
        "foreign preprocessor": (with_value(files, "preprocessor", foreign), "unsafe target"),
        "huge layer": (with_value(files, "encoder.d_model", 10**9), "larger than any layer"),
        "large layers": (with_value(files, "encoder.d_model", 20000), "larger model"),
        "many layers": (with_value(files, "encoder.n_layers", 5000), "larger model"),
        "negative layer": (with_value(files, "encoder.d_model", -4), "cannot be restored"),
        "layer is a word": (with_value(files, "encoder.n_layers", "two"), "cannot be restored"),
        "no encoder": (with_config(files, lambda config: config.pop("encoder")), "cannot be restored"),
        "decoder reads a device": (
            with_value(files, "decoding.greedy.ngram_lm_model", "/dev/zero"),
            "no regular",
        ),
        "name outside": (files | {"../outside": b"x"}, "unsafe"),
        "absolute name": (files | {"/absolute/outside": b"x"}, "unsafe"),
        "one name twice": (files | {"model_config.yaml": b"x"}, "two files of one name"),
    }
    found = {
        name: (pack(folder / f"{name}.nemo", content), words)
        for name, (content, words) in (made | _hostile_weights(files, marker)).items()
    }
    whole = good.read_bytes()
    raw = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "cut gzip": gzip.compress(whole)[:-900]}
    for name, content in raw.items():
        path = folder / f"{name}.nemo"
        path.write_bytes(content)
        found[name] = path, "not a .nemo checkpoint"
    links = {"symbolic link": (tarfile.SYMTYPE, "/etc/passwd"), "hard link": (tarfile.LNKTYPE, "../../x")}
    for name, (kind, target) in (links | {"device": (tarfile.CHRTYPE, ""), "pipe": (tarfile.FIFOTYPE, "")}).items():
        found[name] = pack(folder / f"{name}.nemo", files, extra=_link(kind, target)), "unsafe"
    bomb = pack(folder / "bomb.nemo", files | {"./zeros": b"\0" * 2**26}, mode="w:gz")
    return found | {"gzip bomb": (bomb, "huge"), "folder": (folder, "no such file")}
