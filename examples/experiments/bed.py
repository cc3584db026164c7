"""What the test beds share: rows that differ in a few settings, one pool for all of them, one table at the end."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference import nemo_beam, rescored
from invented_names import on_demand
from nemo.utils import logging
from settings import ablation_rows

from nemo_llm_feedback.cli.jobs.evaluate import evaluate, evaluation_record, evaluation_text
from nemo_llm_feedback.cli.jobs.hypotheses import join

POOL_BATCH = 8  # rows of the pool in a batch
# Ordinary training on labels that were made before: NeMo's step, and no held-out part, as no row is unlabeled.
LABELLED = ["objective=self_training", "feedback.weight=0", "feedback.supervised_weight=1", "guards.every=0"]
ROWS: dict[str, list[str]] = {
    "self_training": ["objective=self_training"],
    "self_training_boosted": LABELLED,
    "self_training_rescored": ["objective=self_training", "objective.label=reward"],
    "feedback": [],
    "feedback_mwer": ["objective=mwer"],
    "feedback_grpo": ["objective=grpo"],
    "feedback_gspo": ["objective=gspo", "objective.pseudo_label_weight=0.5"],
    "feedback_dpo": ["objective=dpo", "objective.reference_free=true"],
    "feedback_others": [],
    "self_training_others": ["objective=self_training", "objective.label=others"],
    "feedback_no_context": ["context.terms_file=null", "context.required=false", 'context.description=""'],
    "feedback_wrong_context": [],
    "feedback_shuffled": ["reward.name=examples.experiments.controls:shuffled"],
    "feedback_defaults": [],
    "feedback_defaults_entity": ["reward=entity", "reward.settings.weight=3"],
    "no_replay": [],
    "supervised": LABELLED,
    **ablation_rows(),
}
INFERENCE = ("beam", "boosted", "rescored", "feedback_rescored")


@dataclass(frozen=True)
class TestSet:
    """A labelled set that every system is scored on.

    Attributes:
        name: in the table and in the JSON file's name.
        manifest: of the set.
        terms_file: whose terms count as entities where the manifest has none.
        in_domain: whether the rows without training are decoded on it, too.
    """

    __test__ = False

    name: str
    manifest: Path
    terms_file: Path | None = None
    in_domain: bool = True


@dataclass(frozen=True)
class Bed:
    """A domain: its pool and its context.

    Attributes:
        pool: the manifest, relative paths allowed; text in it is not read.
        description: of the domain.
        terms_file: its terms; None where rows have their own.
        replay: manifest of transcribed general speech → its share of what is replayed.
        label_file: the pool with its text, for the row `supervised`; None = it has none.
        wrong: description and terms of another domain, for the row `feedback_wrong_context`; None = no such row.
        others: file of another recogniser's transcripts of the pool, for the rows `…_others`; None = no such rows.
    """

    pool: Path
    description: str
    terms_file: Path | None = None
    replay: Mapping[Path, float] = field(default_factory=dict)
    label_file: Path | None = None
    wrong: tuple[str, Path] | None = None
    others: Path | None = None

    def overrides(self, row: str) -> list[str]:
        """The context of a row, for `adapt`."""
        description, terms_file = self.description, self.terms_file
        if row == "feedback_wrong_context":
            if self.wrong is None:
                raise SystemExit("the bed has no context of another domain: leave out the row feedback_wrong_context.")
            description, terms_file = self.wrong
        terms = [f"context.terms_file={terms_file}"] if terms_file else []
        return [f'context.description="{description}"', *terms]

    @property
    def flags(self) -> list[str]:
        """For `transcribe`."""
        return [
            "--description",
            self.description,
            *(["--terms-file", str(self.terms_file)] if self.terms_file else []),
        ]


def parser(description: str | None, *, steps: int, rows: Sequence[str] = tuple(ROWS)) -> argparse.ArgumentParser:
    """The flags of a test bed's script."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--llm", help="folder or hub id; default: the LM of invented_names/, made where it is missing")
    made.add_argument(
        "--rows",
        nargs="*",
        default=["self_training", "feedback"],
        choices=list(rows),
        metavar="ROW",
        help=f"of {', '.join(rows)}",
    )
    made.add_argument("--inference", nargs="*", default=[], choices=INFERENCE, help="rows without training")
    made.add_argument("--boosting-weight", type=float, default=1.0, help="of NeMo's phrase boosting")
    made.add_argument("--alpha", type=float, default=2.0, help="weight of the LLM in rows with settings from dev")
    made.add_argument("--judge", nargs="+", metavar="KEY=VALUE", help="reward of rescored rows; default: LLM, --alpha")
    made.add_argument("--pool-rows", type=int, help="a part of the pool, spread evenly, for a learning curve")
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--lr", type=float, default=3e-4)
    made.add_argument("--replay", type=float, default=1.0, help="transcribed general rows beside a row of the pool")
    made.add_argument("--held", action="store_true", help="general speech is not learned, but held where it was")
    made.add_argument("--general-speech", nargs="+", metavar="MANIFEST=SHARE", help="in place of the bed's own")
    made.add_argument("--held-weight", type=float, default=1.0, help="of general speech in the loss")
    made.add_argument("--held-augment", action="store_true", help="it is held under SpecAugment")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every row, that of the defaults, too"
    )
    made.add_argument("--curve", action="store_true", help="score the rows' sets during training, too: curves.py")
    made.add_argument("--split", default="dev", choices=("dev", "test"))
    return made


def run_rows(options: argparse.Namespace, bed: Bed, *, sets: Sequence[TestSet]) -> None:
    """Adapts the rows whose checkpoint is not there yet, scores all of them and the base, prints and writes tables.

    Args:
        options: of ``parser``.
        bed: the domain.
        sets: what is scored.
    """
    options.llm = options.llm or str(on_demand.lm(options.data))
    options.out.mkdir(parents=True, exist_ok=True)
    watched = [one.manifest for one in sets] if options.curve else []
    adapted = [_adapt(name, options, bed, watched) for name in options.rows]
    logging.setLevel(logging.ERROR)
    for one in sets:
        ready = _predictions(options, bed, one) if one.in_domain else []
        models = [str(options.checkpoint), *adapted]
        found = evaluate(models, manifest=str(one.manifest), predictions=ready, terms_file=one.terms_file)
        print(f"\n{one.name}\n{evaluation_text(found)}", flush=True)
        target = options.out / f"{one.name}_seed{options.seed}.json"
        target.write_text(json.dumps(evaluation_record(found), indent=1) + "\n", encoding="utf-8")


def _predictions(options: argparse.Namespace, bed: Bed, one: TestSet) -> list[str]:
    """The transcripts of the rows without training on a set."""
    weights = {"beam": 0.0, "boosted": options.boosting_weight}
    ready = []
    for name in options.inference:
        judged = "_judge" if options.judge and name.endswith("rescored") else ""
        target = options.out / f"{name}{judged}_{one.name}.json"
        if name in weights:
            terms = bed.terms_file
            nemo_beam(options.checkpoint, one.manifest, target, terms_file=terms, weight=weights[name])
        else:
            adapted = options.out / f"feedback_seed{options.seed}.nemo"
            model = adapted if name == "feedback_rescored" else options.checkpoint
            weights_of_llm = ["--alpha", str(options.alpha), "--beta", str(2 * options.alpha)]
            judge = ["--set", *options.judge] if options.judge else weights_of_llm
            rescored(model, one.manifest, target, llm=options.llm, context=bed.flags, judge=judge)
        ready.append(str(target))
    return ready


def _adapt(name: str, options: argparse.Namespace, bed: Bed, watched: Sequence[Path]) -> str:
    """The adapted checkpoint of a row, trained unless it is there."""
    target = options.out / f"{name}_seed{options.seed}.nemo"
    if not target.is_file():
        overrides = row_overrides(name, options, bed, watched, target=target)
        command = [sys.executable, "-m", "nemo_llm_feedback.cli.main", "adapt", *overrides]
        with open(options.out / f"{name}_seed{options.seed}.log", "a", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return str(target)


def row_overrides(
    name: str, options: argparse.Namespace, bed: Bed, watched: Sequence[Path], *, target: Path
) -> list[str]:
    """The arguments of `adapt` for a row; writes its training manifest.

    Args:
        name: of the row.
        options: of ``parser``.
        bed: the domain.
        watched: labelled sets that are scored during training; nothing is chosen by them.
        target: the adapted checkpoint.
    """
    replay = name != "no_replay"
    return [
        "trainer=cpu",
        f"init_from_nemo_model={options.checkpoint}",
        f"model.train_ds.manifest_filepath={_training_rows(name, bed, options, replay=replay)}",
        f"model.train_ds.batch_size={round(POOL_BATCH * (1 + options.replay)) if replay else POOL_BATCH}",
        f"llm.model={options.llm}",
        f"reward.cache={options.out / 'llm_scores.sqlite'}",
        f"exp_manager.exp_dir={options.out / 'runs'}",
        f"name={name}_seed{options.seed}",
        f"output={target}",
        f"seed={options.seed}",
        f"trainer.max_steps={options.steps}",
        "feedback.log_hypotheses_every=0",
        "guards.everyday=none",  # general speech is measured here, and none of it chooses weights
        "+trainer.enable_progress_bar=false",
        f"model.validation_ds.manifest_filepath=[{','.join(map(str, watched))}]",
        f"trainer.val_check_interval={max(1, options.steps // 8)}",
        *bed.overrides(name),
        f"feedback.supervised_weight={options.held_weight}",
        f"feedback.replay_weight={options.held_weight}",
        f"feedback.replay_augment={str(options.held_augment).lower()}",
        *([] if name.startswith("feedback_defaults") else _tuned(options)),
        *options.set,
        *ROWS[name],
    ]


def _tuned(options: argparse.Namespace) -> list[str]:
    """Overrides of all rows but the one that is left to the defaults; chosen on dev, or to save time."""
    return [
        f"reward.alpha={options.alpha}",
        f"reward.beta={2 * options.alpha}",
        f"model.optim.lr={options.lr}",
        f"feedback.refresh_every={max(1, options.steps // 4)}",
        "feedback.pool_utterances=24",
        "proposals.boosting_weights=[]",
        f"guards.every={max(1, options.steps // 8)}",
    ]


def _training_rows(name: str, bed: Bed, options: argparse.Namespace, *, replay: bool) -> Path:
    """The pool as often as it goes round in all updates, with transcribed general speech that does not repeat."""
    labels = f"_{name}" if name in ("supervised", "self_training_boosted") or name.endswith("_others") else ""
    target = options.out / f"pool{labels}{_kind(options) if replay else ''}.json"
    pool = _pool(name, bed, options)
    rows = max(1, round(options.steps * POOL_BATCH / len(pool))) * [(bed.pool.parent, row) for row in pool]
    total, rng = len(rows), random.Random(0)
    for manifest, share in _general_speech(bed, options).items() if replay else ():
        general = [row for row in read_rows(manifest) if 1.0 < row["duration"] < 8.0]
        wanted = round(options.replay * share * total)
        if options.held:
            general = [_bare(row) | {"replay": "kl"} for row in general]
        rows += [(manifest.parent, row) for row in _drawn(general, wanted, rng)]
    write_rows(target, rows)
    return target


def _general_speech(bed: Bed, options: argparse.Namespace) -> Mapping[Path, float]:
    if not options.general_speech:
        return bed.replay
    given = (item.rsplit("=", 1) for item in options.general_speech)
    return {Path(manifest): float(share) for manifest, share in given}


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its text and what follows from it."""
    return {key: value for key, value in row.items() if key not in ("text", "entities", "context")}


def _drawn(rows: list[dict[str, Any]], wanted: int, rng: random.Random) -> list[dict[str, Any]]:
    """So many rows by chance, none again before all have come."""
    drawn: list[dict[str, Any]] = []
    while rows and len(drawn) < wanted:
        drawn += rng.sample(rows, min(len(rows), wanted - len(drawn)))
    return drawn


def _kind(options: argparse.Namespace) -> str:
    return f"_{'held' if options.held else 'replay'}_{options.replay:g}"


def _pool(name: str, bed: Bed, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The pool's rows: with their text for `supervised`, with NeMo's boosted beam's for its row, else without."""
    if name == "supervised":
        if bed.label_file is None:
            raise SystemExit("the pool has no transcripts: leave out the row supervised.")
        return read_rows(bed.label_file)
    if name == "self_training_boosted":
        target = options.out / f"pool_boosted_{options.boosting_weight:g}.json"
        nemo_beam(options.checkpoint, bed.pool, target, terms_file=bed.terms_file, weight=options.boosting_weight)
        rows = [{**row, "text": row.pop("pred_text")} for row in read_rows(target)]
        return [row for row in rows if row["text"]]
    rows = _with_others(bed, options) if name.endswith("_others") else read_rows(bed.pool)
    if options.pool_rows:
        part = min(options.pool_rows, len(rows))
        rows = [rows[i * len(rows) // part] for i in range(part)]
    return [{key: value for key, value in row.items() if key not in ("text", "entities")} for row in rows]


def _with_others(bed: Bed, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The pool's rows with another recogniser's transcripts as hypotheses."""
    if bed.others is None:
        raise SystemExit("the bed has no other recogniser's transcripts: leave out the rows that end in _others.")
    target = options.out / "pool_with_others.json"
    print(join(bed.pool, bed.others, out=target, source="others"))
    rows = read_rows(target)
    return [row | {"audio_filepath": str((target.parent / row["audio_filepath"]).absolute())} for row in rows]


def source_replay(data: Path) -> dict[Path, float]:
    """General speech of the shared base models' own training: half L2-accented short sentences, half two others."""
    shares = {"speechocean762": 0.5, "librispeech": 0.25, "kathleen": 0.25}
    return {data / "source" / f"{name}.json": share for name, share in shares.items()}


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
