"""The command ``nemo-llm-feedback``. Neither it nor ``commands`` imports NeMo, so that ``--help`` takes 0.2 s."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from nemo_llm_feedback.cli.commands import COMMANDS
from nemo_llm_feedback.core.console import be_verbose, quiet
from nemo_llm_feedback.core.errors import FeedbackError
from nemo_llm_feedback.core.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        0; 1 after an error of the user's input, which is printed without a traceback; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--verbose" in arguments:
        arguments.remove("--verbose")
        be_verbose()
    if arguments == ["adapt"]:
        arguments.append("--help")
    try:
        return int(_app()(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except CycloptsError as error:
        from nemo_llm_feedback.core.config.renames import renamed

        renames = [now for word in arguments if (now := renamed(word.partition("=")[0]))]
        print(f"error: {' '.join(renames) or error}", file=sys.stderr)
    except FeedbackError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _app() -> App:
    app = App(
        name="nemo-llm-feedback",
        help="Adapts NeMo ASR checkpoints to unlabeled audio with an LLM's feedback. "
        "Every command takes --verbose: it shows the lines of NeMo, Lightning and transformers, too.",
        version=f"nemo-llm-feedback {__version__}",
        help_format="plaintext",
        default_parameter=Parameter(consume_multiple=True, negative=(), show_default=_shown),
    )
    app.command(_adapt, name="adapt", usage="Usage: nemo-llm-feedback adapt KEY=VALUE … [OPTIONS]")
    for command in COMMANDS:
        app.command(command, name=command.__name__)
    return app


def _shown(default: object) -> Any:
    """A default as the help shows it; None, empty values and flags that are off are not shown."""
    return None if default is None or default is False or default in ((), "") else str(default)


def _adapt(
    *overrides: str, config_name: str = "adapt", config_dir: str | None = None, show_config: bool = False
) -> int:
    """Adapts a checkpoint to unlabeled audio with an LLM's feedback (Hydra settings).

    Writes a plain .nemo. NeMo's sections keep NeMo's keys. What every run needs:

      init_from_nemo_model=FILE.nemo     or init_from_pretrained_model=NAME
      model.train_ds.manifest_filepath=M.json    rows without text: from feedback
      context.description="an order at a coffee shop" context.terms_file=menu.json
      llm.model=Qwen/Qwen2.5-7B-Instruct    folder, hub id or GGUF file of a causal LM

    Often used:

      model.validation_ds.manifest_filepath=dev.json    labelled, for before/after
      objective=distill|mwer|grpo|dpo|reinforce|self_training
      llm=nf4|int8|full    trainer=auto|cpu|gpu    trainer.max_steps=200
      model.optim.lr=1e-5    model.train_ds.use_lhotse=true
      feedback.use_text=false    output=adapted.nemo

    Every key with its default: --show-config; keys explained: nemo_llm_feedback/core/config/

    Args:
        overrides: settings, KEY=VALUE
        config_name: configuration to start from
        config_dir: folder of your configurations, searched first
        show_config: print the composed configuration and stop
    """
    from nemo_llm_feedback.core.config.compose import compose_config

    cfg = compose_config(overrides, config_name=config_name, config_dir=config_dir)
    if show_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(cfg))
        return 0
    with quiet(verbose=bool(cfg.verbose)):
        from nemo.utils.get_rank import is_global_rank_zero

        from nemo_llm_feedback.cli.jobs.adapt import adapt, summary

        result = adapt(cfg)
    if is_global_rank_zero():
        print(summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
