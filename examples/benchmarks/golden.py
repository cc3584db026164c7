"""Golden numbers: what tiny models learn, write and score, to the last digit, to compare two states of the code.

    python examples/benchmarks/golden.py NEW.json [--only PATTERN …] [--compare OLD.json]

Runs the command line in this process on tiny random models, a tiny random LLM and short synthetic audio, on the CPU
with one thread, and writes every number that the runs leave behind: 20 steps of every family under every objective,
both phases of the LLM and both loaders, some settings beside these, whole runs with every choice left to the pool,
and the output of transcribe, score and evaluate. Names of settings stand in the tables below and nowhere else.
The quickstart has no numbers here: its inputs and settings change with the product.
Two machines, or two builds of torch, round differently: compare on one.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from golden_compare import report

import nemo_llm_feedback
from nemo_llm_feedback.cli.main import main as command

ROOT = Path(nemo_llm_feedback.__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

FAMILIES = {"ctc": "ctc_bpe", "rnnt": "rnnt_bpe", "tdt": "tdt_bpe", "hybrid": "hybrid_bpe"}
# Eight unlabeled rows, two with text, and two, with and without text, on which the model shall stay what it is.
TEXTS = [None, "soy milk", None, None, "a latte", None, None, "one mocha", None, None, None, None]
REPLAY = {"replay": ["kl" if i in (4, 8) else None for i in range(len(TEXTS))]}
DEV_TEXTS = ["al", "gege mocha", "wwwww tea", "thank you"]
DEV = {"entities": [["al"], ["mocha"], ["tea"], []], "speaker": ["x", "y", "x", "y"]}
PREDICTED = ["al", "gege locker", "wwwww tea mocha", "thank"]
DESCRIPTION = "an order at a coffee shop"
# Two as the random models write, so that terms are swapped in.
TERMS = "context.terms=[soy latte,mocha,tea,lala,gesoge]"

# Settings, many in a text. LIST: of every proposal, COMMON: of every run.
LIST = (
    "proposals.beam=3 proposals.boosted=3 proposals.term_swap=2 proposals.swap_similarity=20 proposals.max_symbols=3"
)
COMMON = f"""{LIST} seed=1 trainer=cpu trainer.max_steps=20 +trainer.enable_progress_bar=false report_audio=false
    feedback.replay_weight=1 feedback.replay_augment=false feedback.band_tolerance=0
    model.train_ds.batch_size=4 model.optim.sched.warmup_steps=4 feedback.refresh_every=8 feedback.pool_utterances=4
    exp_manager.create_checkpoint_callback=false exp_manager.create_tensorboard_logger=false"""
FIXED = "llm=full model.optim.lr=1e-3 reward.alpha=0.1 reward.beta=1 proposals.boosting_weights=[] guards.every=0"
SAMPLES = "proposals.beam=0 proposals.boosted=0 proposals.term_swap=0 proposals.samples=4"
OBJECTIVES = dict.fromkeys(("distill", "mwer", "grpo", "gspo", "dpo", "self_training"), "") | {"reinforce": SAMPLES}
# A hybrid samples from one head; of a random TDT most samples leave the audio, and a group needs one that does not.
OF_BOTH = {("hybrid", "reinforce"): "feedback.heads=transducer", ("tdt", "reinforce"): "proposals.samples=24"}
PHASES = {"inline": "llm.phase=inline", "cached": "llm.phase=cached"}
LOADERS = {"classic": "", "lhotse": "model.train_ds.use_lhotse=true +model.train_ds.use_bucketing=false"}
CHOSEN = """llm=nf4 objective=distill model.optim.lr=null parameters.lr_trial_steps=3 reward.alpha=null reward.beta=60
    proposals.boosting_weights=[0.5,1.0,2.0] feedback.supervised_weight=0.1 feedback.replay_weight=0.1
    trainer.val_check_interval=10
    guards.every=4 guards.held_out=0.5 guards.max_kl=50 guards.max_length_ratio=9 guards.max_empty_rise=1
    guards.max_repetition_rise=1 guards.max_wer_rise=0.5"""
LABELLED = "model.validation_ds.manifest_filepath={dev} guards.manifest_filepath={dev}"
RATES = dict.fromkeys(FAMILIES, "parameters.lr_candidates=[1e-4,3e-4,1e-3]")
RATES["ctc"] = "parameters.lr_candidates=[1e-2,3e-2,1e-1]"
# Name → family, objective, settings beside FIXED.
VARIANTS = {
    "lora": ("ctc", "distill", "parameters.lora_rank=2 feedback.augment=false"),
    "average": ("rnnt", "distill", "parameters.ema_decay=0.8 guards.interpolation=0.5"),
    "band": ("rnnt", "mwer", "feedback.band_tolerance=0.05 parameters.freeze_encoder=true"),
    "head": ("hybrid", "grpo", "feedback.heads=ctc feedback.supervised_weight=0.5 feedback.replay_weight=0.5"),
    "extras": ("tdt", "distill", "objective.pseudo_label_weight=0.2 objective.reference_kl_weight=0.3"),
    "augmented_replay": ("tdt", "distill", "feedback.replay_augment=true feedback.labelled=replay"),
    "proposal": ("ctc", "mwer", f"objective.correction=proposal {SAMPLES}"),
    "relabeled": ("rnnt", "self_training", "objective.label=reward objective.augment=false"),
    "corrected": ("ctc", "dpo", "proposals.llm_correction=1 feedback.use_text=false"),
    "entity": ("hybrid", "distill", "reward=entity reward.alpha=0.5"),
    "rules": ("ctc", "distill", "reward=rules"),
    "accumulated": ("ctc", "distill", "trainer.accumulate_grad_batches=2 trainer.max_steps=10"),
}
SCORED = {name: f"reward={name}" for name in ("entity", "rules", "composite", "correction")}
SCORED |= {"pmi": "reward.normalize=pmi", "judge": "reward=judge reward.settings.answers=[a,b]"}
STEPS, WHOLE = "steps.jsonl", ("pool_statistics.json", "result.json")
# Values of no meaning for a comparison: of time, of memory, of places, and of the program's own version.
IGNORED = re.compile(r"^(seconds|rtfx|memory.*|nemo|llm_line|.*_bytes|.*_seconds)$")


class Bench:
    """The models, the LLM and the manifests in a folder, made when first asked for.

    Args:
        folder: to work in.
    """

    def __init__(self, folder: Path) -> None:
        from helpers.tiny import make_tokenizer, write_manifest
        from helpers.tiny_llm import make_tiny_llm

        self.folder = folder
        self.pool = write_manifest(folder / "pool.json", TEXTS, seconds=0.9, **REPLAY)
        self.dev = write_manifest(folder / "dev.json", DEV_TEXTS, seconds=1.6, **DEV)
        lines = [json.loads(line) for line in self.dev.read_text(encoding="utf-8").splitlines()]
        guessed = [json.dumps(line | {"pred_text": text}) for line, text in zip(lines, PREDICTED, strict=True)]
        self.guesses = folder / "guesses.json"
        self.guesses.write_text("\n".join(guessed) + "\n", encoding="utf-8")
        self.llm = make_tiny_llm(folder / "llm", chat=True)
        self._tokenizer = make_tokenizer(folder / "tokenizer")

    def nemo(self, family: str) -> Path:
        """The starting checkpoint of a family."""
        from helpers.tiny import build_nemo

        path = self.folder / "nemo" / f"{family}.nemo"
        return path if path.is_file() else build_nemo(FAMILIES[family], path, tokenizer_dir=self._tokenizer)

    def adapt(self, family: str, settings: str) -> dict[str, Any]:
        """Everything that a run of ``adapt`` leaves in its folder."""
        folder = self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        places = [f"init_from_nemo_model={self.nemo(family)}", f"model.train_ds.manifest_filepath={self.pool}"]
        places += [f"llm.model={self.llm}", f"exp_manager.exp_dir={folder}", f"context.description={DESCRIPTION}"]
        _call("adapt", *places, TERMS, *COMMON.split(), *settings.format(dev=self.dev).split())
        return {"weights": _weights(next(folder.rglob("*.nemo"))), **read_run(next(folder.rglob(STEPS)).parent)}

    def transcribe(self, family: str, *more: str) -> Any:
        """The N-best of ``transcribe --rescore``; the command rounds its scores to four decimals."""
        out = self.folder / "transcripts.json"
        flags = ["--dataset-manifest", self.dev, "--output-filename", out, "--cuda", -1, "--rescore", "--nbest", 6]
        judged = ["--llm", self.llm, "--quantization", "none", "--description", DESCRIPTION, "--set", TERMS]
        _call("transcribe", self.nemo(family), *flags, *more, *judged)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    def score(self, family: str, settings: str = "") -> Any:
        """The JSON of ``score``."""
        out = self.folder / "score.json"
        flags = ["--manifest", self.dev, "--llm", self.llm, "--description", DESCRIPTION, "--json", out]
        flags += ["--alpha", 0.1, "--beta", 1, "--set", "llm=full", TERMS, *LIST.split(), *settings.split()]
        _call("score", self.nemo(family), *flags)
        report = json.loads(out.read_text(encoding="utf-8"))
        return {("llm_line" if key == "llm" else key): value for key, value in report.items()}

    def evaluate(self) -> Any:
        """The JSON of ``evaluate`` on two checkpoints and ready transcripts."""
        out = self.folder / "evaluation.json"
        systems = [self.nemo("ctc"), self.nemo("rnnt"), "--predictions", self.guesses, "--manifest", self.dev]
        flags = ["--terms", "soy latte", "mocha", "tea", "--group-by", "speaker", "--oracle", 4, "--cuda", -1]
        _call("evaluate", *systems, *flags, "--b-wer", "--resamples", 200, "--json", out)
        return json.loads(out.read_text(encoding="utf-8"))

    def jobs(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Name → what to run, in order."""
        for family, objective, phase, loader in itertools.product(FAMILIES, OBJECTIVES, PHASES, LOADERS):
            own = [OBJECTIVES[objective], OF_BOTH.get((family, objective), ""), PHASES[phase], LOADERS[loader]]
            settings = " ".join([f"objective={objective}", FIXED, *own])
            yield f"curve/{family}/{objective}/{phase}/{loader}", partial(self.adapt, family, settings)
        for key, (family, objective, more) in VARIANTS.items():
            yield f"variant/{key}", partial(self.adapt, family, f"objective={objective} {FIXED} {more}")
        for family in FAMILIES:
            yield f"chosen/{family}", partial(self.adapt, family, f"{CHOSEN} {RATES[family]} {LABELLED}")
            yield f"guarded/{family}", partial(self.adapt, family, f"{CHOSEN} model.optim.lr=1e-3 {LABELLED}")
            yield f"transcribe/{family}", partial(self.transcribe, family)
            yield f"score/{family}", partial(self.score, family)
        yield "transcribe/hybrid_ctc", partial(self.transcribe, "hybrid", "--decoder-type", "ctc")
        for key, settings in SCORED.items():
            yield f"score/ctc_{key}", partial(self.score, "ctc", settings)
        yield "evaluate", self.evaluate


def read_run(folder: Path) -> dict[str, Any]:
    """The curves of a run folder, one value per line, and its JSON files."""
    lines = [json.loads(line) for line in (folder / STEPS).read_text(encoding="utf-8").splitlines()]
    names = dict.fromkeys(key for line in lines for key in line)
    curves = {name: [line.get(name) for line in lines] for name in names}
    files = {path.stem: json.loads(path.read_text("utf-8")) for name in WHOLE if (path := folder / name).is_file()}
    return {"curves": curves, **files}


def _call(*arguments: Any) -> None:
    """The command, without what it prints, from the same random state every time."""
    torch.manual_seed(0)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = command([str(argument) for argument in arguments])
    if status:
        raise RuntimeError(f"{arguments[0]} ended with status {status}: {out.getvalue()[-2000:]}")


def _weights(nemo: Path) -> dict[str, Any]:
    """The weights of a ``.nemo`` in three values: a difference in the first alone is one in the last digits."""
    with tarfile.open(nemo) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("model_weights.ckpt"))
        state = torch.load(io.BytesIO(archive.extractfile(member).read()), weights_only=True)  # type: ignore[union-attr]
    values = torch.cat([value.double().flatten() for _, value in sorted(state.items())])
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return {"sha256": digest[:16], "sum": float(values.abs().sum()), "norm": float(values.norm())}


def _clean(node: Any, folder: str) -> Any:
    """The same without what is ignored and without the folder in texts."""
    if isinstance(node, dict):
        return {str(key): _clean(value, folder) for key, value in node.items() if not IGNORED.match(str(key))}
    if isinstance(node, list):
        return [_clean(item, folder) for item in node]
    return node.replace(folder, "") if isinstance(node, str) else node


def run_all(patterns: list[str], write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Runs the jobs whose name holds or matches a pattern, all without one; a job that fails leaves its error."""
    torch.set_num_threads(1)
    from nemo.utils import logging

    print(f"the code is {ROOT}", flush=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="golden_") as name:
        bench = Bench(Path(name))
        for key, job in bench.jobs():
            if patterns and not any(p in key or fnmatch.fnmatchcase(key, p) for p in patterns):
                continue
            logging.setLevel(logging.ERROR)
            try:
                found[key] = _clean(job(), name)
            except (Exception, SystemExit) as error:  # one broken path must not hide what the others do
                traceback.print_exc()
                found[key] = {"error": f"{type(error).__name__}: {error}"}
            print(key, "FAILED" if "error" in found[key] else "done", flush=True)
            write(found)
    return found


def main() -> int:
    """Runs, writes and compares; 1 if a run failed or a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file of all numbers")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="part or glob of names of runs")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="list what differs from these numbers")
    parser.add_argument("--reuse", action="store_true", help="run nothing: read OUTPUT")
    options = parser.parse_args()

    def write(found: dict[str, Any]) -> None:
        options.output.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")

    new = json.loads(options.output.read_text("utf-8")) if options.reuse else run_all(options.only, write)
    failed = [name for name, found in new.items() if "error" in found]
    print(f"{len(new)} runs, failed: {', '.join(failed) or 'none'}")
    differing = report(new, json.loads(options.compare.read_text("utf-8"))) if options.compare else 0
    return int(bool(failed or differing))


if __name__ == "__main__":
    sys.exit(main())
