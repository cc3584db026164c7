"""Every code block of README and docs runs, on tiny stand-ins under the names that the text uses.

A block that cannot run here stands behind a comment ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny import write_manifest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?```(?P<kind>bash|python|yaml)\n(?P<code>.*?)^```", re.M | re.S
)

# What a text says → what is run in its place, so that it takes seconds and needs no GPU.
SHORTER = {
    "trainer=gpu": "trainer=cpu trainer.max_steps=2 model.optim.lr=1e-4 proposals.max_symbols=3 guards.every=0",
    "max_steps=200": "max_steps=2",
}


def _blocks() -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[: match.start("code")].count("\n")
            name = f"{page.relative_to(ROOT)}:{line}"
            marks = [] if match["kind"] == "yaml" else [pytest.mark.slow]
            if match["reason"]:
                marks.append(pytest.mark.skip(reason=match["reason"]))
            found.append(pytest.param(match["kind"], match["code"], id=name, marks=marks))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, nemo_file: Any, tiny_llm: Path) -> Path:
    """A folder in which the files that the texts name exist."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("base.nemo", "adapted.nemo", "run1.nemo", "run2.nemo", "run3.nemo"):
        shutil.copy(nemo_file("ctc_bpe"), folder / name)
    pretrained = folder / "nvidia" / "stt_en_fastconformer_transducer_large"
    pretrained.parent.mkdir()
    shutil.copy(nemo_file("rnnt_bpe"), pretrained)
    shutil.copytree(tiny_llm, folder / "Qwen" / "Qwen2.5-7B-Instruct")
    write_manifest(folder / "calls_unlabeled.json", [None] * 12)
    write_manifest(folder / "dev.json", ["a latte", "one mocha", "soy milk"], entities=[["latte"], ["mocha"], []])
    (folder / "audio").mkdir()
    for path in sorted(folder.glob("*.wav"))[:2]:
        shutil.copy(path, folder / "audio")
    (folder / "menu.json").write_text('["latte", "mocha", "soy milk"]', encoding="utf-8")
    return folder


@pytest.mark.parametrize(("kind", "code"), _blocks())
def test_code_in_the_docs_runs(kind: str, code: str, place: Path) -> None:
    for said, run in SHORTER.items():
        code = code.replace(said, run)
    if kind == "yaml":
        assert yaml.safe_load(code)
        return
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def test_every_page_is_linked_from_readme_or_results() -> None:
    linked = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(page.name in linked for page in PAGES if page.name != "README.md")


def test_links_inside_the_docs_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists() or (ROOT / target).exists(), f"{page.name}: {target}"
