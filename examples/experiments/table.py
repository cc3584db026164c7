"""One table of systems over seeds: means, 95 % intervals over utterances and seeds, paired changes.

    python examples/experiments/table.py MANIFEST --systems "base=ctc.nemo" "self-training=a_seed1.nemo,a_seed2.nemo" \
        "rescoring=rescored.json" [--against self-training] [--guard GUARD.json …] [--json out.json]

A system is a label and its files: adapted checkpoints, one per seed, which are decoded greedily, or ready transcripts
(JSON Lines with ``pred_text``), which have no guard. The first system is the one that changes are measured from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nemo.utils import logging
from numpy.typing import NDArray

from nemo_llm_feedback.cli.jobs.evaluate import evaluate, system_names
from nemo_llm_feedback.evaluation.metrics import CorpusScores, find_metric

SAMPLES = 10_000
METRICS = ("wer", "cer", "ewer", "entity_recall", "false_alarms")


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its 95 % interval, each seed's value, and how it changes from another system's.

    Attributes:
        value, low, high: in the metric's unit.
        seeds: value of each.
        change, change_low, change_high: relative, in %; None where nothing is compared or the other's is 0.
        p_value: two-sided, of no change.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    p_value: float | None = None


class Draws:
    """Resamples of one manifest's utterances, the same for every system, so that differences are paired."""

    def __init__(self, utterances: int, *, samples: int = SAMPLES, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        rows = self.rng.integers(utterances, size=(samples, utterances))
        # [B, U] how often each utterance is in each resample; counts then add up by one matrix product.
        self.weights = np.apply_along_axis(np.bincount, 1, rows, minlength=utterances).astype(np.float64)

    def means(self, seeds: Sequence[CorpusScores], metric: str) -> NDArray[np.float64]:
        """[B] the metric's mean over seeds, utterances and seeds drawn with replacement."""
        values = []
        for scores in seeds:
            numerator, denominator = scores.ratio(metric)
            with np.errstate(invalid="ignore", divide="ignore"):
                values.append(self.weights @ numerator / (self.weights @ denominator))
        table = find_metric(metric).scale * np.stack(values, axis=1)
        picked = self.rng.integers(len(seeds), size=table.shape)
        return np.asarray(np.take_along_axis(table, picked, axis=1).mean(axis=1), dtype=np.float64)

    def cell(self, seeds: Sequence[CorpusScores], metric: str, other: Sequence[CorpusScores] | None = None) -> Cell:
        """A system's cell.

        Args:
            seeds: its scores, one per seed.
            metric: a key of `metrics.METRICS`.
            other: scores of the system that it is compared with; None = with none.
        """
        drawn = self.means(seeds, metric)
        each = tuple(scores.value(metric) for scores in seeds)
        value = float(np.mean(each))
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        start = float(np.mean([scores.value(metric) for scores in other])) if other else 0.0
        if other is None or not start:
            return Cell(value, float(low), float(high), each)
        against = self.means(other, metric)
        with np.errstate(invalid="ignore", divide="ignore"):
            change = 100 * (drawn / against - 1)
        difference = (drawn - against)[np.isfinite(drawn - against)]
        below, above = np.mean(difference <= 0), np.mean(difference >= 0)
        p = min(1.0, 2 * max(min(below, above), 1 / len(difference)))
        bounds = np.nanpercentile(change, [2.5, 97.5])
        return Cell(value, float(low), float(high), each, 100 * (value / start - 1), *map(float, bounds), float(p))


Scores = dict[str, list[CorpusScores]]


def score(systems: Mapping[str, Sequence[Path]], manifest: Path, *, terms_file: Path | None, guard: bool) -> Scores:
    """Label → scores of its files on a manifest; the rows that any file fails on are left out of all.

    Args:
        systems: label → files.
        manifest: labelled.
        terms_file: whose terms can be false alarms.
        guard: whether ready transcripts are left out, as they are of another manifest.
    """
    models = [str(path) for paths in systems.values() for path in paths if path.suffix == ".nemo"]
    ready = [str(p) for paths in systems.values() for p in paths if p.suffix != ".nemo" and not guard]
    found = evaluate(models, manifest=str(manifest), predictions=ready, terms_file=terms_file)
    for line in found.left_out:
        print(f"left out: {line}")
    names = system_names([*models, *ready])
    scored = {path: found.comparison.scores[name] for path, name in names.items()}
    return {
        label: [scored[str(path)] for path in paths]
        for label, paths in systems.items()
        if all(str(path) in scored for path in paths)
    }


def cells(scores: Scores, against: str | None) -> dict[str, dict[str, Cell]]:
    """Label → metric → cell; changes are from the first system, under ``<metric>_against`` from another."""
    first = next(iter(scores))
    draws = Draws(len(scores[first][0].references))
    out: dict[str, dict[str, Cell]] = {}
    for label, seeds in scores.items():
        base = scores[first] if label != first else None
        out[label] = {
            metric: draws.cell(seeds, metric, base) for metric in METRICS if np.isfinite(_value(seeds, metric))
        }
        if against in scores and label not in (first, against):
            names = [metric for metric in ("wer", "ewer") if metric in out[label]]
            out[label] |= {f"{metric}_against": draws.cell(seeds, metric, scores[against]) for metric in names}
    return out


def _value(seeds: Sequence[CorpusScores], metric: str) -> float:
    return float(np.mean([scores.value(metric) for scores in seeds]))


def markdown(table: Mapping[str, Mapping[str, Cell]], guards: Mapping[str, Mapping[str, Mapping[str, Cell]]]) -> str:
    """The table for a page; a change is bold where its 95 % interval excludes 0."""
    shown = [metric for metric in METRICS if any(metric in row for row in table.values())]
    against = any("ewer_against" in row for row in table.values())
    head = ["system", "seeds", *(m.replace("_", " ") for m in shown), *(["EWER, change"] if against else []), *guards]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for label, row in table.items():
        entries = [label, str(len(next(iter(row.values())).seeds))]
        entries += [_interval(row[m]) if m in ("wer", "ewer") else f"{row[m].value:.1f}" for m in shown]
        entries += [_change(row.get("ewer_against"))] if against else []
        for guard in guards.values():
            cell = guard[label]["wer"] if label in guard else None
            entries.append(f"{cell.value:.1f} {_change(cell)}".strip() if cell else "")
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def _interval(cell: Cell) -> str:
    return f"{cell.value:.1f} [{cell.low:.1f}, {cell.high:.1f}]"


def _change(cell: Cell | None) -> str:
    if cell is None or cell.change is None or cell.change_low is None or cell.change_high is None:
        return ""
    text = f"{cell.change:+.1f} % [{cell.change_low:+.1f}, {cell.change_high:+.1f}]"
    return f"**{text}**" if cell.change_low > 0 or cell.change_high < 0 else text


def main() -> None:
    """Scores, prints the tables and writes all numbers."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("manifest", type=Path)
    made.add_argument("--systems", nargs="+", required=True, metavar="LABEL=FILE[,FILE…]")
    made.add_argument("--terms-file", type=Path)
    made.add_argument("--against", help="label of the system that EWER is compared with, besides the first")
    made.add_argument("--guard", nargs="*", type=Path, default=[], help="manifests of which the WER is shown")
    made.add_argument(
        "--only", nargs="+", default=[], metavar="KEY=VALUE", help="rows of the manifest with that value"
    )
    made.add_argument("--json", type=Path, help="all numbers, with each seed's")
    options = made.parse_args()
    systems = {
        label: [Path(name) for name in files.split(",")]
        for label, files in (item.split("=", 1) for item in options.systems)
    }
    if options.against is not None and options.against not in systems:
        made.error(f"--against {options.against!r} is not among the systems: {', '.join(systems)}")
    logging.setLevel(logging.ERROR)
    scores = score(systems, options.manifest, terms_file=options.terms_file, guard=False)
    table = cells(scores, options.against)
    guards = {
        f"WER of {path.parent.name}/{path.stem}": cells(score(systems, path, terms_file=None, guard=True), None)
        for path in options.guard
    }
    print(markdown(table, guards))
    subsets = {item: cells(_only(scores, options.manifest, item), options.against) for item in options.only}
    for item, subset in subsets.items():
        print(f"\n{item}\n{markdown(subset, {})}")
    if options.json:
        plain = {"": table, **guards, **subsets}
        options.json.write_text(json.dumps(_plain(plain), indent=1) + "\n", encoding="utf-8")


def _only(scores: Scores, manifest: Path, item: str) -> Scores:
    """The scores of the rows with a value."""
    key, value = item.split("=", 1)
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [i for i, line in enumerate(lines) if str(line.get(key)) == value]
    total = len(next(iter(scores.values()))[0].references)
    if not rows or total != len(lines):
        raise SystemExit(f"{item}: {len(rows)} of {len(lines)} rows have it, {total} were scored; both must be known.")
    return {label: [one.select(rows) for one in seeds] for label, seeds in scores.items()}


def _plain(tables: Mapping[str, Mapping[str, Mapping[str, Cell]]]) -> dict[str, Any]:
    return {
        name: {label: {metric: asdict(cell) for metric, cell in row.items()} for label, row in table.items()}
        for name, table in tables.items()
    }


if __name__ == "__main__":
    main()
