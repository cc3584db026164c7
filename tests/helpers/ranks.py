"""Processes for tests: ranks that train together, and runs that are killed. One import of NeMo serves them all."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_llm_feedback.core.errors import FeedbackError, RewardError
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.training.mixin import LLMFeedbackMixin
from nemo_llm_feedback.training.models import restore

# Each process is forked from a clean one that has imported this module.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks", "nemo_llm_feedback.cli.jobs.adapt", "nemo_llm_feedback.core.config.compose"])


def start(target: Callable[..., None], *args: Any) -> Any:
    """A started process that runs a function of this module or of a test."""
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def run_ranks(scenario: str, folder: Path, *args: Any, size: int = 2) -> list[dict[str, Any]]:
    """What ``scenario(folder, *args)`` gave on every rank; a rank that hangs fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(size):
        (folder / f"{scenario}_{rank}.pt").unlink(missing_ok=True)
    ranks = [start(_rank, rank, size, port, scenario, folder, args) for rank in range(size)]
    for process in ranks:
        process.join(240)
    hanging = [process for process in ranks if process.is_alive()]
    for process in hanging:
        process.kill()
    files = [folder / f"{scenario}_{rank}.pt" for rank in range(size)]
    found = [torch.load(path, weights_only=False) if path.is_file() else {} for path in files]
    assert not hanging, "\n".join(["a rank hangs", *(rank["error"] for rank in found if "error" in rank)])
    return found


def _rank(rank: int, size: int, port: int, scenario: str, folder: Path, args: tuple[Any, ...]) -> None:
    # As a launcher of processes sets them; Lightning then starts none itself.
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size)
    )
    torch.set_num_threads(1)
    try:
        found = SCENARIOS[scenario](folder, *args)
    except Exception:
        found = {"error": traceback.format_exc()}
    torch.save(found, folder / f"{scenario}_{rank}.pt")


class Judge:
    """A function of the labels; rows whose context says so are not judged."""

    name = "labels"

    def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
        rows = [[sum((i + 1) * y for i, y in enumerate(h.tokens)) % 11 / 2 for h in g.hypotheses] for g in groups]
        rows = [
            [float("nan")] * len(row) if "unjudged" in g.context.description else row
            for row, g in zip(rows, groups, strict=True)
        ]
        return RewardOutput(pad_groups(rows), {})


judge = Judge()


def train(
    nemo: Path, manifest: Path, work: Path, *, reward: Any = judge, steps: int = 5, batch: int = 2, **more: Any
) -> Any:
    """Trains a tiny model with SGD on as many ranks as the environment says; returns it.

    SGD, since Adam turns the rounding noise of parameters whose gradient is 0 into steps.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=size,
        strategy=DDPStrategy(process_group_backend="gloo") if size > 1 else "auto",
        use_distributed_sampler=not more.get("use_lhotse", False),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    model = restore(nemo, map_location="cpu")
    model.set_trainer(trainer)
    train_ds = {"manifest_filepath": str(manifest), "sample_rate": 16000, "batch_size": batch, "num_workers": 0}
    lhotse = {"use_lhotse": True, "shuffle": True, "use_bucketing": False} if more.get("use_lhotse") else {}
    cfg = {
        "model": {
            "train_ds": {**train_ds, "shuffle": False, **lhotse},
            "optim": {"name": "sgd", "lr": None if "rates" in more else 0.01, "sched": None},
        },
        "parameters": {"lr_candidates": more.get("rates", []), "lr_trial_steps": 3},
        "feedback": {
            "pool_utterances": 2,
            "refresh_every": 1,
            "log_hypotheses_every": 0,
            "heads": more.get("heads", "auto"),
            "labelled": more.get("labelled", "supervised"),
            "augment": False,
            "generations": more.get("generations", 1),
        },
        "guards": more.get("guards", {"every": 0}),
        "proposals": {"beam": 4, "boosted": 0, "term_swap": 0, "max_members": 8, "max_symbols": 3},
        "objective": {"name": more.get("objective", "distill"), "temperature": 0.5, "mass_weight": 0.5},
        "reward": {"name": "length"},
        "context": {"description": "an order"},
    }
    model.setup_feedback(cfg, work_dir=work, reward=reward)
    trainer.fit(model)
    return model


def _equal(folder: Path, nemo: Path, manifest: Path, settings: str) -> dict[str, Any]:
    rank = os.environ["LOCAL_RANK"]
    model = train(nemo, manifest, folder / f"work{rank}", **json.loads(settings))
    metrics = {k: float(v) for k, v in model.trainer.callback_metrics.items() if k.startswith("feedback/")}
    return {"weights": model.state_dict(), "metrics": metrics}


def measured(nemo: Path, manifest: Path, work: Path, *, batch: int) -> dict[str, Any]:
    """A run with a trial of rates, held-out measurements, and a guard set; what all ranks must agree on, and the
    utterances that this one measured."""
    from contextlib import ExitStack
    from unittest import mock

    from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping, held_out, lr_search

    falls: list[dict[float, float]] = []
    choose, measure, mine = lr_search.smallest_good, held_out.HeldOutEvaluator.measure, set()

    def chosen(found: dict[float, float]) -> float:
        falls.append(dict(found))
        return choose(found)

    def watched(self: Any, model: Any, *, step: int) -> Any:
        mine.update(u for audio in self.audio for u in audio.utterances)
        return measure(self, model, step=step)

    def by_name(self: Any, now: Any) -> list[float]:
        """The tiny model's texts do not change, and all gains would be 0."""
        return [int(u.split("_")[-1].split(".")[0]) + 0.5 for audio in self.audio for u in audio.utterances]

    patches = [
        mock.patch.object(held_out.HeldOutEvaluator, "_gains", by_name),
        mock.patch.object(held_out, "_BATCH", 1),  # so that few rows are several batches
        mock.patch.object(lr_search, "smallest_good", chosen),
        mock.patch.object(held_out.HeldOutEvaluator, "measure", watched),
    ]
    far = {"max_length_ratio": 100.0, "max_empty_rise": 1.0, "max_kl": 1e9, "max_repetition_rise": 1.0}
    guards = {"every": 1, "held_out": 0.5, "everyday": "en", "max_style_change": 1.0, **far}
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        model = train(nemo, manifest, work, steps=2, batch=batch, rates=[0.01, 0.02, 0.04], guards=guards)
    stopping = next(c for c in model.trainer.callbacks if isinstance(c, HeldOutEarlyStopping))
    agreed = {"falls": falls, "rate": float(model.cfg.optim.lr), "share": stopping.share, "wer": stopping.guard_wer}
    history = [[*found.metrics().values(), *found.gains] for found in stopping.history]
    return {"agreed": agreed | {"history": history}, "mine": mine}


def _measured(folder: Path, nemo: Path, manifest: Path) -> dict[str, Any]:
    return measured(nemo, manifest, folder / f"work{os.environ['LOCAL_RANK']}", batch=2)


def _lhotse(folder: Path, nemo: Path, manifest: Path) -> dict[str, Any]:
    model = train(nemo, manifest, folder / f"work{os.environ['LOCAL_RANK']}", steps=2, use_lhotse=True)
    return {"seen": sorted(model.feedback.reader.seen)}


def _failure(folder: Path, nemo: Path, manifest: Path) -> dict[str, Any]:
    class Fails(Judge):
        calls = 0

        def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
            self.calls += 1
            if self.calls == 3 and os.environ["LOCAL_RANK"] == "1":
                raise RewardError("the LLM has run out of memory")
            return super().__call__(groups)

    try:
        train(nemo, manifest, folder / f"work{os.environ['LOCAL_RANK']}", reward=Fails())
    except FeedbackError as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {}


def _generations(folder: Path, nemo: Path, manifest: Path) -> dict[str, Any]:
    """A run of two generations whose measurements find one gain after the other."""
    from dataclasses import replace

    from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator

    measure = HeldOutEvaluator.measure
    HeldOutEvaluator.measure = lambda self, model, *, step: replace(  # type: ignore[method-assign]
        measure(self, model, step=step), gain=float(step), kl=0.0
    )
    guards = {"every": 1, "held_out": 0.3, "max_length_ratio": 100.0, "max_empty_rise": 1.0}
    work = folder / f"work{os.environ['LOCAL_RANK']}"
    model = train(nemo, manifest, work, steps=4, generations=2, guards=guards)
    generation = model.feedback.generation
    return {
        "number": generation.number,
        "began": generation.began,
        "teacher": generation.weights,
        "weights": model.state_dict(),
    }


def _adapt(folder: Path, arguments: list[str]) -> dict[str, Any]:
    from nemo_llm_feedback.cli.jobs.adapt import adapt
    from nemo_llm_feedback.core.config.compose import compose_config

    lrs: list[float] = []
    starts = LLMFeedbackMixin.on_train_batch_start

    def watched(self: Any, batch: Any, batch_idx: int) -> None:
        lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        starts(self, batch, batch_idx)

    LLMFeedbackMixin.on_train_batch_start = watched
    result = adapt(compose_config(arguments))
    return {"log_dir": result.log_dir, "rate": result.learning_rate, "lrs": lrs}


def _cached(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What each rank makes until the first refresh of a run with ``llm.phase=cached``, holds then, and writes."""
    from nemo_llm_feedback.cli.jobs.adapt import adapt
    from nemo_llm_feedback.core.config.compose import compose_config
    from nemo_llm_feedback.hypotheses.maker import NBestMaker
    from nemo_llm_feedback.training import mixin

    made: list[str] = []
    found: dict[str, Any] = {"written": []}
    fill, make, write = mixin.fill_cache, NBestMaker.make, mixin.write_json

    def watched(feedback: Any, pool: Any, *, refresh: int) -> None:
        fill(feedback, pool, refresh=refresh)
        found.update(made=list(made), held=list(feedback.cache._rows), loaded=feedback.scorer.loaded)

    def counted(self: Any, audio: Any, *args: Any) -> Any:
        made.extend(audio.utterances)
        return make(self, audio, *args)

    def noted(path: Path, value: Any) -> None:
        found["written"].append(path.name)
        write(path, value)

    mixin.fill_cache, NBestMaker.make, mixin.write_json = watched, counted, noted
    adapt(compose_config(arguments))
    return found


def _statistics(folder: Path) -> dict[str, Any]:
    """Pool statistics of two ranks, of which the second has a single hypothesis per utterance: no spread."""
    from contextlib import nullcontext
    from dataclasses import asdict
    from types import SimpleNamespace

    from nemo_llm_feedback.core.config import parse_run_config
    from nemo_llm_feedback.core.types import Context, Hypothesis
    from nemo_llm_feedback.hypotheses.nbest import NBestBatch
    from nemo_llm_feedback.training.pool import EncodedAudio, measure_pool

    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    size = 1 if rank else 2
    members = (Hypothesis("tea", (1,), "greedy"), Hypothesis("a tea", (2, 1), "beam"))[:size]
    scores = torch.tensor([[0.0, 2.0]])[:, :size]
    parts = {"llm": 3 * scores, "asr": -scores, "length": scores}
    nbest = NBestBatch((f"u{rank}",), (Context(),), (members,), {"ctc": -scores}, {"ctc": scores}, parts=parts)
    proposer = SimpleNamespace(same_weights=nullcontext)
    maker: Any = SimpleNamespace(make=lambda *args: nbest, judged_anew=lambda nbest, texts: nbest, proposer=proposer)
    pool: Any = [
        EncodedAudio(SimpleNamespace(utterances=("u",), contexts=(Context(),), external=(), texts=()), 0, 0)  # type: ignore[arg-type]
    ]
    config = parse_run_config({"llm": {"model": "a/b"}, "context": {"description": "x"}})
    return asdict(measure_pool(pool, lambda settings: maker, config, head="ctc"))


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "equal": _equal,
    "measured": _measured,
    "lhotse": _lhotse,
    "failure": _failure,
    "generations": _generations,
    "adapt": _adapt,
    "cached": _cached,
    "statistics": _statistics,
}


def adapt_with(arguments: list[str], log: Path) -> None:
    """The command ``adapt`` in this process, its output in a file."""
    from nemo_llm_feedback.cli.main import main

    torch.set_num_threads(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        status = main(["adapt", *arguments])
    os._exit(status)
