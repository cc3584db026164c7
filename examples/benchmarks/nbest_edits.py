"""Measures how the members of real N-best lists differ, and writes the counts that the benchmark draws from.

    python examples/benchmarks/nbest_edits.py --checkpoints ../shared/checkpoints/{ctc,rnnt_ctc,tdt_ctc}.nemo \
        --manifests ../shared/data/barista/dev.json ../shared/data/guard/accented.json \
        --output examples/benchmarks/nbest_edits.json

The lists are NeMo's beams of 8 by the checkpoint's first head. Every member but the best is described by its edits
against the most similar better member (its parent): how many, where the first one is, how far the next ones are from
it, and of which kind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from nemo.utils import logging as nemo_logging
from rapidfuzz.distance import Levenshtein

from nemo_llm_feedback.asr.reference import FrozenReference
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.data.audio import by_duration, load_audio
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.training.models import restore

BEAM, BINS = 8, 20
Labels = tuple[int, ...]


def main() -> None:
    """Parses the arguments, decodes and writes the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", required=True)
    parser.add_argument("--manifests", nargs="+", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)
    lists = [found for path in options.checkpoints for found in nbest_lists(path, options.manifests)]
    found = {"checkpoints": names(options.checkpoints), "manifests": names(options.manifests), **describe(lists)}
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    Path(options.output).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{found['lists']} lists, mean rho {found['mean_rho']}")


def names(paths: Sequence[str]) -> list[str]:
    """Folder and file name of each path."""
    return ["/".join(Path(path).resolve().parts[-2:]) for path in paths]


def nbest_lists(checkpoint: str, manifests: Sequence[str]) -> list[list[Labels]]:
    """The distinct label sequences of each utterance's beam, best first."""
    reference = FrozenReference(restore(checkpoint, map_location="cpu"), which="auto")
    head = reference.heads[0]
    lists = []
    for manifest in manifests:
        rows = read_manifest(manifest)
        for batch in by_duration(rows, 10):
            audio = load_audio([rows[i] for i in batch], sample_rate=16000, device=torch.device("cpu"))
            encoded, lengths = reference.encode(audio.signal, audio.signal_len)
            found = head.beam(encoded, lengths, size=BEAM, max_symbols=10)
            lists += [list(dict.fromkeys(row)) for row in found]
    return lists


def describe(lists: Sequence[Sequence[Labels]]) -> dict[str, object]:
    """The counts over all lists with at least two members and a best one that is not empty."""
    lists = [found for found in lists if len(found) > 1 and found[0]]
    parents = [[0] * n for n in range(BEAM)]
    edits, gaps, kinds = Counter[int](), Counter[int](), Counter[str]()
    places = [0] * BINS
    for found in lists:
        for n, member in enumerate(found[1:], start=1):
            distances = [Levenshtein.distance(better, member) for better in found[:n]]
            parent = distances.index(min(distances))
            parents[n][parent] += 1
            ops = Levenshtein.editops(found[parent], member)
            edits[len(ops)] += 1
            kinds.update(op.tag for op in ops)
            places[min(BINS - 1, BINS * ops[0].src_pos // max(1, len(found[parent])))] += 1
            gaps.update(b.src_pos - a.src_pos for a, b in itertools.pairwise(ops))
    full = [found for found in lists if len(found) == BEAM]
    tries = [PrefixTrie.build(found, [0] * BEAM) for found in full]
    ratios = [trie.num_nodes / (len(found[0]) + 1) for trie, found in zip(tries, full, strict=True)]
    return {
        "lists": len(lists),
        "mean_labels": round(sum(len(found[0]) for found in lists) / len(lists), 1),
        "mean_rho": round(sum(ratios) / len(ratios), 2),
        "parent_of_member": parents,
        "num_edits": dict(sorted(edits.items())),
        "first_edit_in_twentieths": places,
        "labels_to_next_edit": dict(sorted(gaps.items())),
        "kinds": dict(sorted(kinds.items())),
    }


if __name__ == "__main__":
    main()
