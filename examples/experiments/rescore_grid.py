"""What the reward would choose, without training: WER and EWER of the best-rewarded member over a grid of α and β.

    python examples/experiments/rescore_grid.py BASE.nemo dev.json --terms-file menu.json \
        --description "an order at a coffee shop" --llm FOLDER [--set boosting_weight=1.0 term_swap=4]

Hypotheses and scores are made once; every (α, β) then only chooses. Run it on a dev set, never on a test set.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace

from nemo.utils import logging as nemo_logging

from nemo_llm_feedback.cli.jobs.tuning import choose
from nemo_llm_feedback.core.config import (
    ContextConfig,
    FeedbackConfig,
    LLMConfig,
    ProposalConfig,
    RunConfig,
    read_terms,
)
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, read_manifest
from nemo_llm_feedback.evaluation.metrics import oracle
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.scored_nbest import scored_nbest
from nemo_llm_feedback.llm import load_llm
from nemo_llm_feedback.rewards import LLMReward
from nemo_llm_feedback.training.models import restore


def main() -> None:
    """Parses the arguments, makes the N-best lists and prints the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("manifest")
    parser.add_argument("--terms-file", required=True)
    parser.add_argument("--description", default="")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--head", default="auto", choices=("auto", "ctc", "transducer"))
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 4.0, 8.0, 16.0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of ProposalConfig")
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)

    given = dict(item.split("=") for item in options.set)
    proposals = ProposalConfig(**{key: type(getattr(ProposalConfig(), key))(value) for key, value in given.items()})
    context = Context(options.description, tuple(read_terms(options.terms_file)))
    rows = read_manifest(options.manifest)
    nbest = make_nbest(options.model, rows, context, proposals, llm=options.llm, head=options.head)

    def show(name: str, members: Sequence[int]) -> None:
        report(name, rows, [texts[n] for texts, n in zip(nbest.texts, members, strict=True)], context)

    show("greedy", [0] * len(rows))
    for alpha in options.alphas:
        for beta in options.betas:
            show(f"alpha {alpha:g} beta {beta:g}", choose(nbest, alpha=alpha, beta=beta))
    best = oracle([row.text for row in rows], nbest.texts, normalize=get_normalizer("basic"))
    report("oracle", rows, best, context)


def make_nbest(
    model: str, rows: list[Row], context: Context, proposals: ProposalConfig, *, llm: str, head: str
) -> NBestBatch:
    """The scored N-best of all rows under the checkpoint itself, in the rows' order."""
    config = RunConfig(
        feedback=FeedbackConfig(heads=head),  # type: ignore[arg-type]
        proposals=replace(proposals, max_members=64),
        context=ContextConfig(context.description, context.terms),
    )
    reward = LLMReward(load_llm(LLMConfig(model=llm)), alpha=1.0, beta=0.0)
    return scored_nbest(restore(model, map_location="cpu"), rows, config=config, reward=reward, batch_size=10)


def report(name: str, rows: list[Row], texts: list[str], context: Context) -> None:
    """One line of metrics, in %."""
    scores = score_rows(rows, texts, run_context=context)
    metrics = ("wer", "ewer", "entity_recall", "false_alarms", "deletions", "insertions")
    print(f"{name:20}" + "  ".join(f"{m} {scores.value(m):5.1f}" for m in metrics), flush=True)


if __name__ == "__main__":
    main()
