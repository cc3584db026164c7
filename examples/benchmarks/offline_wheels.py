"""Fetches the wheels that this package needs on a machine without a network, beside a torch that is there.

    pip list --format=freeze > there.txt                                 # on that machine
    python examples/benchmarks/offline_wheels.py wheels --have there.txt # here; then carry the folder over
    make gpu-check WHEELS=wheels                                         # there

What is needed comes from setup.py with the versions of constraints-cuda.txt, through pip's resolver. Left out are
torch, CUDA, what --have names in a version that will do, what NeMo lists but never imports for recognition, and of
bitsandbytes the libraries for other versions of CUDA, which are nine tenths of it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in range(12, 36)]  # pip takes each by its very name
PLATFORMS += [f"manylinux{year}_x86_64" for year in ("1", "2010", "2014")]
SOURCE_ONLY = ("antlr4-python3-runtime==4.9.3", "docopt==0.6.2")  # for Hydra and num2words: no wheels on the index
TORCH = {"torch", "triton", "cuda-toolkit", "cuda-bindings", "cuda-pathfinder"}
UNUSED = {"wandb", "aistore", "sacrebleu", "cwevals"}  # logging, object stores, translation scores, text evaluation


def main() -> int:
    """Resolves, downloads and prints what the folder holds; 1 if it is larger than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the wheels")
    parser.add_argument("--have", type=Path, help="output of pip list --format=freeze on that machine")
    parser.add_argument("--python-version", default="3.12", help="of that machine")
    parser.add_argument("--limit-mb", type=float, default=60, help="largest size of all wheels")
    parser.add_argument("--without", nargs="+", default=[], help="leave these out: silero-vad serves prepare alone")
    parser.add_argument("--cuda", default="130", help="version of CUDA of that machine's torch (torch.version.cuda)")
    parser.add_argument("--dry-run", action="store_true", help="list the wheels and fetch none")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pip("wheel", "--no-deps", "--wheel-dir", options.folder, *SOURCE_ONLY)
    lines = options.have.read_text(encoding="utf-8").split() if options.have else []
    have = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    metadata = resolved(options.folder, options.python_version)
    wheels = list(needed({name: metadata[name] for name in metadata.keys() - set(options.without)}, have))
    print("\n".join(wheels))
    if options.dry_run:
        return 0
    pip("download", "--no-deps", "--dest", options.folder, *target(options.folder, options.python_version), *wheels)
    for wheel in options.folder.glob("bitsandbytes-*.whl"):
        keep_cuda(wheel, options.cuda.replace(".", ""))
    size = sum(file.stat().st_size for file in options.folder.glob("*.whl")) / 2**20
    print(f"{len(wheels)} wheels, {size:.0f} MB in {options.folder}")
    return int(size > options.limit_mb)


def pip(*arguments: Any) -> str:
    """What pip prints.

    Raises:
        SystemExit: pip failed; the message is its.
    """
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"pip {arguments[0]} failed:\n{run.stderr[-2000:]}")
    return run.stdout


def keep_cuda(wheel: Path, version: str) -> None:
    """Takes the libraries for other accelerators and other versions of CUDA out of the wheel of bitsandbytes.

    Raises:
        SystemExit: it has none for this version; the message names those that it has.
    """
    out = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old:
        libraries = {found for name in old.namelist() for found in re.findall(r"bytes_([^/]*)\.so$", name)}
    if f"cuda{version}" not in libraries:
        raise SystemExit(f"{wheel.name} has no library for --cuda {version}, only {', '.join(sorted(libraries))}.")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        others = {f"libbitsandbytes_{name}.so" for name in libraries if name not in ("cpu", f"cuda{version}")}
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                rows = csv.reader(io.StringIO(content.decode()))
                kept = io.StringIO()
                csv.writer(kept, lineterminator="\n").writerows(row for row in rows if Path(row[0]).name not in others)
                content = kept.getvalue().encode()
            if Path(item.filename).name not in others:
                new.writestr(item.filename, content)
    out.replace(wheel)


def target(folder: Path, version: str) -> list[str]:
    """The options of pip that choose wheels for the other machine."""
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    common = ["--only-binary=:all:", "--python-version", version, "--implementation", "cp"]
    return [*common, *platforms, "--find-links", str(folder.resolve())]


def resolved(folder: Path, version: str) -> dict[str, dict[str, Any]]:
    """Name → metadata of this package, pytest and all that they need on the other machine."""
    report = ["install", "--dry-run", "--ignore-installed", "--report", "-", "--use-feature=fast-deps"]
    ours = json.loads(pip(*report, "--no-deps", "."))["install"][0]["metadata"]
    direct = [line for line in ours["requires_dist"] if "extra ==" not in line]
    (folder / "requirements.txt").write_text("\n".join([*direct, "pytest"]) + "\n", encoding="utf-8")
    chosen = ["--target", folder / "site", *target(folder, version), "-c", "constraints-cuda.txt"]
    found = json.loads(pip(*report, *chosen, "-r", folder / "requirements.txt"))["install"]
    metadata = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in found}
    return {"": {"requires_dist": [*direct, "pytest"]}, **metadata}


def needed(metadata: dict[str, dict[str, Any]], have: Mapping[str, str]) -> Iterator[str]:
    """Walks from this package over what it needs, past what is there or left out; yields ``name==version``."""
    open_, seen = [("", frozenset[str]())], set[tuple[str, str]]()
    while open_:
        name, extras = open_.pop()
        for line in metadata[name].get("requires_dist", []):
            requirement = Requirement(line)
            marker, other = requirement.marker, canonicalize_name(requirement.name)
            if other in TORCH | UNUSED | {name} or other not in metadata:
                continue
            if other in have and requirement.specifier.contains(have[other], prereleases=True):
                continue
            if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                continue
            for extra in ("", *requirement.extras):
                if (other, extra) not in seen:
                    if not any(known == other for known, _ in seen):
                        yield f"{other}=={metadata[other]['version']}"
                    seen.add((other, extra))
                    open_.append((other, frozenset({extra})))


if __name__ == "__main__":
    sys.exit(main())
