"""Shared fixtures. Tests use one thread: tiny models are slower on two."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
with contextlib.suppress(ImportError):  # `make gpu-check` runs in an environment of users, which has pytest alone
    from hypothesis import settings

    settings.register_profile("the same examples in every run", derandomize=True)
    settings.load_profile("the same examples in every run")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, alone or behind others; Hypothesis likewise, by its profile."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _heard() -> None:
    """Our loggers reach ``caplog``, though short commands call NeMo's ``setLevel``, which quiets pytest's handlers."""
    for handler in logging.root.handlers:
        handler.setLevel(logging.NOTSET)
    logging.getLogger("nemo_llm_feedback").setLevel(logging.INFO)


@pytest.fixture(autouse=True, scope="session")
def _exact() -> Iterator[None]:
    """``llm.compute_dtype=auto`` is float32 on every CPU, so that scores do not depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_llm_feedback.llm.loading._has_fast_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real speech and checkpoints; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real speech and checkpoints) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BPE tokenizer in NeMo's layout."""
    from helpers.tiny import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def nemo_file(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Callable[[str], Path]:
    """``nemo_file(kind)`` gives a stock ``.nemo`` of a tiny model, built once a session."""
    from helpers.tiny import build_nemo

    folder = tmp_path_factory.mktemp("nemo")
    built: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in built:
            built[kind] = build_nemo(kind, folder / f"{kind}.nemo", tokenizer_dir=tokenizer_dir)
        return built[kind]

    return get


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random causal LM."""
    from helpers.tiny_llm import make_tiny_llm

    return make_tiny_llm(tmp_path_factory.mktemp("llm"))
