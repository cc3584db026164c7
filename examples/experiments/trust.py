"""What the reward chooses by each rule for alpha and for the trust in other recognisers, without training.

    python examples/experiments/trust.py BASE.nemo dev.json --description "an order at a coffee shop" \
        --terms-file menu.json --llm FOLDER --out trust_barista [--every 2] [--cache scores.sqlite]

`dev.json` has text and `hypotheses` of one source. Beside the source as it is, one that is right half of the time
(every other utterance has another's transcript) and one that writes nonsense (all have) are tried. Groups and scores
are made once and kept in the folder; every rule then only chooses. Run it on a dev set, never on a test set.
"""

from __future__ import annotations

import argparse
import csv
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging as nemo_logging

from nemo_llm_feedback.cli.jobs.nbest_probe import judged_by
from nemo_llm_feedback.cli.jobs.tuning import by_spread
from nemo_llm_feedback.core.config import ContextConfig, LLMConfig, RewardConfig, RunConfig
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import Row, read_manifest
from nemo_llm_feedback.evaluation.rank_agreement import best_members
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.scored_nbest import measured_trust, scored_nbest
from nemo_llm_feedback.hypotheses.trust import SourceTrust, Trust, is_own
from nemo_llm_feedback.llm import open_llm
from nemo_llm_feedback.rewards import LLMReward
from nemo_llm_feedback.training.models import restore

FACTORS = (2.0, 3.0, 4.0)
SOURCES = {"as it is": 0.0, "right half of the time": 0.5, "nonsense": 1.0}


def main() -> None:
    """Makes the groups that are not there yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("manifest")
    parser.add_argument("--description", required=True)
    parser.add_argument("--terms-file")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--cache", help="scores of the LLM that other runs share")
    parser.add_argument("--every", type=int, default=1, help="take every n-th row")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    nemo_logging.setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    config = RunConfig(context=ContextConfig(options.description, terms_file=options.terms_file))
    rows = read_manifest(options.manifest)[:: options.every]
    reward = LLMReward(open_llm(LLMConfig(options.llm, quantization="none")), alpha=1.0, beta=2.0, cache=options.cache)
    lines = []
    for name, wrong in SOURCES.items():
        nbest, trusted = groups(options, with_wrong(rows, wrong), config, reward, options.out / f"wrong_{wrong}.pt")
        lines += [
            {"source": name, **line}
            for line in chosen(rows, nbest, trusted, config.context.load(), reward, alone=wrong == 0.0)
        ]
    with (options.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    print((options.out / "table.csv").read_text())


def with_wrong(rows: Sequence[Row], share: float) -> list[Row]:
    """The rows with other rows' transcripts in so large a share of them, evenly spread."""
    moved = list(range(len(rows)))
    random.Random(0).shuffle(moved)
    other = {i: moved[(moved.index(i) + 1) % len(moved)] for i in moved}  # one cycle: no row keeps its own
    wrong = {i for i in range(len(rows)) if int((i + 1) * share) > int(i * share)}
    return [replace(row, external=rows[other[i]].external) if i in wrong else row for i, row in enumerate(rows)]


def groups(
    options: Any, rows: Sequence[Row], config: RunConfig, reward: LLMReward, kept: Path
) -> tuple[NBestBatch, dict[str, SourceTrust]]:
    """The groups of the rows, judged without trust, and the trust that was found; from the folder if there."""
    if not kept.is_file():
        model, of = restore(options.model, map_location="cpu"), {"config": config, "batch_size": 8}
        nbest = scored_nbest(model, rows, reward=reward, **of)
        found = measured_trust(model, rows, nbest, **of)
        plain = {"nbest": nbest.to_plain(), "trusted": {source: asdict(of) for source, of in found.items()}}
        torch.save(plain, kept)
    plain = torch.load(kept, weights_only=True)
    return NBestBatch.from_plain(plain["nbest"]), {s: SourceTrust(**of) for s, of in plain["trusted"].items()}


def chosen(
    rows: Sequence[Row],
    nbest: NBestBatch,
    trusted: dict[str, SourceTrust],
    context: Context,
    reward: LLMReward,
    *,
    alone: bool,
) -> list[dict[str, object]]:
    """A line per rule and factor; with the recogniser alone, too, if asked for."""
    lines = []
    for factor in FACTORS:
        weights = by_spread(nbest, RewardConfig(spread_factor=factor))
        by_weights = reward.with_weights(alpha=weights.alpha, beta=weights.beta)
        rules = {"alone": Trust({})} if alone else {}
        rules |= {"as any": None, "EM": None, "trust": Trust({source: of.trust for source, of in trusted.items()})}
        for rule, trust in rules.items():
            judged = judged_by(by_weights, nbest, trust)
            (rewards,) = judged.rewards.values()
            rewards = rewards + mixture_bonus(judged, rewards) if rule == "EM" else rewards
            best = best_members(rewards, otherwise=[0] * len(rows))
            texts = [of[n] for of, n in zip(judged.texts, best, strict=True)]
            taken = sum(not is_own(judged.hypotheses[b][n]) for b, n in enumerate(best)) / len(rows)
            scores = score_rows(rows, texts, run_context=context)
            values = {name: round(scores.value(name), 1) for name in ("wer", "ewer", "false_alarms")}
            found = "; ".join(map(str, trusted.values())) if rule == "trust" else ""
            of = {"spread_factor": factor, "alpha": weights.alpha, "rule": rule}
            lines.append({**of, **values, "taken": round(100 * taken), "found": found})
    return lines


def mixture_bonus(nbest: NBestBatch, rewards: torch.Tensor, *, rounds: int = 30) -> torch.Tensor:
    """[B, N] log(posterior share / share of members) of the other recognisers against our own, by EM on the groups."""
    others = ~torch.nn.utils.rnn.pad_sequence(
        [torch.tensor([is_own(member) for member in row]) for row in nbest.hypotheses],
        batch_first=True,
        padding_value=True,
    )
    scores = rewards.nan_to_num(nan=-torch.inf)
    members = (others.sum(1) / nbest.mask.sum(1)).mean()
    bonus = torch.zeros_like(rewards)
    for _ in range(rounds):
        share = (torch.softmax(scores + bonus, dim=1) * others).sum(1).mean().clamp(1e-6, 1 - 1e-6)
        bonus = torch.where(others, torch.log(share / members), torch.log((1 - share) / (1 - members)))
    return bonus


if __name__ == "__main__":
    main()
