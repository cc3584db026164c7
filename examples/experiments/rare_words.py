"""Rare words of LibriSpeech, a list of 100 context words per utterance: the rows of docs/results/rare_words.md.

    python examples/experiments/rare_words.py DATA CHECKPOINT.nemo --out FOLDER [--rows feedback …] [--split test]

DATA holds ``rare_words/``, ``guard/`` and ``source/`` (see ../shared/data/README.md). The pool is its part of up to
--max-duration seconds, in the manifest's order, with the lists of its rows and without their text; with --transductive
it is the recordings themselves that are scored, their text unread: what a pile of recordings with lists is worth to
its own transcripts, where a pool of other books holds few of their words. The rest is as in barista.py.
"""

from __future__ import annotations

from bed import Bed, TestSet, parser, read_rows, run_rows, source_replay, write_rows


def main() -> None:
    """Runs the rows that are not there yet and prints the tables."""
    made = parser(__doc__, steps=136)
    made.add_argument("--max-duration", type=float, default=8.0, help="seconds; long audio is slow to learn on a CPU")
    made.add_argument("--transductive", action="store_true", help="the pool is the split that is scored")
    options = made.parse_args()
    rare = options.data / "rare_words"
    source = options.split if options.transductive else "pool"
    pool = options.out / f"{source}_{options.max_duration:g}s.json"
    short = [row for row in read_rows(rare / f"{source}.json") if row["duration"] <= options.max_duration]
    write_rows(pool, [(rare, row) for row in short])
    sets = [
        TestSet(f"rare_words_{options.split}", rare / f"{options.split}.json"),
        TestSet(f"guard_{options.split}", options.data / "guard" / "accented.json", in_domain=False),
    ]
    run_rows(options, Bed(pool, "a sentence read from a book", replay=source_replay(options.data)), sets=sets)


if __name__ == "__main__":
    main()
