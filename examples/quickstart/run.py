"""The quickstart: base, self-training and LLM feedback on shipped speech of a domain that the base has never heard.

    python examples/quickstart/run.py [--split test] [--json FILE]

Both adaptations use the same pool, updates, batch size, learning rate and refresh of hypotheses; only the objective
differs. ``--split dev`` is what the settings were chosen on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from nemo_llm_feedback.core.config.compose import compose_config

HERE = Path(__file__).parent
METRICS = ("wer", "ewer", "entity_recall", "false_alarms")
SYSTEMS = {
    "self-training": ["objective=self_training", "name=self_training"],
    "LLM feedback": ["name=llm_feedback"],
}


def main() -> None:
    """Runs both adaptations and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=("test", "dev"))
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for both runs")
    options = parser.parse_args()
    started = time.monotonic()
    print("loading NeMo …", flush=True)

    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    from nemo_llm_feedback.cli.jobs.adapt import adapt
    from nemo_llm_feedback.core.config import ProposalConfig, parse_run_config
    from nemo_llm_feedback.core.text import get_normalizer
    from nemo_llm_feedback.data.manifests import read_manifest
    from nemo_llm_feedback.evaluation.metrics import oracle
    from nemo_llm_feedback.evaluation.scoring import score_rows
    from nemo_llm_feedback.evaluation.tables import build_table
    from nemo_llm_feedback.evaluation.transcribe import propose_rows, transcribe_rows
    from nemo_llm_feedback.training.models import restore

    fixed = [f"quickstart_dir={HERE}", *options.overrides]
    context = parse_run_config(compose_config(fixed, config_name="quickstart")).context.load()
    splits = ["test", "test_unseen_voice", "general"] if options.split == "test" else ["dev", "general_dev"]
    rows = {name: read_manifest(HERE / "data" / f"{name}.json") for name in splits}

    base = restore(HERE / "base.nemo", map_location="cpu")
    scores: dict[str, dict[str, object]] = {name: {} for name in splits}

    def evaluate(system: str, model: object) -> None:
        for name in splits:
            scores[name][system] = score_rows(rows[name], transcribe_rows(model, rows[name]), run_context=context)

    print("scoring the base …", flush=True)
    evaluate("base", base)
    paths = {}
    for system, overrides in SYSTEMS.items():
        print(f"adapting: {system} …", flush=True)
        paths[system] = adapt(compose_config([*fixed, *overrides], config_name="quickstart")).nemo
        evaluate(system, restore(paths[system], map_location="cpu"))
    nbest = propose_rows(base, rows[splits[0]], ProposalConfig(), run_context=context)
    best = oracle([row.text for row in rows[splits[0]]], nbest, normalize=get_normalizer("basic"))
    scores[splits[0]]["oracle of the base's N-best"] = score_rows(rows[splits[0]], best, run_context=context)

    tables = {
        name: build_table(
            scores[name],
            metrics=[m for m in METRICS if name[:7] != "general" or m == "wer"],
            base="base",
            samples=2000,
            seed=0,
        )
        for name in splits
    }
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_text()}")
    print(f"\n{time.monotonic() - started:.0f} s. The adapted checkpoint, for stock NeMo: {paths['LLM feedback']}")
    if options.json:
        options.json.write_text(json.dumps({n: t.record for n, t in tables.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
