"""What a refresh of hypotheses costs beyond arithmetic: operators, synchronisations, and Python per utterance.

    python examples/benchmarks/refresh.py [--families rnnt tdt ctc] [--own-lists] [--cuda-graphs]

A random model proposes, scores and learns from hypotheses of 8 utterances of 15 s (V 1024), and a random LLM judges
them, on the CPU. On a GPU a synchronisation waits for the card, and each operator is about one kernel launch but for
those that only make a view or empty memory; ``launches`` leaves these out. So the counts, and not the CPU's time, say
what keeps a card waiting. Nested operators are not counted. The boosting trees' part of the beam is counted by itself:
on a GPU with Triton it is one kernel per step. With ``--cuda-graphs`` so is what a graph holds, which is one launch
(its capture, some hundred, is not counted). The transducer's joint runs in chunks as large as on a GPU. A frame has at
most one label, so that the random texts are as long as speech. ``--own-lists`` gives every utterance terms of its own.
Of the parts that are Python alone the CPU time is printed, the parts inside them taken off, and what they count stays
on the CPU; do not compare times between machines.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_check import emit_labels
from helpers import captured
from helpers.tiny import build_nemo, make_tokenizer, write_manifest
from helpers.tiny_llm import make_tiny_llm
from nemo.collections.asr.parts.context_biasing.biasing_multi_model import GPUBiasingMultiModel
from nemo.utils import logging as nemo_logging
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_llm_feedback import restore
from nemo_llm_feedback.asr.encoded_rows import encoded_rows
from nemo_llm_feedback.asr.heads import CTCHead, TransducerHead, heads_of
from nemo_llm_feedback.asr.likelihood import joint
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.config import LLMConfig, ProposalConfig, RunConfig
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.data.manifests import Row, read_manifest
from nemo_llm_feedback.hypotheses import boosting, maker, proposals
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.scored_nbest import scored_nbest
from nemo_llm_feedback.llm import engine, load_llm
from nemo_llm_feedback.llm.encoding import PromptEncoder
from nemo_llm_feedback.llm.engine import Engine
from nemo_llm_feedback.llm.packing import PackedBatch
from nemo_llm_feedback.rewards.lm import LLMReward

KINDS = {"rnnt": "rnnt_bpe", "tdt": "tdt_bpe", "ctc": "ctc_bpe"}
SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach")
SHARE = 0.1  # of the frames that emit a label at the start of a text; later on more of them do
COLUMNS = ("calls", "operators", "launches", "syncs")
SYLLABLES = ("ka", "lo", "mi", "tu", "re", "na", "sil", "dor", "ti", "mo")
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]  # enough for 1024 labels
SIZES = {"full": {"rows": 8, "seconds": 15, "vocabulary": 1024}, "small": {"rows": 2, "seconds": 2, "vocabulary": 64}}


class Counts(TorchDispatchMode):
    """Counts operators, launches and synchronisations by the stage that runs, and the CPU seconds of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: dict[str, float] = defaultdict(float)
        self._stages, self._since = ["other"], time.thread_time()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts it."""
        counts, name = self.of[self._stages[-1]], func.name().split(".")[0]
        counts["operators"] += 1
        counts["launches"] += not (func.is_view or name in NO_LAUNCH)
        counts["syncs"] += name in SYNCS
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, everything is this stage's."""
        self.of[name]["calls"] += 1
        self._clock()
        self._stages.append(name)
        try:
            yield
        finally:
            self._clock()
            self._stages.pop()

    def _clock(self) -> None:
        """Gives the time since the last change of stage to the stage that has run."""
        now = time.thread_time()
        self.seconds[self._stages[-1]] += now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, stage: str) -> Any:
        """A patch that makes a function of a class or module a stage; a beam that boosts is one of its own."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.stage("boosted beam" if kwargs.get("boosting") else stage):
                return function(*args, **kwargs)

        made: Any = staticmethod(counted) if isinstance(vars(owner).get(name), classmethod) else counted
        return mock.patch.object(owner, name, made)


def watched(kind: type) -> list[tuple[Any, str, str]]:
    """Owner, function and stage of everything that is counted by itself."""
    parts: list[tuple[Any, str, str]] = [(kind, "greedy", "greedy"), (kind, "beam", "beam")]
    parts += [(GPUBiasingMultiModel, "advance", "boosting trees"), (kind, "score", "log p of candidates")]
    parts += [(captured.Replay, "replay", "inside CUDA graphs")]
    parts += [(Engine, "_hidden", "LLM"), (Engine, "plain_score", "LLM"), (engine, "pair_logp", "LLM")]
    parts += [(PackedBatch, name, "Python: packing") for name in ("__init__", "trie_mask", "sums")]
    parts += [(PromptEncoder, "encode_texts", "Python: encode_texts"), (boosting, "boosting_tree", "Python: trees")]
    parts += [(proposals, name, f"Python: {name}") for name in ("swap_terms", "written_labels")]
    parts += [(maker, name, f"Python: {name}") for name in ("build_members", "to_hypothesis")]
    parts += [(PrefixTrie, "build", "Python: PrefixTrie.build")]
    parts += [(LLMReward, "__call__", "Python: reward"), (maker.NBestMaker, "make", "Python: all else")]
    return parts


def make_model(family: str, folder: Path, *, size: str, own_lists: bool) -> tuple[Any, Path]:
    """A random model whose texts are as long as speech, and the manifest of its audio."""
    sizes = SIZES[size]
    tokenizer = make_tokenizer(folder / "tokenizer", words=WORDS, size=sizes["vocabulary"])
    manifest = write_manifest(folder / "pool.json", [None] * sizes["rows"], seconds=float(sizes["seconds"]))
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for i, line in enumerate(lines):
        line["context"] = WORDS[i if own_lists else 0 :][:20]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model = restore(build_nemo(KINDS[family], folder / "base.nemo", tokenizer_dir=tokenizer), map_location="cpu")
    if family != "ctc":
        emit_labels(model, manifest, share=SHARE)
        return model, manifest
    ((_, _, encoded, _),) = encoded_rows(model, read_manifest(manifest), batch_size=len(lines))
    logits = model.decoder.decoder_layers(encoded)
    model.decoder.decoder_layers[0].bias.data[-1] += (logits[:, :-1].amax(1) - logits[:, -1]).quantile(1 - SHARE)
    return model, manifest


def refreshed(model: Any, rows: Sequence[Row], folder: Path, *, parts: Sequence[Any], cuda_graphs: bool) -> NBestBatch:
    """The N-best of the rows, proposed and judged by a random LLM as for the first time."""
    llm = load_llm(LLMConfig(model=str(folder / "llm"), quantization="none"))
    config = RunConfig(proposals=ProposalConfig(swap_similarity=20, max_symbols=1, cuda_graphs=cuda_graphs))
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part)
        return scored_nbest(
            model, rows, config=config, reward=LLMReward(llm, alpha=0.1, beta=1.0), batch_size=len(rows)
        )


def measure(family: str, folder: Path, *, size: str, own_lists: bool, cuda_graphs: bool = False) -> dict[str, Any]:
    """What one refresh and one step of the policy cost, by stage."""
    model, manifest = make_model(family, folder, size=size, own_lists=own_lists)
    joint._CPU_CHUNK_MB = joint.MEMORY_BUDGET_MB
    with mock.patch("helpers.tiny_llm._CORPUS", (" ".join(WORDS),)):  # two or three tokens per word
        make_tiny_llm(folder / "llm", chat=True, max_position_embeddings=4096)
    rows, kind = read_manifest(manifest), CTCHead if family == "ctc" else TransducerHead
    timed, counts = Counts(), Counts()  # counting takes time, too
    refreshed(model, rows, folder, parts=[timed.watch(*part) for part in watched(kind)], cuda_graphs=False)
    parts = [*(counts.watch(*part) for part in watched(kind)), counts]
    with contextlib.ExitStack() as stack:
        if cuda_graphs:
            captured.stand_in(lambda *where: stack.enter_context(mock.patch.object(*where)))
        nbest = refreshed(model, rows, folder, parts=parts, cuda_graphs=cuda_graphs)
    head = heads_of(model)[0]
    ((_, _, encoded, lengths),) = encoded_rows(model, rows, batch_size=len(rows))
    with evaluation_mode(model), counts, counts.stage("policy: log p and gradient"):
        head.score(encoded.requires_grad_(), lengths, nbest.labels).nan_to_num(neginf=0.0).sum().backward()
    python = {name: round(1e3 * s / len(rows), 2) for name, s in timed.seconds.items() if name.startswith("Python")}
    labels = [len(y) for row in nbest.labels for y in row]
    return {
        "members": len(labels) / len(rows),
        "labels": sum(labels) / len(labels),
        "frames": int(lengths.max()),
        "stages": {name: dict(found) for name, found in counts.of.items() if found["operators"]},
        "ms_per_utterance": python | {"sum": round(sum(python.values()), 2)},
    }


def main() -> None:
    """Prints a table per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(KINDS), choices=list(KINDS), help="heads to measure")
    parser.add_argument("--own-lists", action="store_true", help="a list of terms per utterance")
    parser.add_argument("--cuda-graphs", action="store_true", help="proposals.cuda_graphs, with stand-ins for graphs")
    parser.add_argument("--rows", type=int, help="utterances in the batch")
    parser.add_argument("--size", default="full", choices=list(SIZES), help="small: to test this script")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)
    SIZES[options.size]["rows"] = options.rows or SIZES[options.size]["rows"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="refresh_") as name:
        for family in options.families:
            folder = Path(name) / family
            chosen = {"own_lists": options.own_lists, "cuda_graphs": options.cuda_graphs}
            found[family] = measure(family, folder, size=options.size, **chosen)
            sizes = "{frames} frames, {members:.1f} members per utterance of {labels:.0f} labels".format(
                **found[family]
            )
            print(f"\n{family}, {sizes}")
            print(f"{'stage':30}" + "".join(f"{column:>12}" for column in COLUMNS))
            for stage, counts in found[family]["stages"].items():
                print(f"{stage:30}" + "".join(f"{counts.get(column, 0):12}" for column in COLUMNS))
            print("ms per utterance:", found[family]["ms_per_utterance"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
