"""What sharing saves when an LLM scores N-best lists: tokens through the model, time and peak memory.

    python examples/benchmarks/llm_scoring.py [--json FILE] [--quick] [--storage fp32 nf4] [--device auto|cpu|cuda]
                                              [--size 42m|1b|8b] [--rounds 3] [--threads N]

Three ways to score 16 utterances × 8 hypotheses × 20 tokens behind a context of 300 tokens, with a context for each
utterance and with one for the whole run:

- naive: one row per hypothesis with its whole prompt, in the batch size that is fastest here. It is the strongest
  naive way we know: the output matrix is applied to the hypothesis's positions only, as in ours.
- prompt: the prompt runs once, the hypotheses continue from its keys and values.
- trie: what the plugin does, common prefixes of the hypotheses run once too.

Every round times all ways in turn, so that a drift of the machine's speed meets them all; a speed-up is the median
over rounds of the paired ratio. Contexts are run anew in every timed run, as if each were the first. The weights are
random: time does not depend on them. ``ratios`` has the trie's speed-ups in wall time (``cpu_time_ratios``: in
processor time, which other programs on the machine disturb less) and ``padding``, tokens through the model ÷ unique
tokens − 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import json
import logging
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.llm.engine import Engine
from nemo_llm_feedback.llm.packing import Sharing

Ids = tuple[int, ...]
Requests = list[tuple[Ids, list[Ids]]]  # (prompt, its hypotheses)

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "42m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARIES = {"tiny": 500, "42m": 32_000, "1b": 128_256, "7b": 152_064, "8b": 128_256}
KEY_VALUE_HEADS = {"1b": 8, "7b": 4, "8b": 8}
WAYS = {"prompt": Sharing.PROMPT, "trie": Sharing.TRIE}


@dataclass(frozen=True)
class Workload:
    """How much there is to score; lengths in tokens, the hypothesis's end token included."""

    utterances: int = 16
    hypotheses: int = 8
    hypothesis_length: int = 20
    context_length: int = 300


@dataclass(frozen=True)
class Result:
    """One way of scoring under one kind of context.

    Attributes:
        seconds: wall time, median over rounds; ``cpu_seconds`` processor time of this process, all threads together.
        tokens: through the model, padding included; ``unique`` is the least that any way needs.
        peak_mb: memory above what was in use before the run; on a CPU resident memory, sampled.
        batch: rows a batch of the naive way; 0 for ours, which go by a token budget.
        speedup, cpu_speedup: median over rounds of naive ÷ this.
        max_difference: largest difference from the naive score, in nats.
    """

    storage: str
    contexts: str
    way: str
    seconds: float
    cpu_seconds: float
    tokens: int
    unique: int
    peak_mb: float
    batch: int
    speedup: float
    cpu_speedup: float
    max_difference: float


def main() -> None:
    """Measures and prints the table."""
    options = parse_arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.device == "cuda" else "cpu")
    if options.device == "auto" and torch.cuda.is_available():
        device = torch.device("cuda")
    size = options.size or ("tiny" if options.quick else "42m" if device.type == "cpu" else "1b")
    workload = Workload(4, 4, 8, 40) if options.quick else Workload()
    rounds = 1 if options.quick else options.rounds

    results: list[Result] = []
    model = make_llama(size, device)
    for storage in options.storage:
        stored = model if storage == "fp32" else to_nf4(model)
        found = measure(stored, workload, storage=storage, vocabulary=VOCABULARIES[size], rounds=rounds)
        results += found
        print(table(found), flush=True)
    report = {
        "workload": asdict(workload),
        "machine": machine(device),
        "size": size,
        "rounds": rounds,
        "results": [asdict(result) for result in results],
        "ratios": ratios(results),
        "cpu_time_ratios": ratios(results, cpu=True),
    }
    print("ratios         ", json.dumps(report["ratios"]))
    print("cpu_time_ratios", json.dumps(report["cpu_time_ratios"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="a tiny model and workload: shows that it runs, no more")
    parser.add_argument("--storage", nargs="+", default=["fp32", "nf4"], choices=("fp32", "nf4"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--size", choices=tuple(SIZES), help="default: 42m on a CPU, 1b on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; default: torch's own choice")
    return parser.parse_args()


# ---------------------------------------------------------------- models


def make_llama(size: str, device: torch.device) -> Any:
    """A random Llama in eval mode: float32 on a CPU, bfloat16 on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = SIZES[size]
    config = LlamaConfig(
        **settings,
        vocab_size=VOCABULARIES[size],
        num_key_value_heads=KEY_VALUE_HEADS.get(size, settings["num_attention_heads"]),
        max_position_embeddings=2048,
        tie_word_embeddings=size not in ("7b", "8b"),
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(
            config, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def to_nf4(model: Any, *, in_place: bool = False) -> Any:
    """A copy whose blocks' matrices are stored in 4 bit with double quantisation, as ``llm.quantization=nf4`` does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    stored = model if in_place else copy.deepcopy(model)
    for layer in stored.model.layers:
        for name, module in list(layer.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            weight = module.weight
            packed = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = Params4bit(
                weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
            ).to(weight.device)  # the move packs
            layer.set_submodule(name, packed)
    return stored


# ---------------------------------------------------------------- work


def make_requests(workload: Workload, vocabulary: int, *, run_wide: bool) -> Requests:
    """Random ids: N-best lists whose members leave the first one at a random place, as beams' do.

    Args:
        workload: how much.
        vocabulary: ids are in [3, vocabulary).
        run_wide: one context for all; equal contexts are merged, as the scorer does.
    """
    rng = random.Random(0)

    def ids(length: int) -> Ids:
        return tuple(rng.randrange(3, vocabulary) for _ in range(length))

    common = ids(workload.context_length)
    requests: Requests = []
    for _ in range(workload.utterances):
        best = ids(workload.hypothesis_length - 1)
        members = {(*best, 1): None}
        while len(members) < workload.hypotheses:
            place = rng.randrange(len(best))
            members[(*best[:place], *ids(len(best) - place), 1)] = None
        requests.append((common if run_wide else ids(workload.context_length), list(members)))
    if run_wide:
        return [(common, [text for _, texts in requests for text in texts])]
    return requests


def unique_tokens(requests: Requests) -> int:
    """The least number of tokens that must go in: each prompt, and each distinct prefix of its hypotheses."""
    return sum(
        len(prompt) + len({text[: depth + 1] for text in texts for depth in range(len(text) - 1)})
        for prompt, texts in requests
    )


@torch.no_grad()
def score_naive(model: Any, requests: Requests, *, batch: int) -> tuple[list[float], int]:
    """Log-probabilities of all hypotheses, each in a row of its own with its whole prompt, and the tokens run."""
    rows = [(prompt, text) for prompt, texts in requests for text in texts]
    device = model.get_input_embeddings().weight.device
    sums: list[float] = []
    tokens = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]  # all rows have the same length here, so there is no padding
        ids = torch.tensor([(*prompt, *text) for prompt, text in part], device=device)
        length = len(part[0][1])
        hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logp = model.get_output_embeddings()(hidden[:, -length:]).float().log_softmax(-1)
        sums += logp.gather(2, ids[:, -length:, None]).double().sum((1, 2)).tolist()
        tokens += ids[:, :-1].numel()
    return sums, tokens


def score_shared(model: Any, requests: Requests, *, sharing: Sharing) -> Callable[[], tuple[list[float], int]]:
    """A run with a new engine, which knows no context yet; making the engine is not part of the run."""
    engine = Engine(model, token_budget=LLMConfig(model="-").token_budget)
    engine.sharing = sharing

    def run() -> tuple[list[float], int]:
        scores = engine.score(dict(requests))
        return [scores[prompt][text] for prompt, texts in requests for text in texts], engine.tokens_run

    return run


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Clock:
    """Seconds of one run on the wall and of this process's processor time."""

    wall: float
    cpu: float


def measure(model: Any, workload: Workload, *, storage: str, vocabulary: int, rounds: int) -> list[Result]:
    """Times all ways under both kinds of context, in turn."""
    kinds = {
        "utterance": make_requests(workload, vocabulary, run_wide=False),
        "run": make_requests(workload, vocabulary, run_wide=True),
    }
    batch = best_batch(model, kinds["utterance"])
    clocks: dict[tuple[str, str], list[Clock]] = {}
    outcome: dict[tuple[str, str], tuple[list[float], int]] = {}
    peak: dict[tuple[str, str], float] = {}

    def prepared(requests: Requests, way: str) -> Callable[[], tuple[list[float], int]]:
        if way == "naive":
            return lambda: score_naive(model, requests, batch=batch)
        return score_shared(model, requests, sharing=WAYS[way])

    for kind, requests in kinds.items():  # a warm-up, in which memory is watched and results are kept
        for way in ("naive", *WAYS):
            run = prepared(requests, way)
            with peak_memory(model) as mb:
                outcome[kind, way] = run()
            peak[kind, way] = mb[0]
    for _ in range(rounds):
        for kind, requests in kinds.items():
            for way in ("naive", *WAYS):
                clocks.setdefault((kind, way), []).append(timed(prepared(requests, way)))
    results = []
    for (kind, way), times in clocks.items():
        scores, tokens = outcome[kind, way]
        naive = outcome[kind, "naive"][0]
        pairs = list(zip(clocks[kind, "naive"], times, strict=True))
        results.append(
            Result(
                storage=storage,
                contexts=kind,
                way=way,
                seconds=statistics.median(t.wall for t in times),
                cpu_seconds=statistics.median(t.cpu for t in times),
                tokens=tokens,
                unique=unique_tokens(kinds[kind]),
                peak_mb=peak[kind, way],
                batch=batch if way == "naive" else 0,
                speedup=statistics.median(a.wall / b.wall for a, b in pairs),
                cpu_speedup=statistics.median(a.cpu / b.cpu for a, b in pairs),
                max_difference=max(abs(a - b) for a, b in zip(scores, naive, strict=True)),
            )
        )
    return results


def best_batch(model: Any, requests: Requests) -> int:
    """The batch size with which the naive way is fastest per row: powers of two until three in a row are no faster."""
    rows = [(prompt, [text]) for prompt, texts in requests for text in texts]
    score_naive(model, rows[:1], batch=1)  # what a first call alone costs
    best, fastest = 1, float("inf")
    for batch in (2**n for n in range(len(rows).bit_length())):
        if batch > 8 * best:
            break
        part = rows[: max(batch, min(len(rows), 4))]
        try:
            a_row = timed(lambda batch=batch, part=part: score_naive(model, part, batch=batch)).wall / len(part)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if a_row < fastest:
            best, fastest = batch, a_row
    return best


def timed(run: Callable[[], object]) -> Clock:
    """Seconds of one run; on a GPU until its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Clock(time.perf_counter() - wall, time.process_time() - cpu)


@contextlib.contextmanager
def peak_memory(model: Any) -> Iterator[list[float]]:
    """Puts the peak of memory in use inside the block, above what was in use before, into the list, in MB."""
    found = [0.0]
    if model.get_input_embeddings().weight.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    process = psutil.Process()
    if sys.platform == "linux":  # else what an earlier way freed would be used again unseen
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    before, done = process.memory_info().rss, threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], (process.memory_info().rss - before) / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


# ---------------------------------------------------------------- reporting


def ratios(results: Sequence[Result], *, cpu: bool = False) -> dict[str, float]:
    """The three figures to watch, of the trie way: speed-ups of the first storage, padding the worst of all."""

    def speedup(result: Result) -> float:
        return round(result.cpu_speedup if cpu else result.speedup, 2)

    tries = [result for result in results if result.way == "trie"]
    first = {result.contexts: result for result in tries if result.storage == results[0].storage}
    return {
        "run_context_speedup": speedup(first["run"]),
        "utterance_context_speedup": speedup(first["utterance"]),
        "padding": round(max(result.tokens / result.unique - 1 for result in tries), 4),
    }


def table(results: Sequence[Result]) -> str:
    """One line a result."""
    head = "storage contexts  way     tokens  unique  seconds  speed-up    CPU s  speed-up  peak MB  batch"
    lines = [f"{head}  max |difference| nat"]
    for r in results:
        lines.append(
            f"{r.storage:7} {r.contexts:9} {r.way:6} {r.tokens:7} {r.unique:7} {r.seconds:8.3f} {r.speedup:9.2f} "
            f"{r.cpu_seconds:8.3f} {r.cpu_speedup:9.2f} {r.peak_mb:8.0f} {r.batch or '':>6}  {r.max_difference:.1e}"
        )
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
    }


if __name__ == "__main__":
    main()
