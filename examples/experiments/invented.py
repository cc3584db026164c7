"""The regime of a released checkpoint: general speech it knows, a domain whose names it never saw (synthetic speech).

    python examples/experiments/invented.py DATA CHECKPOINT.nemo --out FOLDER --general MANIFEST [--rows feedback …]

DATA holds ``text/`` (see ../shared/data/README.md). The domain is the hospital of invented_names/README.md,
in sentences and speech of their own, made here by another seed (needs flite); CHECKPOINT is a base that knows the
voices (invented_names/finetune_base.py), and --general the manifest of its own training speech, of which a part is
replayed. Sets: the domain in three known voices, the same in a voice that no base has heard, and general sentences in
the known voices. The rest is as in barista.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bed import Bed, TestSet, parser, read_rows, run_rows, write_rows
from invented_names import on_demand

SEED = 40961
SIZES = {"pool": 540, "dev": 90, "test": 150, "test_unseen_voice": 90, "general_dev": 200, "general": 600}


def main() -> None:
    """Makes the data if need be, runs the rows that are not there yet and prints the tables."""
    made = parser(__doc__, steps=612)
    made.add_argument("--general", type=Path, required=True, help="the base's own training speech, with text")
    made.add_argument("--test-seed", type=int, help="test sets of another draw, without sentences of pool and dev")
    options = made.parse_args()
    if options.test_seed and options.split != "test":
        made.error("--test-seed goes with --split test")
    data = options.out / "data"
    make_data(options.data, data, seed=SEED, sizes=SIZES)
    tests = fresh_tests(options.data, data, seed=options.test_seed) if options.test_seed else data
    description = "a voice command in the stock room of a hospital"
    terms = data / "terms.txt"
    wrong = ("an order at a coffee shop", options.data / "barista" / "menu.json")
    bed = Bed(data / "pool.json", description, terms, {options.general: 1.0}, data / "pool_labels.json", wrong)
    draw = f"_{options.test_seed}" if options.test_seed else ""
    general = "general_dev" if options.split == "dev" else "general"
    sets = [
        TestSet(f"invented_{options.split}{draw}", tests / f"{options.split}.json", terms),
        TestSet(f"{general}{draw}", tests / f"{general}.json", in_domain=False),
    ]
    if options.split == "test":
        sets.insert(1, TestSet(f"invented_unseen_voice{draw}", tests / "test_unseen_voice.json", terms))
    run_rows(options, bed, sets=sets)


def make_data(shared: Path, out: Path, *, seed: int, sizes: Mapping[str, int]) -> None:
    """Speaks the sets, unless they are there."""
    if not (out / "general.json").is_file():
        rows = [f"{name}={size}" for name, size in sizes.items()]
        on_demand.run("make_data.py", "--out", out, "--seed", seed, "--sizes", *rows, shared=shared)


def fresh_tests(shared: Path, data: Path, *, seed: int) -> Path:
    """Test sets of another seed, for settings that were fixed after the first ones had been opened.

    Args:
        shared: holds ``text/``.
        data: pool and dev, whose sentences are left out; the new sets lie in a folder beside it.
        seed: of the draw.

    Returns:
        The folder of the new sets.
    """
    fresh = data.parent / f"data_{seed}"
    make_data(shared, fresh, seed=seed, sizes=SIZES | {"pool": 1, "dev": 1})
    known = {row["text"] for name in ("pool_labels", "dev", "general_dev") for row in read_rows(data / f"{name}.json")}
    for name in ("test", "test_unseen_voice", "general"):
        rows = [row for row in read_rows(fresh / f"{name}.json") if row["text"] not in known]
        write_rows(fresh / f"{name}.json", [(fresh, row) for row in rows])
    return fresh


if __name__ == "__main__":
    main()
