"""What the test beds share: rows that differ in a few settings, one pool for all of them, one table at the end."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo.utils import logging

from nemo_llm_feedback.jobs.evaluate import evaluate, evaluation_json, evaluation_text, make_scoring

# Half of a batch is of the pool; what is replayed beside it does not repeat while the pool goes round 4 times.
ROUNDS = 4
REPLAY = {"speechocean762": 0.5, "librispeech": 0.25, "kathleen": 0.25}
ROWS: dict[str, list[str]] = {
    "self_training": ["objective=self_training"],
    "self_training_rescored": ["objective=self_training", "objective.label=reward"],
    "feedback": [],
    "feedback_mwer": ["objective=mwer"],
    "feedback_grpo": ["objective=grpo"],
    "feedback_no_context": ["context.terms_file=null", "context.required=false", 'context.description=""'],
    "feedback_shuffled": ["reward.name=examples.experiments.controls:shuffled"],
    "no_replay": [],
}


@dataclass(frozen=True)
class TestSet:
    """A labelled set that every system is scored on.

    Attributes:
        name: in the table and in the JSON file's name.
        manifest: of the set.
        terms_file: whose terms count as entities where the manifest has none.
    """

    __test__ = False

    name: str
    manifest: Path
    terms_file: Path | None = None


def parser(description: str | None, *, steps: int, rows: Sequence[str] = tuple(ROWS)) -> argparse.ArgumentParser:
    """The flags of a test bed's script."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--llm", type=Path, default=Path(__file__).parents[1] / "quickstart" / "lm")
    made.add_argument("--rows", nargs="*", default=["self_training", "feedback"], choices=list(rows))
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--lr", type=float, default=3e-4)
    made.add_argument("--replay", type=float, default=1.0, help="transcribed general rows beside a row of the pool")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every row, for a grid")
    made.add_argument("--split", default="dev", choices=("dev", "test"))
    return made


def run_rows(options: argparse.Namespace, *, pool: Path, settings: Sequence[str], sets: Sequence[TestSet]) -> None:
    """Adapts the rows whose checkpoint is not there yet, scores all of them and the base, prints and writes tables.

    Args:
        options: of ``parser``.
        pool: the unlabeled manifest, relative paths allowed.
        settings: overrides of every row of this test bed.
        sets: what is scored.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    adapted = [_adapt(name, options, pool, settings) for name in options.rows]
    logging.setLevel(logging.ERROR)
    for one in sets:
        scoring = make_scoring(terms_file=str(one.terms_file) if one.terms_file else None)
        found = evaluate([str(options.checkpoint), *adapted], manifest=str(one.manifest), scoring=scoring)
        print(f"\n{one.name}\n{evaluation_text(found)}", flush=True)
        target = options.out / f"{one.name}_seed{options.seed}.json"
        target.write_text(json.dumps(evaluation_json(found), indent=1) + "\n", encoding="utf-8")


def _adapt(name: str, options: argparse.Namespace, pool: Path, settings: Sequence[str]) -> str:
    """The adapted checkpoint of a row, trained unless it is there."""
    target = options.out / f"{name}_seed{options.seed}.nemo"
    if target.is_file():
        return str(target)
    replay = name != "no_replay"
    overrides = [
        f"init_from_nemo_model={options.checkpoint}",
        f"model.train_ds.manifest_filepath={_training_rows(pool, options, replay=replay)}",
        f"model.train_ds.batch_size={round(8 * (1 + options.replay)) if replay else 8}",
        f"llm.model={options.llm}",
        f"reward.cache={options.out / 'llm_scores.sqlite'}",
        f"exp_manager.exp_dir={options.out / 'runs'}",
        f"name={name}_seed{options.seed}",
        f"output={target}",
        f"seed={options.seed}",
        f"trainer.max_steps={options.steps}",
        f"feedback.refresh_every={max(1, options.steps // 4)}",
        f"model.optim.lr={options.lr}",
        "feedback.survey_utterances=24",
        "feedback.log_hypotheses_every=0",
        "proposals.boosting_weights=[]",
        f"guards.every={max(1, options.steps // 8)}",
        "+trainer.enable_progress_bar=false",
        *settings,
        *ROWS[name],
        *options.set,
    ]
    command = [sys.executable, "-m", "nemo_llm_feedback.cli", "adapt", "trainer=cpu", *overrides]
    with open(options.out / f"{name}_seed{options.seed}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return str(target)


def _training_rows(pool: Path, options: argparse.Namespace, *, replay: bool) -> Path:
    """The pool's manifest, unlabeled, as often as it goes round, with as much transcribed general speech."""
    target = options.out / (f"pool_replay_{options.replay:g}.json" if replay else "pool.json")
    rows = ROUNDS * [(pool.parent, row) for row in read_rows(pool)]
    total, rng, source = len(rows), random.Random(0), options.data / "source"
    for name, share in REPLAY.items() if replay else ():
        general = [row for row in read_rows(source / f"{name}.json") if 1.0 < row["duration"] < 8.0]
        wanted = round(options.replay * share * total)
        rows += [(source, row) for row in rng.sample(general, min(len(general), wanted))]
    write_rows(target, rows)
    return target


def read_rows(manifest: Path) -> list[dict[str, Any]]:
    """The rows of a manifest."""
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(target: Path, rows: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Writes rows, each with the folder that its audio path starts from, as one manifest with absolute paths."""
    lines = [
        json.dumps({**row, "audio_filepath": str((folder / row["audio_filepath"]).absolute())}) for folder, row in rows
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
