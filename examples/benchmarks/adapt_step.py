"""Whole training steps of one run of ``adapt``: with new hypotheses, with kept ones, and NeMo's supervised step.

    python examples/benchmarks/adapt_step.py --family ctc tdt              # of 110 M, 4 utterances of 15 s
    python examples/benchmarks/adapt_step.py --family rnnt --own-loss
    python examples/benchmarks/adapt_step.py --shape small                 # of four layers, 2 utterances of 7.5 s

Each step is ``training_step``, backward pass, clipping and AdamW, in one run of Lightning's trainer on one model. Its
batches take turns: a batch with text, which is NeMo's step and nothing else, then the same audio without text, whose
eight hypotheses are proposed and scored anew (*fresh*) or kept. A ratio is the median over the rounds of the step's
CPU time ÷ the supervised step's of that round. NeMo has no TDT loss on a CPU and a slow one for RNN-T: there, and for
RNN-T by ``--own-loss``, rows with text are learned by this package's exact likelihood. Models and LLM are random; the
bias of blank is set so that a quarter of the frames emit.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from gpu_check import SMOLLM2, emit_labels
from helpers.tiny import build_nemo, make_tokenizer, write_manifest
from helpers.tiny_llm import make_tiny_llm
from likelihood_problem import FULL, SMALL, TINY, Shape
from nemo.utils import logging as nemo_logging
from refresh import KINDS

from nemo_llm_feedback import compose_config, restore
from nemo_llm_feedback.rewards import ScoreCache

SHAPES = {"full": FULL, "small": SMALL, "tiny": TINY}
LLM_LAYERS = {"full": 30, "small": 4, "tiny": 2}  # of SmolLM2's width
SOUNDS = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
WORDS = ["".join(random.Random(i).choices(SOUNDS, k=3)) for i in range(4000)]  # enough for all labels of a vocabulary
STEPS = ("supervised", "fresh", "supervised", "kept")  # of a round; the first round warms up
FRAME = 0.08  # seconds
SETTINGS = """trainer=cpu seed=1 model.train_ds.shuffle=false model.train_ds.num_workers=0 feedback.refresh_every=4
    model.optim.lr=1e-9 reward.alpha=0.1 reward.beta=1 proposals.boosting_weights=[] proposals.swap_similarity=20
    proposals.max_symbols=2 proposals.max_members=8 guards.every=0 guards.held_out=0 context.terms=[{terms}]"""


class Clock(pl.Callback):
    """Seconds of CPU time of each step, and mean members of the last groups."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.members, self._started = 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Starts the clock."""
        self._started = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Writes down what the step took, its update included."""
        self.seconds.append(time.process_time() - self._started)
        latest = pl_module.feedback.cache.latest
        self.members = sum(latest.sizes) / len(latest) if latest is not None else 0.0


class OwnLoss(pl.Callback):
    """Rows with text are learned by the exact likelihood, also where NeMo has a loss."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """After the run's set-up."""
        pl_module._feedback = replace(pl_module.feedback, exact_supervision=True)


def layout(family: str, shape: Shape) -> dict[str, Any]:
    """The settings of tests/helpers/tiny.py that give its model the sizes of a shape."""
    encoder = {"n_layers": shape.layers, "d_model": shape.encoder, "n_heads": shape.heads, "feat_in": 80}
    encoder |= {"ff_expansion_factor": 4, "conv_kernel_size": 9, "subsampling_conv_channels": min(256, shape.encoder)}
    found = {f"encoder__{key}": value for key, value in encoder.items()} | {"preprocessor__features": 80}
    if family == "ctc":
        return found | {"decoder__feat_in": shape.encoder}
    sizes = {"pred_hidden": shape.hidden, "joint_hidden": shape.hidden}
    found |= {f"model_defaults__{k}": v for k, v in (sizes | {"enc_hidden": shape.encoder}).items()}
    found |= {f"joint__jointnet__{k}": v for k, v in (sizes | {"encoder_hidden": shape.encoder}).items()}
    return found | {"decoder__prednet__pred_hidden": shape.hidden}


def measure(family: str, folder: Path, *, shape: str, rounds: int, own_loss: bool = False) -> dict[str, Any]:
    """Seconds of CPU time of the steps by kind, one a round, their ``ratios``, and mean ``members`` of a group."""
    sizes = SHAPES[shape]
    seconds = sizes.frames * FRAME
    tokenizer = make_tokenizer(folder / "tokenizer", words=WORDS, size=sizes.vocabulary)
    base = build_nemo(KINDS[family], folder / "base.nemo", tokenizer_dir=tokenizer, **layout(family, sizes))
    text = " ".join(WORDS[i % len(WORDS)] for i in range(max(1, int(2 * seconds))))
    manifest = write_manifest(folder / "pool.json", [text] * sizes.rows, seconds=seconds)
    labelled = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    rows = [*labelled, *({k: v for k, v in row.items() if k != "text"} for row in labelled)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    llm = make_tiny_llm(folder / "llm", **(SMOLLM2 | {"num_hidden_layers": LLM_LAYERS[shape]}))
    places = [f"model.train_ds.manifest_filepath={manifest}", f"llm.model={llm}", "llm=full"]
    places += [f"model.train_ds.batch_size={sizes.rows}", f"feedback.pool_utterances={sizes.rows}"]
    model = restore(base, map_location="cpu")
    if family != "ctc":
        emit_labels(model, manifest)
    model.setup_feedback(compose_config([*SETTINGS.format(terms=",".join(WORDS[:20])).split(), *places]))
    clock = Clock()
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    options |= {"accelerator": "cpu", "devices": 1, "max_steps": (rounds + 1) * len(STEPS), "gradient_clip_val": 1.0}
    trainer = pl.Trainer(**options, num_sanity_val_steps=0, callbacks=[clock, *([OwnLoss()] if own_loss else [])])
    model.set_trainer(trainer)
    with mock.patch.object(ScoreCache, "get_many", return_value={}):  # the LLM judges every fresh group
        trainer.fit(model)
    rounds_of = [clock.seconds[i : i + len(STEPS)] for i in range(len(STEPS), len(clock.seconds), len(STEPS))]
    times = {"supervised": [(first + third) / 2 for first, _, third, _ in rounds_of]}
    times |= {name: [turn[STEPS.index(name)] for turn in rounds_of] for name in ("fresh", "kept")}
    pairs = {name: zip(times[name], times["supervised"], strict=True) for name in ("kept", "fresh")}
    ratios = {name: statistics.median(a / b for a, b in both) for name, both in pairs.items()}
    exact = model.feedback.exact_supervision
    return {"seconds": times, "ratios": ratios, "members": clock.members, "loss": "ours" if exact else "NeMo's"}


def main() -> None:
    """Prints a row per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=list(KINDS), choices=list(KINDS), help="models to train")
    parser.add_argument("--shape", default="full", choices=list(SHAPES), help="tiny: to test this script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own-loss", action="store_true", help="RNN-T, CTC: supervised steps by our likelihood, too")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)
    print(f"{options.shape} shape, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"{'family':8}{'loss':>8}{'members':>9}{'supervised s':>14}{'kept ÷':>8}{'fresh ÷':>9}", flush=True)
    found = {}
    for family in options.family:
        with tempfile.TemporaryDirectory(prefix="adapt_step_") as name:
            given = {"shape": options.shape, "rounds": options.rounds, "own_loss": options.own_loss}
            one = found[family] = measure(family, Path(name), **given)
        middle, ratios = statistics.median(one["seconds"]["supervised"]), one["ratios"]
        line = f"{family:8}{one['loss']:>8}{one['members']:9.1f}{middle:14.3f}"
        print(line + f"{ratios['kept']:8.2f}{ratios['fresh']:9.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
