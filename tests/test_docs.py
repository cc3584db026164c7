"""Every code block of README and docs runs, on tiny stand-ins under the names that the text uses.

A block that cannot run here stands behind a comment ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny import write_audio, write_manifest
from helpers.warm import warm_commands
from omegaconf import OmegaConf

from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.config.renames import RENAMED

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:[ ]*<!-- not run: (?P<reason>[^>]+) -->\n+)?"
    r"(?P<margin>[ ]*)```(?P<kind>bash|python|yaml)\n(?P<code>.*?)^(?P=margin)```",
    re.M | re.S,
)
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)

# What a text says → what is run in its place, so that it takes seconds and needs no GPU.
QUICK = ("trainer=cpu", "trainer.max_steps=2", "model.optim.lr=1e-4", "proposals.max_symbols=3", "guards.every=0")
SHORTER = {
    '"trainer=gpu"': ", ".join(f'"{setting}"' for setting in QUICK),
    "trainer=gpu": " ".join(QUICK),
    "max_steps=200": "max_steps=2",
}


def _blocks(*kinds: str) -> list[Any]:
    found = []
    for page in PAGES:
        if page.name == "commands.md":
            continue  # made from the help, whose examples tests/cli/test_cli.py tries
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["kind"] not in kinds:
                continue
            line = text[: match.start("code")].count("\n")
            name = f"{page.relative_to(ROOT)}:{line}"
            marks = [pytest.mark.skip(reason=match["reason"])] if match["reason"] else []
            found.append(pytest.param(match["kind"], textwrap.dedent(match["code"]), id=name, marks=marks))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, nemo_file: Any, tiny_llm: Path) -> Iterator[Path]:
    """A folder in which the files that the texts name exist."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("base.nemo", "adapted.nemo", "run1.nemo", "run2.nemo", "run3.nemo"):
        shutil.copy(nemo_file("ctc_bpe"), folder / name)
    pretrained = folder / "nvidia" / "stt_en_fastconformer_transducer_large"
    pretrained.parent.mkdir()
    shutil.copy(nemo_file("rnnt_bpe"), pretrained)
    shutil.copytree(tiny_llm, folder / "Qwen" / "Qwen2.5-7B-Instruct")
    write_manifest(folder / "calls_unlabeled.json", [None] * 12)
    for side in ("agent", "caller"):
        write_manifest(folder / f"{side}.json", [None] * 2)
    write_manifest(folder / "dev.json", ["a latte", "one mocha", "soy milk"], entities=[["latte"], ["mocha"], []])
    write_manifest(folder / "transcribed.json", ["a latte", "one mocha", "soy milk"] * 4)
    for i in range(2):
        write_audio(folder / "audio" / f"{i}.wav", seconds=1.0, seed=i)
    (folder / "menu.json").write_text('["latte", "mocha", "soy milk"]', encoding="utf-8")
    with warm_commands(folder / "bin", _environment()):
        yield folder


def _environment() -> dict[str, str]:
    """The commands are of this checkout, whatever is installed; coverage, which slows them, leaves them out."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("kind", "code"), _blocks("yaml"))
def test_yaml_in_the_docs_is_yaml(kind: str, code: str) -> None:
    assert yaml.safe_load(code)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), _blocks("bash", "python"))
def test_code_in_the_docs_runs(kind: str, code: str, place: Path) -> None:
    for said, run in SHORTER.items():
        code = code.replace(said, run)
    paths = os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["python", "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    command[0] = shutil.which(command[0], path=paths) or command[0]
    environment = {**_environment(), "PATH": paths}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]


def test_links_to_other_sites_are_these() -> None:
    """Nothing follows them here, where there is no network: whoever adds one has opened it."""
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "examples").rglob("README.md")]
    found = {url for page in pages for url in re.findall(r"\]\((https?://[^)]+)\)", page.read_text(encoding="utf-8"))}
    assert found == {"https://arxiv.org/abs/2506.11091"}


def test_the_pages_made_from_the_code_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: ``make docs``, and commit them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    monkeypatch.setattr(sys, "argv", ["nemo-llm-feedback"])  # "python -m pytest" would stand in the usage lines
    import reference_pages

    made = reference_pages.pages()
    assert {page: page.read_text(encoding="utf-8") for page in made} == made


def test_links_lead_somewhere_in_a_checkout() -> None:
    """The headings of pages of the site are checked by ``make docs``."""
    lost = []
    pages = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
    for page in [*pages, *(ROOT / "examples").rglob("README.md")]:
        for name, heading in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / name if name else page
            inside = (ROOT / "docs") in page.parents
            if not target.exists() or (heading and not inside and heading not in _headings(target)):
                lost.append(f"{page.relative_to(ROOT)}: {name}#{heading}")
    assert lost == []


def test_a_list_behind_a_block_of_code_is_one_on_the_site_too() -> None:
    """Python-Markdown, unlike others, wants a blank line between them."""
    joined = re.compile(r"^```\n(?:[-*|]|\d+\.) ", re.M)
    assert [page.name for page in PAGES[1:] if joined.search(page.read_text(encoding="utf-8"))] == []


def test_files_that_the_pages_name_exist() -> None:
    """`examples/…`, `docs/…` and `tests/…` in the text."""
    named = re.compile(r"(?<![\w/.])((?:examples|docs|tests|conf|nemo_llm_feedback)/[\w/.-]*\w)")
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.sh")]
    lost = {f"{page.relative_to(ROOT)}: {path}" for page in pages for path in named.findall(page.read_text("utf-8"))}
    elsewhere = ("examples/experiments/invented_names/", "name.yaml")  # made on demand; a stand-in
    missing = [line for line in sorted(lost) if not (ROOT / line.partition(": ")[2]).exists()]
    assert [line for line in missing if not any(name in line for name in elsewhere)] == []


def test_the_site_leads_to_no_other_hosts_than_these() -> None:
    """Nothing checks from here whether they answer."""
    found = {
        host for page in PAGES for host in re.findall(r"https?://([\w.-]+)", FENCE.sub("", page.read_text("utf-8")))
    }
    assert found <= {"arxiv.org", "gpu-host", "host"}


def _headings(page: Path) -> set[str]:
    """The headings of a page as GitHub writes them behind a #."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("", text))
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 900
    assert len(re.findall(r"(?<![\w.\-])\d+(?:[.,]\d+)*", prose)) <= 25


def test_results_are_short_and_each_table_stands_beside_them() -> None:
    folder = ROOT / "docs" / "results"
    pages = {page.name: page.read_text(encoding="utf-8") for page in folder.glob("*.md")}
    assert len((ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert {name: n for name, text in pages.items() if (n := len(text.splitlines())) > 100} == {}
    linked = {name for text in pages.values() for name in re.findall(r"\]\(([\w.]+\.(?:csv|sh))\)", text)}
    assert linked == {path.name for path in folder.iterdir() if path.suffix in (".csv", ".sh")}


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "results").glob("*.sh")), ids=lambda path: path.name)
def test_the_commands_of_the_results_are_shell_and_name_settings_that_exist(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert _lost_settings(script.read_text(encoding="utf-8")) == []


def test_troubleshooting_quotes_messages_of_the_product() -> None:
    quoted = re.findall(r"^`([^`]+)`\n:   ", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    said = _messages()
    assert len(quoted) >= 20
    assert [quote for quote in quoted if not any(_within(quote, text) for text in said)] == []


def _messages() -> list[str]:
    """Every string of the package, with ``…`` where a value is put in."""
    found = []
    for path in (ROOT / "nemo_llm_feedback").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%\.?\d*[dsfg]", "…", node.value).replace("%%", "%"))
    return found


def _within(quote: str, text: str) -> bool:
    """Whether the parts of the quotation between ``…`` stand in the text, in their order."""
    parts = quote.split("…")
    return all(part in text for part in parts) and bool(re.search(".*".join(map(re.escape, parts)), text, re.S))


def test_no_page_says_an_old_name() -> None:
    """The changelog's table of renames is where old names stand; tables of earlier results name their own commit."""
    old = [name for name in RENAMED if "." in name or name.startswith("--") or name == "replay=anchor"]
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "conf").rglob("*.yaml")]
    pages.remove(ROOT / "docs" / "reference" / "commands.md")  # of the code: `--samples` has got another meaning
    pages += [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".md", ".py")]
    said = [f"{page.relative_to(ROOT)}: {name}" for page in pages for name in old if _says(page, name)]
    assert said == []


def _says(page: Path, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", page.read_text(encoding="utf-8")) is not None


def test_settings_that_the_pages_name_exist() -> None:
    """`section.key` in the text is a key of the command's configuration."""
    pages = [*PAGES, *(ROOT / "examples").rglob("README.md")]
    assert {str(page): lost for page in pages if (lost := _lost_settings(page.read_text(encoding="utf-8")))} == {}


@functools.cache
def _settings() -> Any:
    return compose_config([])


def _lost_settings(text: str) -> list[str]:
    named = set(
        re.findall(r"\b((?:feedback|proposals|parameters|guards|context|objective)\.(?!py\b)[a-z_]+)\b(?!\.)", text)
    )
    forms = {key for path in (ROOT / "conf" / "objective").glob("*.yaml") for key in yaml.safe_load(path.read_text())}
    lost = [key for key in sorted(named) if OmegaConf.select(_settings(), key, default="?") == "?"]
    return [key for key in lost if key.removeprefix("objective.") not in forms]
