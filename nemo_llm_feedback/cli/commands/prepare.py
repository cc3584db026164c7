"""``nemo-llm-feedback prepare``: long recordings become an unlabeled manifest by voice activity."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from cyclopts import Parameter

from nemo_llm_feedback.cli.options import Segmenting


@Parameter(name="*")
@dataclass(frozen=True)
class PrepareOptions:
    """The flags of the command.

    Attributes:
        folder: folder of recordings, searched with its sub-folders, or one file
        out: the manifest to write
        preview: segments to show
    """

    folder: str
    _: KW_ONLY
    out: str
    segmenting: Segmenting = field(default_factory=Segmenting)
    preview: int = 5


def run(options: PrepareOptions) -> int:
    """Makes an unlabeled manifest of long recordings by voice activity."""
    from nemo_llm_feedback.cli.jobs.prepare import prepare, summary

    found = prepare(options.folder, out=options.out, settings=options.segmenting)
    print(summary(found, preview=options.preview))
    return 0
