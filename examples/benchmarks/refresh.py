"""What a refresh of hypotheses costs beyond arithmetic: operators, synchronisations, and Python per utterance.

    python examples/benchmarks/refresh.py [--families rnnt tdt ctc] [--own-lists]

A random model proposes, scores and learns from hypotheses of 8 utterances of 15 s (V 1024), on the CPU. On a GPU each
operator is about one kernel launch, and a synchronisation waits for the card, so these counts, and not the CPU's time,
say what keeps a card waiting. Nested operators are not counted. ``--own-lists`` gives every utterance terms of its
own. Seconds are printed for the parts that are Python alone; do not compare them between machines.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_check import emit_in_a_quarter
from helpers.tiny import build_nemo, make_tokenizer, write_manifest
from nemo.utils import logging as nemo_logging
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_llm_feedback import restore
from nemo_llm_feedback.asr.encoded_rows import encoded_rows
from nemo_llm_feedback.asr.heads import CTCHead, TransducerHead, heads_of
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.config import ProposalConfig, RunConfig
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.hypotheses import maker, proposals
from nemo_llm_feedback.hypotheses.scored_nbest import scored_nbest

KINDS = {"rnnt": "rnnt_bpe", "tdt": "tdt_bpe", "ctc": "ctc_bpe"}
SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
WORDS = [a + b + c for a in ("ka", "lo", "mi", "tu", "re") for b in ("na", "sil", "dor") for c in ("ti", "mo", "")]
SIZES = {"full": {"rows": 8, "seconds": 15, "vocabulary": 1024}, "small": {"rows": 2, "seconds": 2, "vocabulary": 64}}


class Counts(TorchDispatchMode):
    """Counts operators and synchronisations by the stage that runs, and seconds of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self._stages = ["other"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts it."""
        self.operators[self._stages[-1]] += 1
        self.syncs[self._stages[-1]] += func.name().split(".")[0] in SYNCS
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, everything is this stage's."""
        self._stages.append(name)
        self.calls[name] += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
            self._stages.pop()

    def watch(self, owner: Any, name: str, stage: str) -> Any:
        """A patch that makes a function of a class or module a stage; a beam that boosts is one of its own."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.stage("boosted beam" if kwargs.get("boosting") else stage):
                return function(*args, **kwargs)

        return mock.patch.object(owner, name, counted)


def measure(family: str, folder: Path, *, size: str, own_lists: bool) -> dict[str, Any]:
    """What one refresh and one step of the policy cost, by stage."""
    sizes = SIZES[size]
    tokenizer = make_tokenizer(folder / "tokenizer", words=WORDS, size=sizes["vocabulary"])
    manifest = write_manifest(folder / "pool.json", [None] * sizes["rows"], seconds=float(sizes["seconds"]))
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for i, line in enumerate(lines):
        line["context"] = WORDS[i if own_lists else 0 :][:20]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model = restore(build_nemo(KINDS[family], folder / "base.nemo", tokenizer_dir=tokenizer), map_location="cpu")
    if family != "ctc":
        emit_in_a_quarter(model, manifest)
    counts, kind = Counts(), CTCHead if family == "ctc" else TransducerHead
    watched = [(kind, "greedy", "greedy"), (kind, "beam", "beam"), (kind, "score", "log p of candidates")]
    watched += [(proposals, name, f"Python: {name}") for name in ("swap_terms", "written_labels")]
    watched += [(maker, "build_members", "Python: build_members")]
    config, rows = RunConfig(proposals=ProposalConfig(swap_similarity=20)), read_manifest(manifest)
    with contextlib.ExitStack() as stack:
        for one in watched:
            stack.enter_context(counts.watch(*one))
        with counts:
            nbest = scored_nbest(model, rows, config=config, reward=None, batch_size=len(rows))
    head = heads_of(model)[0]
    ((_, _, encoded, lengths),) = encoded_rows(model, read_manifest(manifest), batch_size=len(lines))
    with evaluation_mode(model), counts, counts.stage("policy: log p and gradient"):
        head.score(encoded.requires_grad_(), lengths, nbest.labels).nan_to_num(neginf=0.0).sum().backward()
    python = {name: round(1e3 * s / len(lines), 2) for name, s in counts.seconds.items() if name.startswith("Python")}
    table = {name: [counts.calls[name], counts.operators[name], counts.syncs[name]] for name in counts.operators}
    return {"members": sum(nbest.sizes) / len(lines), "stages": table, "ms_per_utterance": python}


def main() -> None:
    """Prints a table per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(KINDS), choices=list(KINDS), help="heads to measure")
    parser.add_argument("--own-lists", action="store_true", help="a list of terms per utterance")
    parser.add_argument("--size", default="full", choices=list(SIZES), help="small: to test this script")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="refresh_") as name:
        for family in options.families:
            folder = Path(name) / family
            found[family] = measure(family, folder, size=options.size, own_lists=options.own_lists)
            print(f"\n{family}, {found[family]['members']:.1f} members per utterance")
            print(f"{'stage':30}{'calls':>8}{'operators':>12}{'syncs':>8}")
            for stage, (calls, operators, syncs) in found[family]["stages"].items():
                print(f"{stage:30}{calls:8}{operators:12}{syncs:8}")
            print("ms per utterance:", found[family]["ms_per_utterance"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
