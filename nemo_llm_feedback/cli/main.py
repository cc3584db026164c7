"""The command ``nemo-llm-feedback``; it and ``commands`` import argparse only, so that ``--help`` needs no NeMo."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nemo_llm_feedback.cli.commands import NAMES
from nemo_llm_feedback.core.errors import FeedbackError
from nemo_llm_feedback.core.version import __version__

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

Every key with its default: --show-config; every key explained: nemo_llm_feedback/config/.
"""


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

    for name in NAMES:
        module = importlib.import_module(f"nemo_llm_feedback.cli.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _adapt(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(ADAPT_HELP)
        return 0
    from nemo_llm_feedback.core.config.compose import compose_config

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
    from nemo.utils.get_rank import is_global_rank_zero

    from nemo_llm_feedback.cli.jobs.adapt import adapt, summary

    result = adapt(cfg)
    if is_global_rank_zero():
        print(summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
