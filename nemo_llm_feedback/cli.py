"""The command ``nemo-llm-feedback``. Only argparse is imported here: every ``--help`` answers without NeMo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_llm_feedback import __version__
from nemo_llm_feedback.errors import FeedbackError

ADAPT_HELP = """\
usage: nemo-llm-feedback adapt KEY=VALUE … [--config-name NAME] [--config-dir FOLDER] [--show-config]

Adapts a NeMo checkpoint to unlabeled audio with the feedback of an LLM and writes a plain .nemo.
Settings are Hydra overrides; NeMo's own sections keep NeMo's keys. The ones every run needs:

  init_from_nemo_model=FILE.nemo            or init_from_pretrained_model=NAME
  model.train_ds.manifest_filepath=M.json   rows without text are learned from feedback
  context.description="an order at a coffee shop"   context.terms_file=menu.json
  llm.model=Qwen/Qwen2.5-7B-Instruct        folder or hub id of a causal LM

Often used:

  model.validation_ds.manifest_filepath=dev.json    labelled; before/after is reported on it
  objective=distill|mwer|grpo|dpo|reinforce|self_training
  llm=nf4|int8|full    trainer=auto|cpu|gpu    trainer.max_steps=200    model.optim.lr=1e-5
  model.train_ds.use_lhotse=true    feedback.use_text=false    exp_manager.resume_if_exists=true
  output=adapted.nemo

options:
  --config-name NAME    configuration to start from (default: adapt)
  --config-dir FOLDER   folder of your own configurations, searched first
  --show-config         print the composed configuration and stop
  -h, --help            this text

Every key with its default: --show-config; every key explained: nemo_llm_feedback/config.py.
"""


def conf_dir() -> Path:
    """The folder of the shipped configurations: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; the process's own if None.

    Returns:
        0, or 1 after an error of the user's input, which is printed without a traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["adapt"]:
            return _adapt(arguments[1:])
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except FeedbackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-llm-feedback", description="Adapts NeMo ASR checkpoints to unlabeled audio with an LLM's feedback."
    )
    parser.add_argument("--version", action="version", version=f"nemo-llm-feedback {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("adapt", help="adapt a checkpoint (Hydra settings; see `adapt --help`)", add_help=False)

    evaluate = commands.add_parser("evaluate", help="score checkpoints on a labelled manifest")
    evaluate.add_argument("models", nargs="+", metavar="MODEL", help=".nemo files; the first is the base")
    evaluate.add_argument("--manifest", required=True, help="NeMo manifest with text and, optionally, entities")
    evaluate.add_argument("--terms-file", help="terms whose false alarms are counted")
    evaluate.add_argument("--head", default="auto", choices=("auto", "ctc", "transducer"))
    evaluate.add_argument("--batch-size", type=int, default=16)
    evaluate.add_argument("--normalizer", default="basic", choices=("none", "lower", "basic"))
    evaluate.add_argument(
        "--oracle", type=int, default=0, metavar="N", help="also the oracle of the N-best of the base"
    )
    evaluate.add_argument("--json", metavar="FILE", help="write the numbers here too")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="turn a training checkpoint into a plain .nemo")
    export.add_argument("checkpoint", help="a Lightning .ckpt of a run, or a .nemo")
    export.add_argument("--base", help=".nemo that the .ckpt was trained from, if it has moved since")
    export.add_argument("--output", help="where to write; default: beside the checkpoint")
    export.set_defaults(run=_export)
    return parser


def _adapt(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(ADAPT_HELP)
        return 0
    from nemo_llm_feedback.composition import compose_config

    options = argparse.ArgumentParser(prog="nemo-llm-feedback adapt", add_help=False)
    options.add_argument("--config-name", default="adapt")
    options.add_argument("--config-dir")
    options.add_argument("--show-config", action="store_true")
    known, overrides = options.parse_known_args(arguments)
    cfg = compose_config(overrides, config_name=known.config_name, config_dir=known.config_dir)
    if known.show_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(cfg))
        return 0
    from nemo_llm_feedback.adapt import adapt, summary

    print(summary(adapt(cfg)))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from nemo_llm_feedback.commands import evaluate

    _quiet_nemo()
    print(
        evaluate(
            options.models,
            manifest=options.manifest,
            terms_file=options.terms_file,
            head=options.head,
            batch_size=options.batch_size,
            normalizer=options.normalizer,
            oracle=options.oracle,
            json_file=options.json,
        )
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from nemo_llm_feedback.export import export

    _quiet_nemo()
    print(export(options.checkpoint, base=options.base, output=options.output))
    return 0


def _quiet_nemo() -> None:
    """Short commands show their result, not NeMo's notes on restoring a model."""
    from nemo.utils import logging

    logging.setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
