"""Real coffee orders: every trained row of the tables in docs/results/barista.md, from scratch, with one command.

    python examples/experiments/barista.py DATA CHECKPOINT.nemo --out FOLDER [--rows feedback …] [--split test]

DATA holds ``barista/``, ``guard/`` and ``source/`` (see ../shared/data/README.md). Every row has the same pool, which
goes round four times, updates, batch, optimizer, learning rate, rounds and, except `no_replay`, as many rows of
general speech, drawn once by seed from the base's own training speech: learned by NeMo's own step or, with --held,
holding the model where it was. `feedback_defaults` is the row for which nothing was chosen on labels but what --set
gives it; `feedback_wrong_context` has a hospital with invented names for a context; `…_others` have Whisper's
transcripts as hypotheses. --inference adds rows without training. LLM scores are kept in one file and shared by the
rows; a row whose result exists is not run again, and one that was cut goes on; tables and JSON hold the rows that
are named. Without --llm (for instance ../shared/checkpoints/lm) the LM of invented_names/ judges, trained where it is
missing. `--split test` scores the rows' checkpoints on the test split: do that once, with settings fixed on dev.
"""

from __future__ import annotations

from bed import Bed, TestSet, parser, run_rows, source_replay
from invented_names import on_demand


def main() -> None:
    """Runs the rows that are not there yet and prints the tables."""
    options = parser(__doc__, steps=136).parse_args()
    barista = options.data / "barista"
    replay = source_replay(options.data)
    wrong = None
    if "feedback_wrong_context" in options.rows:
        wrong = ("a voice command in the stock room of a hospital", on_demand.terms(options.data))
    bed = Bed(
        barista / "pool.json",
        "an order at a coffee shop",
        barista / "menu.json",
        replay,
        wrong=wrong,
        others=barista / "whisper_base.json",
    )
    sets = [
        TestSet(f"barista_{options.split}", barista / f"{options.split}.json", bed.terms_file),
        TestSet(f"guard_{options.split}", options.data / "guard" / "accented.json", in_domain=False),
        TestSet(f"books_{options.split}", options.data / "rare_words" / "dev.json", in_domain=False),
    ]
    run_rows(options, bed, sets=sets)


if __name__ == "__main__":
    main()
