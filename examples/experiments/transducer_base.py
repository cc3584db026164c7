"""A hybrid transducer that hears as well as a CTC base: the base's encoder and CTC head in a hybrid of its family.

    python examples/experiments/transducer_base.py BASE.nemo HYBRID.nemo --out OUT.nemo [--manifest general_dev.json]

HYBRID's prediction network and joint were trained on the encoder that BASE was fine-tuned from, and take the
fine-tuned one without further training: the shared `tdt_ctc.nemo` and `rnnt_ctc.nemo` for bases made from the shared
`ctc.nemo` (invented_names/finetune_base.py). --manifest prints the greedy WER of both, which says whether that holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nemo.collections.asr.models import ASRModel
from nemo.utils import logging

from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.transcribe import transcribe_rows
from nemo_llm_feedback.training.models import restore


def main() -> None:
    """Writes the hybrid and prints the error rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("hybrid", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, help="labelled general speech in voices that BASE knows")
    options = parser.parse_args()
    logging.setLevel(logging.ERROR)
    graft(
        ASRModel.restore_from(options.base, map_location="cpu"),
        ASRModel.restore_from(options.hybrid, map_location="cpu"),
    ).save_to(str(options.out))
    for path in (options.base, options.out) if options.manifest else ():
        rows = read_manifest(options.manifest)
        found = score_rows(rows, transcribe_rows(restore(path, map_location="cpu"), rows), run_context=Context())
        print(f"{path.name}: WER {found.value('wer'):.1f} %", flush=True)


def graft(base: Any, hybrid: Any) -> Any:
    """Gives the hybrid the base's encoder and CTC head, and returns it.

    Args:
        base: a stock CTC model.
        hybrid: a stock hybrid with the same encoder, features and tokens.
    """
    for what, one, other in (
        ("features", base.cfg.preprocessor, hybrid.cfg.preprocessor),
        ("encoder", base.cfg.encoder, hybrid.cfg.encoder),
        ("tokens", list(base.tokenizer.vocab), list(hybrid.tokenizer.vocab)),
    ):
        if one != other:
            sys.exit(f"base and hybrid differ in their {what}: take a hybrid of the family that the base comes from.")
    hybrid.encoder.load_state_dict(base.encoder.state_dict())
    hybrid.ctc_decoder.load_state_dict(base.decoder.state_dict())
    return hybrid


if __name__ == "__main__":
    main()
