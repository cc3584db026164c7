"""What each part of the groups and of the reward is worth: the reward's choice and the oracle, without training.

    python examples/experiments/ablations.py CHECKPOINT.nemo dev.json --llm FOLDER --description "…" \
        --terms-file menu.json --out FOLDER [--only SETTING …] [--add "other LM=llm.model=FOLDER" …]

Every setting is a change of the first one, written as overrides of `adapt`. Groups are made and judged for each; LLM
scores are kept in one file. A setting whose result is in --out is not run again. Run it on a dev set only.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from nemo.utils import logging
from omegaconf import DictConfig
from settings import SETTINGS

from nemo_llm_feedback.cli.jobs.score import NBestProbe, ScoreReport, score
from nemo_llm_feedback.core.config.compose import compose_config

COLUMNS = ("N", "WER", "EWER", "false alarms", "oracle WER", "oracle EWER", "rank corr. EWER", "prefers reference")


def main() -> None:
    """Runs the settings that are not there yet and prints the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint")
    made.add_argument("manifest")
    made.add_argument("--llm", required=True)
    made.add_argument("--description", required=True)
    made.add_argument("--terms-file")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--alpha", type=float, default=2.0)
    made.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    made.add_argument("--add", nargs="*", default=[], metavar="SETTING=OVERRIDES", help="further settings")
    options = made.parse_args()
    logging.setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: SETTINGS[name] for name in options.only} | dict(item.split("=", 1) for item in options.add)
    print("| setting | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    done = options.out / "ablations.json"
    found: dict[str, dict[str, Any]] = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    for name, overrides in settings.items():
        key = f"{name} ({overrides})"
        if key not in found:
            cfg = _settings(options, overrides)
            found[key] = _numbers(score(NBestProbe(options.checkpoint, options.manifest, cfg, utterances=0)))
            done.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(
            f"| {name} | " + " | ".join(f"{value:.{_digits(column)}f}" for column, value in found[key].items()) + " |"
        )


def _settings(options: argparse.Namespace, overrides: str) -> DictConfig:
    """The configuration of a setting; what a composite or a rule lacks is given by its own overrides."""
    weights = (f"reward.alpha={options.alpha}", f"reward.beta={2 * options.alpha}", "proposals.boosting_weights=[]")
    cfg = compose_config([*weights, *shlex.split(overrides), f"reward.cache={options.out / 'llm_scores.sqlite'}"])
    cfg.llm.model, cfg.context.description, cfg.context.terms_file = (
        options.llm,
        options.description,
        options.terms_file,
    )
    return cfg


def _numbers(report: ScoreReport) -> dict[str, float]:
    """Column → value; errors in %, shares in %."""
    chosen, best = report.systems["best-rewarded"], report.systems["oracle"]
    reward = report.preference["reward"]
    return dict(
        zip(
            COLUMNS,
            (
                sum(report.nbest.sizes) / len(report.nbest),
                chosen.value("wer"),
                chosen.value("ewer"),
                chosen.value("false_alarms"),
                best.value("wer"),
                best.value("ewer"),
                report.agreement["ewer"].spearman,
                100 * reward.preferred / reward.rows,
            ),
            strict=True,
        )
    )


def _digits(column: str) -> int:
    return {"rank corr. EWER": 2, "prefers reference": 0, "false alarms": 0}.get(column, 1)


if __name__ == "__main__":
    main()
