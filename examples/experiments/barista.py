"""Real coffee orders: every row of the table in docs/results.md, from scratch, with one command.

    python examples/experiments/barista.py DATA CHECKPOINT.nemo --out FOLDER [--rows base feedback …] [--split test]

DATA holds ``barista/``, ``guard/`` and ``source/`` (see ../shared/data/README.md). Every adapted row has the same
pool, updates, batch, optimizer, learning rate, rounds and, except `no_replay`, the same transcribed general speech as
replay (269 sentences of the base's own training speech, drawn once by seed). LLM scores are kept in one file and
shared by the rows; a row whose result exists is not run again, and one that was cut goes on. The LM is the
quickstart's unless --llm names another. `--split test` scores the rows' checkpoints on the test split: do that once,
with settings fixed on dev.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from nemo.utils import logging

from nemo_llm_feedback.jobs.evaluate import evaluate, evaluation_json, evaluation_text, make_scoring

REPLAY = {"speechocean762": 90, "librispeech": 90, "kathleen": 89}
ROWS: dict[str, list[str]] = {
    "self_training": ["objective=self_training"],
    "self_training_rescored": ["objective=self_training", "objective.label=reward"],
    "feedback": [],
    "feedback_mwer": ["objective=mwer"],
    "feedback_no_context": ["context.terms_file=null", "context.required=false", 'context.description=""'],
    "feedback_shuffled": ["reward.name=examples.experiments.controls:shuffled"],
    "no_replay": [],
}


def main() -> None:
    """Runs the rows that are not there yet and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llm", type=Path, default=Path(__file__).parents[1] / "quickstart" / "lm")
    parser.add_argument("--rows", nargs="+", default=["self_training", "feedback"], choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=136)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    adapted = [_adapt(name, options) for name in options.rows]
    logging.setLevel(logging.ERROR)
    barista, guard = options.data / "barista", options.data / "guard" / "accented.json"
    for name, manifest, terms in (
        ("barista", barista / f"{options.split}.json", str(barista / "menu.json")),
        ("guard", guard, None),
    ):
        found = evaluate(
            [str(options.checkpoint), *adapted], manifest=str(manifest), scoring=make_scoring(terms_file=terms)
        )
        print(f"\n{name} {options.split}\n{evaluation_text(found)}", flush=True)
        target = options.out / f"{name}_{options.split}_seed{options.seed}.json"
        target.write_text(json.dumps(evaluation_json(found), indent=1) + "\n", encoding="utf-8")


def _adapt(name: str, options: argparse.Namespace) -> str:
    """The adapted checkpoint of a row, trained unless it is there."""
    target = options.out / f"{name}_seed{options.seed}.nemo"
    if target.is_file():
        return str(target)
    barista, replay = options.data / "barista", name != "no_replay"
    overrides = [
        f"init_from_nemo_model={options.checkpoint}",
        f"model.train_ds.manifest_filepath={_pool(options.data, options.out, replay=replay)}",
        f"model.train_ds.batch_size={16 if replay else 8}",
        f"llm.model={options.llm}",
        "reward.alpha=2",
        "reward.beta=4",
        f"reward.cache={options.out / 'llm_scores.sqlite'}",
        'context.description="an order at a coffee shop"',
        f"context.terms_file={barista / 'menu.json'}",
        f"exp_manager.exp_dir={options.out / 'runs'}",
        f"name={name}_seed{options.seed}",
        f"output={target}",
        f"seed={options.seed}",
        f"trainer.max_steps={options.steps}",
        f"feedback.refresh_every={options.steps // 4}",
        f"model.optim.lr={options.lr}",
        "feedback.survey_utterances=24",
        "feedback.log_hypotheses_every=0",
        "proposals.boosting_weights=[]",
        "guards.every=17",
        "+trainer.enable_progress_bar=false",
        *ROWS[name],
    ]
    command = [sys.executable, "-m", "nemo_llm_feedback.cli", "adapt", "trainer=cpu", *overrides]
    with open(options.out / f"{name}_seed{options.seed}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return str(target)


def _pool(data: Path, out: Path, *, replay: bool) -> Path:
    """The pool's manifest, unlabeled, with transcribed general speech where it is replayed."""
    target = out / ("pool_replay.json" if replay else "pool.json")
    rows = [(data / "barista", json.loads(line)) for line in _lines(data / "barista" / "pool.json")]
    rng = random.Random(0)
    for name, number in REPLAY.items() if replay else ():
        general = [json.loads(line) for line in _lines(data / "source" / f"{name}.json")]
        general = [row for row in general if 1.0 < row["duration"] < 8.0]
        rows += [(data / "source", row) for row in rng.sample(general, number)]
    lines = [
        json.dumps({**row, "audio_filepath": str((folder / row["audio_filepath"]).absolute())}) for folder, row in rows
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    main()
