"""First-pass fusion of an n-gram in NeMo's beam: what the same knowledge gives without an LLM.

    python examples/experiments/ngram.py CHECKPOINT.nemo dev.json --terms-file menu.json --text orders.txt \
        --out FOLDER [--weights 0.3 0.6 1 2]

The n-gram (Witten-Bell, over the checkpoint's BPE tokens) learns from --text, sentences of the kind that the
description names, and from each term as a sentence of its own, --repeat times. IRSTLM estimates it
(apt-get install irstlm), NeMo fuses it in its batched CTC beam. Weights are for a dev set: give one for a test set.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inference import BEAM, nemo_beam
from nemo.collections.asr.models import ASRModel
from nemo.collections.asr.parts.submodules.ngram_lm import DEFAULT_TOKEN_OFFSET
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_llm_feedback.cli.jobs.evaluate import evaluate, evaluation_text
from nemo_llm_feedback.core.config import read_terms

IRSTLM = Path("/usr/lib/irstlm")  # where Debian puts it; its scripts search for each other under this folder


def estimate(sentences: Sequence[Sequence[int]], target: Path, *, order: int) -> None:
    """Estimates an n-gram over tokens and writes it as the ARPA file that NeMo reads.

    Args:
        sentences: token ids of each.
        target: the ARPA file; intermediate files are kept beside it.
        order: of the n-gram.
    """
    if not (IRSTLM / "bin" / "build-lm.sh").is_file():
        raise SystemExit("IRSTLM is missing: apt-get install irstlm")
    text, built, plain = (target.with_suffix(suffix) for suffix in (".txt", ".gz", ".irstlm"))
    lines = (" ".join(chr(DEFAULT_TOKEN_OFFSET + token) for token in sentence) for sentence in sentences)
    text.write_text("".join(f"<s> {line} </s>\n" for line in lines), encoding="utf-8")
    environment = os.environ | {"IRSTLM": str(IRSTLM), "PATH": f"{os.environ['PATH']}{os.pathsep}{IRSTLM / 'bin'}"}
    parts = target.with_suffix(".parts")
    shutil.rmtree(parts, ignore_errors=True)
    build = ["build-lm.sh", "-i", text, "-n", str(order), "-o", built, "-k", "1", "-s", "witten-bell", "-t", parts]
    for command in (build, ["compile-lm", built, "--text=yes", plain]):
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command[0]} failed: {done.stderr[-500:]}")
    with open(plain, encoding="utf-8", newline="\n") as file:
        _write_arpa(file, target)


def _write_arpa(lines: Iterable[str], target: Path) -> None:
    """Leaves out the n-grams that IRSTLM counted across two sentences, which NeMo refuses."""
    grams: dict[int, list[str]] = defaultdict(list)
    order = 0
    for line in (raw.rstrip("\n") for raw in lines):
        if found := re.fullmatch(r"\\(\d+)-grams:", line):
            order = int(found[1])
        elif order and line and not line.startswith("\\"):
            words = line.split("\t")[1].split(" ")
            if "<s>" not in words[1:] and "</s>" not in words[:-1]:
                grams[order].append(line)
    with open(target, "w", encoding="utf-8", newline="\n") as out:
        out.write("\\data\\\n" + "".join(f"ngram {n}={len(found)}\n" for n, found in grams.items()) + "\n")
        for n, kept in grams.items():
            out.write(f"\\{n}-grams:\n" + "\n".join(kept) + "\n\n")
        out.write("\\end\\\n")


def fused(model: Any, arpa: Path, weight: float, bonus: float) -> None:
    """Sets NeMo's batched CTC beam with the n-gram; ``bonus`` is nats for each token (NeMo's ``beam_beta``)."""
    beam = {"beam_size": BEAM, "return_best_hypothesis": True, "allow_cuda_graphs": False, "beam_beta": bonus}
    decoding = OmegaConf.create(OmegaConf.to_container(model.cfg.decoding, resolve=True))
    decoding.strategy = "beam_batch"
    decoding.beam = OmegaConf.create(beam | {"ngram_lm_model": str(arpa), "ngram_lm_alpha": weight})
    model.change_decoding_strategy(decoding, verbose=False)


def main() -> None:
    """Estimates the n-gram, decodes with every weight and prints the scores."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("manifest", type=Path)
    made.add_argument("--terms-file", type=Path, required=True)
    made.add_argument("--text", type=Path, nargs="+", required=True, help="one sentence per line")
    made.add_argument("--repeat", type=int, default=10, help="times that each term stands in the text")
    made.add_argument("--order", type=int, default=5)
    made.add_argument("--weights", type=float, nargs="+", default=[0.3, 0.6, 1.0, 2.0])
    made.add_argument("--bonus", type=float, default=0.0, help="nats per token, against deletions")
    made.add_argument("--out", type=Path, required=True)
    options = made.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.setLevel(logging.ERROR)
    tokenizer = ASRModel.restore_from(str(options.checkpoint), map_location="cpu").tokenizer
    lines = [line for path in options.text for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines += options.repeat * read_terms(str(options.terms_file))
    arpa = options.out / "ngram.arpa"
    estimate([tokenizer.text_to_ids(line) for line in lines], arpa, order=options.order)
    ready = []
    for weight in options.weights:
        target = options.out / f"ngram_{weight:g}_{options.bonus:g}_{options.manifest.stem}.json"

        def set_beam(model: Any, weight: float = weight) -> None:
            fused(model, arpa, weight, options.bonus)

        ready.append(str(nemo_beam(options.checkpoint, options.manifest, target, set_beam=set_beam)))
    print(evaluation_text(evaluate(manifest=str(options.manifest), predictions=ready, terms_file=options.terms_file)))


if __name__ == "__main__":
    main()
