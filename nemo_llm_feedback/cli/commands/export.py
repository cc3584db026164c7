"""``nemo-llm-feedback export``: turn a training checkpoint, or the average of several, into a plain .nemo."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from cyclopts import Parameter

from nemo_llm_feedback.cli.commands import quiet_nemo


@Parameter(name="*")
@dataclass(frozen=True)
class ExportOptions:
    """The flags of the command.

    Attributes:
        checkpoint: a Lightning .ckpt of a run, or a .nemo; several, of runs from one base: the mean of their weights
        base: .nemo that the run started from; of a .ckpt, if it has moved since
        interpolation: share of the way from the base's weights to the run's: above 0, to 1
        output: where to write; default: beside the checkpoint; needed for several
        manifest: labelled rows: before/after for the model card, which is written beside it
    """

    checkpoint: tuple[str, ...]
    _: KW_ONLY
    base: str | None = None
    interpolation: float = 1.0
    output: str | None = None
    manifest: str | None = None


def run(options: ExportOptions) -> int:
    """Turns a training checkpoint, or the average of several, into a plain .nemo."""
    from nemo_llm_feedback.cli.jobs.export import export

    quiet_nemo()
    files = {"base": options.base, "output": options.output, "manifest": options.manifest}
    print(export(options.checkpoint, interpolation=options.interpolation, **files))
    return 0
