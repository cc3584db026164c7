"""Shows that everything runs on this machine's NVIDIA card, and what it costs there; ends with 1 if anything fails.

    make gpu-check                          # or: python examples/benchmarks/gpu_check.py --out gpu_check

Three parts, in at most eight minutes, without downloads: the CUDA tests; thirty steps of a tiny model with a random
LLM of SmolLM2's layout, whose curves must follow the CPU's; and the cost of one step with new hypotheses (a refresh)
and one with kept ones, of random models of released sizes with a random NF4 LLM of 7 B. The numbers go to
gpu_check.json, a table for docs/performance.md to gpu_check.md. Random weights cost what trained ones cost, as far as
their transcripts have the same length: the bias of blank is set so that a quarter of the frames emit.
Without a card all parts run on the CPU with two narrow layers, which tests this script and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from llm_scoring import make_llama, to_nf4
from nemo.utils import logging as nemo_logging

import nemo_llm_feedback
from nemo_llm_feedback import adapt, compose_config, restore
from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.data.audio import load_audio
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.llm import loading

ROOT = Path(nemo_llm_feedback.__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRAINER = "gpu" if CUDA else "cpu"
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30 if CUDA else 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "initializer_range": 0.1,
    "max_position_embeddings": 2048,
}
# Largest mean difference of the two curves, as a share of their mean: the devices round differently, and a beam may
# then end with another member. Wrong masks or dtypes differ by more than half.
TOLERANCE, STEPS = 0.05, 30
LIMIT = 480.0 if CUDA else math.inf  # seconds of all parts
CURVES = ("feedback/logp", "feedback/reward_policy")
# Name → kind of tests/helpers/tiny.py, layers, width and mel bands of the encoder, layers of the prediction network.
SIZES = {"RNN-T of 110 M": ("rnnt_bpe", 17, 512, 80, 1), "TDT of 0.6 B": ("tdt_bpe", 24, 1024, 128, 2)}
# Settings that are off until a card has shown them, tried on the first. With the last one a kept step proposes for the
# next, and the refresh that follows takes what was judged beside it.
VARIANTS = {"": "", ", CUDA graphs": "proposals.cuda_graphs=true", ", score_ahead": "feedback.score_ahead=true"}
VOCABULARY, HIDDEN = (1024, 640) if CUDA else (64, 32)
ROWS, SECONDS = (8, 15.0) if CUDA else (2, 1.0)
# Even steps propose, odd ones use what is kept. The first two warm up, the next are timed, the last counted.
TIMED, COUNTED = 2, 4
LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)" if CUDA else "aten::")
SYNC = re.compile(r"cuda(Stream|Device|Event)Synchronize" if CUDA else "aten::(_local_scalar_dense|nonzero)")
COLUMNS = ("seconds", "launches", "syncs", "peak_mb", "real_time_factor", "members")


def main() -> int:
    """Runs the parts, writes both files and prints the table; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check"), help="folder of gpu_check.json and gpu_check.md"
    )
    parser.add_argument("--skip", nargs="+", default=[], choices=("tests", "curve", "profile"), help="leave parts out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    nemo_logging.setLevel(logging.ERROR)
    found: dict[str, Any] = {"device": _device_name(), "torch": torch.__version__, "failures": []}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        parts: dict[str, Callable[[Path], Any]] = {"tests": run_tests, "curve": compare_curves, "profile": profile_all}
        for part in [part for part in parts if part not in options.skip]:
            started = time.perf_counter()
            try:
                found[part] = parts[part](Path(name) / part)
            except Exception as error:  # the other parts still have something to show
                traceback.print_exc()
                found["failures"].append(f"{part}: {type(error).__name__}: {error}")
            print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    found["seconds"] = round(time.perf_counter() - began)
    if found["seconds"] > LIMIT:
        found["failures"].append(f"all parts took {found['seconds']} s, more than {LIMIT:g} s")
    (options.out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "gpu_check.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    print("\n".join(["failed:", *found["failures"]]) if found["failures"] else "all parts passed")
    return int(bool(found["failures"]))


def table(found: dict[str, Any]) -> str:
    """The profiles as a table in Markdown; without a card launches are operators, nested ones included."""
    lines = [f"{found['device']}, torch {found['torch']}, {ROWS} utterances of {SECONDS:g} s:", ""]
    lines += [f"| model | step | {' | '.join(COLUMNS).replace('_', ' ')} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for model, steps in found.get("profile", {}).items():
        for step, costs in steps.items():
            lines.append(f"| {model} | {step} | {' | '.join(f'{costs[name]:g}' for name in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def run_tests(folder: Path) -> dict[str, int]:
    """The CUDA tests in a process of their own; those that need a card may be left out where there is none.

    Raises:
        RuntimeError: one failed or, on a card, was left out.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/asr/test_cuda.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|failed|error)", run.stdout)}
    if run.returncode or not counts.get("passed") or (CUDA and counts.get("skipped")):
        raise RuntimeError(f"{counts}\n{run.stdout[-4000:]}{run.stderr[-1000:]}")
    return counts


def compare_curves(folder: Path) -> dict[str, Any]:
    """Thirty steps on this device and on the CPU, in float32 on both: what the hypotheses and the policy are worth.

    Raises:
        RuntimeError: the curves differ by more than ``TOLERANCE``.
    """
    from helpers.tiny import build_nemo, make_tokenizer, write_manifest
    from helpers.tiny_llm import make_tiny_llm

    base = build_nemo("hybrid_bpe", folder / "base.nemo", tokenizer_dir=make_tokenizer(folder / "tokenizer"))
    manifest, llm = write_manifest(folder / "pool.json", [None] * 8), make_tiny_llm(folder / "llm", **SMOLLM2)
    settings = """trainer.precision=32 llm=full llm.compute_dtype=float32 seed=1 model.optim.lr=1e-3 reward.alpha=0.1
        reward.beta=1 proposals.beam=4 proposals.boosted=2 proposals.boosting_weights=[] proposals.max_symbols=3
        feedback.augment=false feedback.refresh_every=5 feedback.pool_utterances=4 guards.every=0 report_audio=false
        model.train_ds.batch_size=4 model.train_ds.shuffle=false"""
    curves = {}
    for trainer, device in ((TRAINER, DEVICE), ("cpu", "cpu")):
        placed = [f"trainer={trainer}", f"llm.device={device}", f"exp_manager.exp_dir={folder / trainer}"]
        given: dict[str, Any] = {"llm": llm, "terms": ["soy latte", "mocha"], "max_steps": STEPS}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            result = adapt(base, manifest, **given, overrides=[*settings.split(), *placed])
        lines = (result.log_dir / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        curves[device] = {name: [json.loads(line)[name] for line in lines] for name in CURVES}
    differences = {name: _difference(curves[DEVICE][name], curves["cpu"][name]) for name in CURVES}
    if not max(differences.values()) <= TOLERANCE:
        raise RuntimeError(f"the curves differ: {differences}\n{curves}")
    return {"differences": differences, "curves": curves}


def _difference(here: list[float], cpu: list[float]) -> float:
    """Mean difference as a share of the mean; infinite where steps are missing."""
    if len(here) != STEPS or len(cpu) != STEPS:
        return math.inf
    return sum(abs(a - b) for a, b in zip(here, cpu, strict=True)) / sum(map(abs, cpu))


def profile_all(folder: Path) -> dict[str, Any]:
    """Model → step → costs."""
    from helpers.tiny import build_nemo, make_tokenizer, write_manifest
    from helpers.tiny_llm import make_tiny_llm

    rng = random.Random(0)
    words = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(4000)]
    tokenizer = make_tokenizer(folder / "tokenizer", words=words, size=VOCABULARY)
    manifest = write_manifest(folder / "pool.json", [None] * ROWS, seconds=SECONDS)
    llm = make_tiny_llm(folder / "llm", max_position_embeddings=2048)  # its tokenizer; the weights are made in place
    llama = to_nf4(make_llama("7b" if CUDA else "tiny", torch.device(DEVICE)), in_place=True)
    with mock.patch.object(loading, "load_model", return_value=llama):
        found = {}
        for name in SIZES:
            base = build_nemo(SIZES[name][0], folder / "base.nemo", tokenizer_dir=tokenizer, **layout(name))
            for variant in ("",) if found else VARIANTS:
                found[name + variant] = profile(base, folder, manifest, llm, words[:20], more=VARIANTS[variant])
        return found


def profile(base: Path, folder: Path, manifest: Path, llm: Path, terms: list[str], *, more: str) -> dict[str, Any]:
    """Trains six steps and returns step → costs."""
    settings = f"""trainer={TRAINER} model.train_ds.manifest_filepath={manifest} llm.model={llm} seed=1
        context.terms=[{",".join(terms)}] model.train_ds.batch_size={ROWS} model.train_ds.shuffle=false
        feedback.refresh_every=2 feedback.pool_utterances=2 model.optim.lr=1e-5 reward.alpha=0.1 reward.beta=1
        proposals.boosting_weights=[] proposals.swap_similarity=20 guards.every=0 {more}"""
    cfg = compose_config(settings.split())
    model = restore(base, map_location=DEVICE)
    emit_labels(model, manifest)
    model.setup_feedback(cfg, work_dir=folder / "run")
    costs = Costs()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    options = {"precision": str(cfg.trainer.precision), "accelerator": TRAINER, "devices": 1, "max_steps": COUNTED + 2}
    trainer = pl.Trainer(**options, **quiet, gradient_clip_val=1.0, num_sanity_val_steps=0, callbacks=[costs])
    model.set_trainer(trainer)
    trainer.fit(model)
    members = model.feedback.statistics.members
    return {step: costs.of[step] | {"members": members} for step in ("refresh", "kept")}


def layout(name: str) -> dict[str, Any]:
    """The settings of tests/helpers/tiny.py that make its model one of the released sizes; small on a CPU."""
    _, layers, width, bands, rnn_layers = SIZES[name]
    layers, width, bands, rnn_layers = (layers, width, bands, rnn_layers) if CUDA else (2, 32, 16, rnn_layers)
    sizes = {"n_layers": layers, "d_model": width, "feat_in": bands, "n_heads": 8, "ff_expansion_factor": 4}
    sizes |= {"conv_kernel_size": 9, "subsampling_conv_channels": 256 if CUDA else 8}
    found = {f"encoder__{key}": value for key, value in sizes.items()}
    for key, value in {"enc_hidden": width, "pred_hidden": HIDDEN, "joint_hidden": HIDDEN}.items():
        found[f"model_defaults__{key}"] = value
    for key, value in {"encoder_hidden": width, "pred_hidden": HIDDEN, "joint_hidden": HIDDEN}.items():
        found[f"joint__jointnet__{key}"] = value
    rnn = {"decoder__prednet__pred_hidden": HIDDEN, "decoder__prednet__pred_rnn_layers": rnn_layers}
    return found | rnn | {"preprocessor__features": bands}


@torch.no_grad()
def emit_labels(model: Any, manifest: Path, *, share: float = 0.25) -> None:
    """Sets the bias of blank so that at the start of a text this share of the frames would emit a label."""
    rows, rate = read_manifest(manifest), int(model.cfg.preprocessor.sample_rate)
    audio = load_audio(rows, sample_rate=rate, device=model.device)
    with evaluation_mode(model):
        encoded, _ = encode(model, audio.signal, audio.signal_len)
        start = model.decoder.predict(None, None, add_sos=False, batch_size=len(rows))[0]
        scores = model.joint.joint(encoded.transpose(1, 2), start)[:, :, 0].float()  # [B, T, V + 1 + durations]
    blank = model.joint.num_classes_with_blank - 1 - model.joint.num_extra_outputs
    gap = scores[..., :blank].amax(-1) - scores[..., blank]
    model.joint.joint_net[-1].bias[blank] += gap.quantile(1 - share)


class Costs(pl.Callback):
    """Seconds, counts and memory of training steps: ``of[step][cost]``, step ``refresh`` or ``kept``."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, float]] = {"refresh": {}, "kept": {}}
        self._started, self._profiler = 0.0, torch.profiler.profile()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Starts the clock, or the profiler."""
        step = trainer.global_step
        if step >= COUNTED:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes down what the step took, its update included."""
        step = trainer.global_step - 1
        found = self.of["kept" if step % 2 else "refresh"]
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        if step >= COUNTED:
            self._profiler.stop()
            events = self._profiler.key_averages()
            found["launches"] = sum(event.count for event in events if LAUNCH.match(event.key))
            found["syncs"] = sum(event.count for event in events if SYNC.match(event.key))
        elif step >= TIMED:
            peak = (
                torch.cuda.max_memory_allocated()
                if CUDA
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            )
            found |= {"seconds": round(seconds, 4), "peak_mb": round(peak / 2**20)}
            found["real_time_factor"] = round(ROWS * SECONDS / seconds, 1)


def _device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "no CUDA device: CPU, models of two narrow layers"


if __name__ == "__main__":
    sys.exit(main())
