"""The shape of the package: ten rooms, imports that go downward only, no circle, heavy libraries in few places."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "nemo_llm_feedback"

# Highest first: a module imports from its own room and from those below it.
ROOMS = ["cli", "training", "rescoring", "evaluation", "hypotheses", "rewards", "llm", "asr", "data", "core"]
MOST_FLOORS = 8
TORCH_ONLY = ("core.trie", "asr.likelihood", "training.objectives", "training.group_math")
TRANSFORMERS = ("llm",)
LAZY = "the Python API imports NeMo on first use; no room imports it"


@cache
def _modules() -> dict[str, Path]:
    """Dotted name under the package → file; ``core`` for the file ``core/__init__.py``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def _imports(name: str) -> frozenset[str]:
    """Everything that a module imports, also inside functions; ours as dotted names under the package."""
    found = set()
    for node in ast.walk(ast.parse(_modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _ours(name: str) -> set[str]:
    """The package's modules that a module imports, without the packages that it lies in itself."""
    found = {i.removeprefix("nemo_llm_feedback.") for i in _imports(name) if i.startswith("nemo_llm_feedback.")}
    return {i for i in found if i in _modules() and i != name and not name.startswith(f"{i}.")}


def _room(name: str) -> str:
    return name.split(".")[0]


def test_the_package_has_ten_rooms_and_nothing_beside_them() -> None:
    flat = {name for name in _modules() if "." not in name and _modules()[name].name != "__init__.py"}
    assert flat == set()
    assert {_room(name) for name in _modules() if name} == set(ROOMS)


@pytest.mark.parametrize("name", [n for n in _modules() if n])
def test_imports_go_downward(name: str) -> None:
    for other in _ours(name):
        assert ROOMS.index(_room(other)) >= ROOMS.index(_room(name)), f"{name} imports {other} from above"
    assert "nemo_llm_feedback" not in _imports(name), LAZY


def test_no_circle_between_modules() -> None:
    TopologicalSorter({name: _ours(name) for name in _modules()}).prepare()


def test_no_circle_between_rooms_and_few_floors() -> None:
    rooms = {room: {_room(o) for n in _modules() if _room(n) == room for o in _ours(n)} - {room} for room in ROOMS}
    floor: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        floor[room] = 1 + max((floor[below] for below in rooms[room]), default=0)
    assert max(floor.values()) <= MOST_FLOORS, floor


@pytest.mark.parametrize("name", [n for n in _modules() if n])
def test_heavy_libraries_stay_where_they_belong(name: str) -> None:
    top = {i.split(".")[0] for i in _imports(name)}
    if name.startswith(TORCH_ONLY):
        assert "nemo" not in top
    if not name.startswith(TRANSFORMERS):
        assert not top & {"transformers", "bitsandbytes", "accelerate"}


# Import name → name of the distribution, where they differ. accelerate, bitsandbytes, pyarrow and tensorboard are used
# by name.
DISTRIBUTIONS = {"nemo": "nemo_toolkit", "hydra": "hydra-core", "yaml": "pyyaml", "silero_vad": "silero-vad"}


def test_setup_declares_what_the_code_imports() -> None:
    declared = set(
        re.findall(r'"([A-Za-z0-9_-]+)(?:\[\w+\])?(?:[<>=!,.\d]*)"', (ROOT.parent / "setup.py").read_text())
    )
    imported = {i.split(".")[0] for name in _modules() for i in _imports(name)} - set(sys.stdlib_module_names)
    wanted = {DISTRIBUTIONS.get(name, name) for name in imported} - {"nemo_llm_feedback", "__future__"}
    assert wanted <= declared, wanted - declared
