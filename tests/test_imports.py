"""Imports go downward only, and heavy libraries stay in the rooms that are meant for them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "nemo_llm_feedback"

# One layer a line, lowest first; a module may import from its own layer and those below.
LAYERS = [
    {"errors", "types", "config", "normalize"},
    {"trie", "likelihood", "group_math", "objectives", "error_counts", "entities", "metrics", "tables", "sampling"},
    {"llm", "prompts", "rewards", "manifests", "checkpoints", "records", "comparison", "predictions"},
    {
        "heads",
        "lora",
        "reference",
        "swaps",
        "proposals",
        "groups",
        "scales",
        "batches",
        "losses",
        "supervision",
        "distributed",
        "loaders",
        "resuming",
    },
    {"preparation", "survey", "anchor", "feedback", "rescoring"},
    {"models"},
    {"evaluation", "nbest", "training", "report", "model_card"},
    {"composition", "jobs", "commands", "cli", "run"},
]
TORCH_ONLY = {"trie", "likelihood", "group_math", "objectives"}
ALLOWED_TRANSFORMERS = {"llm", "rewards"}


def _modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _layer(room: str) -> int:
    return next(k for k, layer in enumerate(LAYERS) if room in layer)


def test_every_module_has_a_layer() -> None:
    assert {_room(p) for p in _modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    room = _room(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "nemo_llm_feedback" and len(parts) > 1:
            # conf_dir is the one name that composition borrows from the light-weight cli.
            assert _layer(parts[1]) <= _layer(room), f"{room} imports {parts[1]} from above"
        if parts[0] == "nemo":
            assert room not in TORCH_ONLY
        if parts[0] in ("transformers", "bitsandbytes", "accelerate"):
            assert room in ALLOWED_TRANSFORMERS, f"{room} imports {parts[0]}"
