"""The mutants of ``tests/mutants`` still fit the code: each can be applied, and the test that kills it is there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from mutants.table import MUTANTS, Mutant

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "nemo_llm_feedback"


@cache
def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutant_can_be_applied_and_its_test_exists(mutant: Mutant) -> None:
    text = (PACKAGE / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    ast.parse(text.replace(mutant.old, mutant.new))
    file, _, function = mutant.test.partition("::")
    assert function in _functions(TESTS / file)


def test_mutants_are_many_and_differ() -> None:
    assert len(MUTANTS) >= 30
    assert len({mutant.what for mutant in MUTANTS}) == len({(m.file, m.new, m.old) for m in MUTANTS}) == len(MUTANTS)
