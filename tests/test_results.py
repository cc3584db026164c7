"""The tables of results on the pages say what their CSV files say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGES = ("barista", "invented", "rare_words")
# What tells rows apart whose numbers are alike in kind, in whatever words a page puts them.
TELLING = ("tenth", "quarter", "no context", "hospital", "shuffled", "boosted beam", "supervised", "rescoring", "base")


def _whole(labels: list[str]) -> list[str]:
    """Labels; one that begins with … goes on from the last that does not."""
    whole, first = [], ""
    for label in labels:
        first = first if label.startswith("…") else label
        whole.append(label if first == label else f"{first} {label}")
    return whole


def _shown(page: str) -> list[tuple[str, str, str]]:
    """Label, WER and entity WER of each row of a page that has both with their intervals."""
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in (RESULTS / f"{page}.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    rows = [row for row in rows if len(row) > 2 and all(re.match(r"\d.*\[", cell) for cell in row[1:3])]
    return [(label, row[1], row[2]) for label, row in zip(_whole([row[0] for row in rows]), rows, strict=True)]


@pytest.mark.parametrize("page", PAGES)
def test_rows_have_the_numbers_of_their_system(page: str) -> None:
    known: dict[tuple[str, str], list[str]] = {}
    for path in RESULTS.glob(f"{page}*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for label, row in zip(_whole([row.get("system", "") for row in rows]), rows, strict=True):
            known.setdefault((row.get("WER") or "", row.get("EWER") or ""), []).append(label)
    shown = _shown(page)
    assert len(shown) > 3
    for label, wer, ewer in shown:
        systems = known.get((wer, ewer), [])
        assert systems, f"{label}: {wer} / {ewer} is in no CSV file of this page"
        words = {word for word in TELLING if word in label}
        assert any(words == {word for word in TELLING if word in system} for system in systems), (label, systems)
