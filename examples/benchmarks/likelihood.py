"""Time and memory of log p of N-best groups with gradient: ours on the prefix trie against the plain ways.

    python examples/benchmarks/likelihood.py --family rnnt                # B 4, T 188, U 40–60, V 1024, joint 640
    python examples/benchmarks/likelihood.py --family tdt --small --json out.json
    python examples/benchmarks/likelihood.py --family ctc --device cuda

All variants run in one process on the same tensors, in turn, forward and backward; a time is the median over the
rounds and a ratio the median of the rounds' ratios. Memory is the peak of the bytes that torch has allocated, so it is
the same in every run: the resident set also has what the C library keeps of freed blocks, which doubled it in one run
and not in the next. ``--memory`` counts it and times nothing. A training step is encoder (shaped like the 110 M
FastConformer), loss, backward pass and AdamW, on groups that are given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from likelihood_problem import DURATIONS, FULL, SMALL, TINY, Labels, Problem, make_problem
from nemo.collections.asr.losses.ctc import CTCLoss
from nemo.collections.asr.losses.rnnt import RNNTLoss
from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.utils import logging as nemo_logging
from torch import Tensor

from nemo_llm_feedback.asr.likelihood import Band, BandReport, ctc_log_prob, transducer_log_prob
from nemo_llm_feedback.core.trie import PrefixTrie

SHAPES = {"full": FULL, "small": SMALL, "tiny": TINY}
Hyps = tuple[Sequence[Labels], Sequence[int]]  # label sequences and the row of each
LogProb = Callable[[Problem, Tensor], Tensor]  # log p of the hypotheses, given the encoder output that gets a gradient


def main() -> None:
    """Parses the arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--family", choices=("ctc", "rnnt", "tdt"))
    what.add_argument("--trie", action="store_true", help="only the trie of 64 × 16 hypotheses of 100 labels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="B 2, T 94, U 20–30, V 512, joint 320")
    parser.add_argument("--shape", choices=tuple(SHAPES), help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help="only the memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--skip", nargs="+", default=[], metavar="VARIANT", help="leave these out, e.g. nemo_expanded")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)
    if options.trie:
        print(trie_line())
        return
    shape = options.shape or ("small" if options.small else "full")
    variants = variants_of(options.family, options.device)
    unknown = set(options.skip) - variants.keys()
    if unknown:
        parser.error(f"--skip {', '.join(sorted(unknown))}: {options.family} has {', '.join(variants)}.")
    names = [name for name in variants if name not in options.skip]
    if options.memory:
        print(memory_lines(options.family, shape, options.device, names))
        return
    found = benchmark(
        options.family, shape, options.device, names=names, rounds=options.rounds, step=not options.no_step
    )
    print(table(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def trie_line(*, rows: int = 64, hyps: int = 16, labels: int = 100, rounds: int = 20) -> str:
    """CPU time of building one trie; the hypotheses of a row differ from the first in one label each."""
    rng = random.Random(0)
    flat: list[Labels] = []
    for _ in range(rows):
        base = [rng.randrange(1024) for _ in range(labels)]
        for _ in range(hyps):
            place = rng.randrange(labels)
            flat.append([*base[:place], rng.randrange(1024), *base[place + 1 :]])
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        trie = PrefixTrie.build(flat, [n // hyps for n in range(len(flat))])
        seconds.append(time.process_time() - start)
    low, middle = 1e3 * min(seconds), 1e3 * statistics.median(seconds)
    return f"{trie.num_nodes} nodes: at best {low:.1f} ms, median {middle:.1f} ms of CPU time"


def benchmark(
    family: str, shape: str, device: str, *, names: Sequence[str], rounds: int, step: bool
) -> dict[str, Any]:
    """All figures of one family: ``problem``, ``seconds``, ``mebibytes``, ``checks`` and ``ratios``."""
    variants = {name: run for name, run in variants_of(family, device).items() if name in names}
    problem = make_problem(family, SHAPES[shape], device=device)
    checks = compare(problem, variants)
    memory = {name: peak_mb(problem, variant) for name, variant in variants.items()}
    runs = {name: _run_of(problem, variant) for name, variant in variants.items()}
    if step:
        runs |= step_runs(problem, variants)
    seconds = interleaved(runs, rounds=rounds, device=device)
    trie = PrefixTrie.build(*problem.flat)
    return {
        "family": family,
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "problem": {"rho": problem.rho, "nodes": trie.num_nodes, "cells": trie.num_nodes * problem.shape.frames},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "mebibytes": memory,
        "checks": checks,
        "limit_seconds": joint_limit(problem, trie),
        "ratios": ratios(problem, seconds, memory),
    }


def variants_of(family: str, device: str) -> dict[str, LogProb]:
    """Name → variant, for what the family and device have."""

    def ours(of: Callable[[Problem], Hyps], band: Band | None = None) -> LogProb:
        return lambda problem, encoded: our_log_prob(problem, encoded, of(problem), band=band)

    variants: dict[str, LogProb] = {"trie": ours(lambda p: p.flat), "single": ours(_singles)}
    if family != "ctc":
        variants["banded"] = ours(lambda p: p.flat, Band())
    variants["per_hypothesis"] = per_hypothesis
    if family == "ctc":
        variants["nemo_single"] = lambda p, x: nemo_ctc(p, x, _singles(p))
        variants["nemo_expanded"] = lambda p, x: nemo_ctc(p, x, p.flat)
        variants["torch_expanded"] = lambda p, x: torch_ctc(p, x, p.flat)
    elif family == "rnnt" or device.startswith("cuda"):  # NeMo's TDT loss needs CUDA
        variants["nemo_single"] = lambda p, x: nemo_log_prob(p, x, _singles(p))
        variants["nemo_expanded"] = lambda p, x: nemo_log_prob(p, x, p.flat)
        variants["nemo_fused_expanded"] = lambda p, x: nemo_fused(p, x, p.flat)
    return variants


def _singles(problem: Problem) -> Hyps:
    return problem.best, range(len(problem.best))


def our_log_prob(problem: Problem, encoded: Tensor, hyps: Hyps, *, band: Band | None = None) -> Tensor:
    """[H] log p by this package, the trie built in the call."""
    trie = PrefixTrie.build(*hyps)
    if problem.family == "ctc":
        return ctc_log_prob(encoded.log_softmax(-1), problem.lengths, trie)
    args = (encoded, problem.lengths, trie, problem.decoder, problem.joint)
    return transducer_log_prob(*args, durations=DURATIONS if problem.family == "tdt" else (), band=band)


def per_hypothesis(problem: Problem, encoded: Tensor) -> Tensor:
    """[H] log p by this package, the n-th hypotheses of all rows at a time, nothing shared."""
    columns = [
        our_log_prob(problem, encoded, (column, range(len(column)))) for column in zip(*problem.groups, strict=True)
    ]
    return torch.stack(columns, dim=1).flatten()


def _padded(problem: Problem, hyps: Hyps) -> tuple[Tensor, Tensor, Tensor]:
    labels, rows = hyps
    device = problem.encoded.device
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(hyp) for hyp in labels], batch_first=True)
    sizes = torch.tensor([len(hyp) for hyp in labels])
    return padded.to(device), sizes.to(device), torch.tensor(list(rows), device=device)


def torch_ctc(problem: Problem, encoded: Tensor, hyps: Hyps) -> Tensor:
    """[H] log p by PyTorch's CTC loss on rows repeated for each hypothesis."""
    padded, sizes, rows = _padded(problem, hyps)
    log_probs = encoded.log_softmax(-1)[rows].transpose(0, 1)
    blank = problem.shape.vocabulary
    lengths = problem.lengths[rows]
    return -torch.nn.functional.ctc_loss(log_probs, padded, lengths, sizes, blank=blank, reduction="none")


def nemo_ctc(problem: Problem, encoded: Tensor, hyps: Hyps) -> Tensor:
    """[H] log p by NeMo's CTC loss."""
    padded, sizes, rows = _padded(problem, hyps)
    loss = CTCLoss(num_classes=problem.shape.vocabulary, reduction="none")
    args = {"targets": padded, "input_lengths": problem.lengths[rows], "target_lengths": sizes}
    return -loss(log_probs=encoded.log_softmax(-1)[rows], **args)


def _nemo_loss(problem: Problem) -> Any:
    classes = problem.shape.vocabulary
    if problem.family == "rnnt":
        kwargs = {"fastemit_lambda": 0.0}
        return RNNTLoss(num_classes=classes, reduction=None, loss_name="warprnnt_numba", loss_kwargs=kwargs)
    kwargs = {"durations": list(DURATIONS), "sigma": 0.0, "omega": 0.0, "fastemit_lambda": 0.0}
    return RNNTLoss(num_classes=classes, reduction=None, loss_name="tdt", loss_kwargs=kwargs)


def nemo_log_prob(problem: Problem, encoded: Tensor, hyps: Hyps) -> Tensor:
    """[H] log p by NeMo's joint and loss on rows repeated for each hypothesis."""
    padded, sizes, rows = _padded(problem, hyps)
    prediction, _ = problem.decoder.predict(padded, state=None, add_sos=True)
    logits = problem.joint.joint(encoded[rows], prediction)
    lengths = problem.lengths[rows]
    return -_nemo_loss(problem)(log_probs=logits, targets=padded, input_lengths=lengths, target_lengths=sizes)


def nemo_fused(problem: Problem, encoded: Tensor, hyps: Hyps) -> Tensor:
    """The same with NeMo's fused joint and loss, B rows at a time."""
    padded, sizes, rows = _padded(problem, hyps)
    joint = problem.joint
    prediction, _ = problem.decoder.predict(padded, state=None, add_sos=True)
    wer = SimpleNamespace()  # asked for, never called
    joint.set_fuse_loss_wer(True, loss=_nemo_loss(problem), metric=wer)
    joint.set_fused_batch_size(problem.shape.rows)
    try:
        loss, *_ = joint(  # reduction=None, so a loss a hypothesis
            encoder_outputs=encoded[rows].transpose(1, 2),
            decoder_outputs=prediction.transpose(1, 2),
            encoder_lengths=problem.lengths[rows],
            transcripts=padded,
            transcript_lengths=sizes,
        )
    finally:
        joint.set_fuse_loss_wer(False)
    return -loss


def _run_of(problem: Problem, variant: LogProb) -> Callable[[], None]:
    def run() -> None:
        encoded = problem.encoded.detach().requires_grad_()
        variant(problem, encoded).mean().backward()
        for module in (problem.decoder, problem.joint):
            if module is not None:
                module.zero_grad(set_to_none=True)

    return run


def step_runs(problem: Problem, variants: dict[str, LogProb]) -> dict[str, Callable[[], None]]:
    """A whole training step with each loss; the encoder's output is replaced by the problem's, its gradient is not."""
    shape = problem.shape
    device = problem.encoded.device
    encoder = ConformerEncoder(
        feat_in=80,
        n_layers=shape.layers,
        d_model=shape.encoder,
        subsampling="dw_striding",
        subsampling_factor=8,
        subsampling_conv_channels=256,
        n_heads=shape.heads,
        conv_kernel_size=9,
        ff_expansion_factor=4,
        dropout=0.0,
        dropout_pre_encoder=0.0,
        dropout_emb=0.0,
        dropout_att=0.0,
    ).to(device)
    head = torch.nn.Linear(shape.encoder, shape.vocabulary + 1).to(device) if problem.family == "ctc" else None
    modules = [m for m in (encoder, head, problem.decoder, problem.joint) if m is not None]
    optimizer = torch.optim.AdamW([param for m in modules for param in m.parameters()], lr=0.0)
    audio = torch.randn(shape.rows, 80, shape.frames * 8, device=device)
    audio_len = torch.full((shape.rows,), shape.frames * 8, device=device)

    def step(variant: LogProb) -> None:
        out, _ = encoder(audio_signal=audio, length=audio_len)
        out = out.transpose(1, 2)[:, : shape.frames]
        out = out if head is None else head(out)
        # The posterior of a trained model, with the cost and the gradient of a whole one.
        loss = -variant(problem, out - out.detach() + problem.encoded).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    stock = variants.get("nemo_single", variants["single"])
    losses = {"step_stock": stock, "step_trie": variants["trie"]}
    if "banded" in variants:
        losses["step_banded"] = variants["banded"]
    return {name: lambda loss=loss: step(loss) for name, loss in losses.items()}


def interleaved(runs: dict[str, Callable[[], None]], *, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each round; the first round, which warms up, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if number == 0 and "expanded" in name and device == "cpu":
                continue  # compare() has run it, and it takes the longest
            _sync(device)
            start = time.perf_counter()
            run()
            _sync(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_mb(problem: Problem, variant: LogProb) -> float:
    """Peak of what torch has allocated in one forward and backward pass, above what was there before it, in MiB."""
    run, device = _run_of(problem, variant), problem.encoded.device
    if device.type == "cuda":
        run()  # compilers and workspaces
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    steps = sorted(
        (event.start_ns(), i, event.nbytes()) for i, event in enumerate(events) if event.name() == "[memory]"
    )
    return max(itertools.accumulate(size for *_, size in steps)) / 2**20


def memory_lines(family: str, shape: str, device: str, names: Sequence[str]) -> str:
    """Peak memory of each variant, also as a share of the single hypotheses' by NeMo's loss and by this package."""
    problem, variants = make_problem(family, SHAPES[shape], device=device), variants_of(family, device)
    memory = {name: peak_mb(problem, variants[name]) for name in names}
    singles = [name for name in ("nemo_single", "single") if name in memory]
    lines = [f"{family}, {shape} shape{'MiB':>17}" + "".join(f"{'÷ ' + name:>16}" for name in singles)]
    for name, size in memory.items():
        lines.append(f"{name:24}{size:10.2f}" + "".join(f"{size / memory[single]:16.2f}" for single in singles))
    return "\n".join(lines)


def compare(problem: Problem, variants: dict[str, LogProb]) -> dict[str, float]:
    """Largest differences of log p against the trie's, and what the band reports."""
    with torch.no_grad():
        exact = our_log_prob(problem, problem.encoded, problem.flat)
        found = {}
        for name in ("per_hypothesis", "torch_expanded", "nemo_expanded", "nemo_fused_expanded"):
            if name in variants:
                other = variants[name](problem, problem.encoded)
                found[f"relative_difference_{name}"] = float(((other - exact) / exact).abs().max())
        if problem.family != "ctc":
            reports: list[BandReport] = []
            banded = our_log_prob(problem, problem.encoded, problem.flat, band=Band(report=reports.append))
            found["band_difference_nat"] = float((exact - banded).abs().max())
            found["band_bound_nat"] = float(reports[0].lost.max())
            found["band_cells"] = reports[0].evaluated / reports[0].cells
    return found


def joint_limit(problem: Problem, trie: PrefixTrie) -> float | None:
    """Seconds of one evaluation of the joint's last layer in every cell, at the matrix rate measured here."""
    if problem.joint is None:
        return None
    device = problem.encoded.device
    last = problem.joint.joint_net[-1]
    cells = 65536 if device.type == "cuda" else 512
    x = torch.randn(cells, last.in_features, device=device)
    run = {"matrix": lambda: torch.nn.functional.linear(x, last.weight.detach())}
    best = min(interleaved(run, rounds=9, device=device.type)["matrix"])
    return best / cells * trie.num_nodes * problem.shape.frames


def ratios(problem: Problem, seconds: dict[str, list[float]], memory: dict[str, float]) -> dict[str, float | None]:
    """The figures that targets are set for; None where the other side does not exist on this device."""

    def time_of(top: str, bottom: str) -> float | None:
        if top not in seconds or bottom not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True))

    def memory_of(top: str, bottom: str) -> float | None:
        return memory[top] / memory[bottom] if top in memory and bottom in memory else None

    single = "nemo_single" if "nemo_single" in seconds else "single"
    expanded = "torch_expanded" if "torch_expanded" in seconds else "nemo_expanded"
    return {
        "rho": problem.rho,
        "time_vs_single": time_of("trie", single),
        "time_vs_single_banded": time_of("banded", single),
        "time_vs_own_single": time_of("trie", "single"),
        "time_vs_own_single_banded": time_of("banded", "single"),
        "memory_vs_single": memory_of("trie", single),
        "memory_vs_own_single": memory_of("trie", "single"),
        "memory_vs_single_banded": memory_of("banded", single),
        "speedup_vs_expanded": time_of(expanded, "trie"),
        "speedup_vs_expanded_banded": time_of(expanded, "banded"),
        "memory_vs_expanded": memory_of(expanded, "trie"),
        "step_vs_stock": time_of("step_trie", "step_stock"),
        "step_vs_stock_banded": time_of("step_banded", "step_stock"),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    problem = found["problem"]
    lines = [
        f"{found['family']}, {found['shape']} shape, {found['device']}, {found['threads']} thread(s), "
        f"torch {found['versions']['torch']}: rho {problem['rho']:.2f}, "
        f"{problem['nodes']} nodes, {problem['cells']} cells",
        f"{'':24}{'seconds':>10}{'MiB':>10}",
    ]
    for name, seconds in found["seconds"].items():
        memory = found["mebibytes"].get(name)
        lines.append(f"{name:24}{seconds:10.3f}" + (f"{memory:10.0f}" if memory is not None else ""))
    if found["limit_seconds"] is not None:
        lines.append(f"{'joint once in each cell':24}{found['limit_seconds']:10.3f}")
    for part in ("checks", "ratios"):
        lines += [f"{name:34}{value:12.4g}" for name, value in found[part].items() if value is not None]
    return "\n".join(lines)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
