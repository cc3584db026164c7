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
from helpers.tiny import write_audio, write_manifest
from omegaconf import OmegaConf

from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.config.renames import RENAMED

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?```(?P<kind>bash|python|yaml)\n(?P<code>.*?)^```", re.M | re.S
)

# What a text says → what is run in its place, so that it takes seconds and needs no GPU.
QUICK = ("trainer=cpu", "trainer.max_steps=2", "model.optim.lr=1e-4", "proposals.max_symbols=3", "guards.every=0")
SHORTER = {
    '"trainer=gpu"': ", ".join(f'"{setting}"' for setting in QUICK),
    "trainer=gpu": " ".join(QUICK),
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
    for i in range(2):
        write_audio(folder / "audio" / f"{i}.wav", seconds=1.0, seed=i)
    (folder / "menu.json").write_text('["latte", "mocha", "soy milk"]', encoding="utf-8")
    command = folder / "bin" / "nemo-llm-feedback"  # of this checkout, whatever is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nemo_llm_feedback.cli.main "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return folder


@pytest.mark.parametrize(("kind", "code"), _blocks())
def test_code_in_the_docs_runs(kind: str, code: str, place: Path) -> None:
    for said, run in SHORTER.items():
        code = code.replace(said, run)
    if kind == "yaml":
        assert yaml.safe_load(code)
        return
    paths = os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def test_every_page_is_linked_from_readme_or_results() -> None:
    linked = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    assert [page.name for page in PAGES if page.name != "README.md" and page.name not in linked] == []


def test_links_inside_the_docs_lead_somewhere() -> None:
    lost = []
    pages = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "examples").rglob("README.md")]
    for page in pages:
        for name, heading in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / name if name else page
            if not target.exists() or (heading and heading not in _headings(target)):
                lost.append(f"{page.relative_to(ROOT)}: {name}#{heading}")
    assert lost == []


def _headings(page: Path) -> set[str]:
    """The headings of a page as GitHub writes them behind a #."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_no_page_says_an_old_name() -> None:
    """The changelog's table of renames is where old names stand; tables of earlier results name their own commit."""
    old = [name for name in RENAMED if "." in name or name.startswith("--") or name == "replay=anchor"]
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "conf").rglob("*.yaml")]
    pages += [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".md", ".py")]
    said = [f"{page.relative_to(ROOT)}: {name}" for page in pages for name in old if _says(page, name)]
    assert said == []


def _says(page: Path, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", page.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "docs/rewards.md"])
def test_settings_that_the_pages_name_exist(name: str) -> None:
    """`section.key=value` in the text is a key of the command's configuration."""
    cfg = compose_config([])
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:feedback|proposals|parameters|guards|context|objective)\.[a-z_]+)\b(?!\.)", text))
    forms = {key for path in (ROOT / "conf" / "objective").glob("*.yaml") for key in yaml.safe_load(path.read_text())}
    lost = [key for key in sorted(named) if OmegaConf.select(cfg, key, default="?") == "?"]
    assert [key for key in lost if key.removeprefix("objective.") not in forms] == []
