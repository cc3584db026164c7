"""The regime of a released checkpoint: general speech it knows, a domain whose names it never saw (synthetic speech).

    python examples/experiments/invented.py DATA CHECKPOINT.nemo --out FOLDER --general MANIFEST [--rows feedback …]

DATA holds ``text/`` (see ../shared/data/README.md). The domain is the quickstart's hospital with its invented names
(examples/quickstart/README.md), in sentences and speech of their own, made here by another seed (needs flite);
CHECKPOINT is a base that knows the voices (examples/quickstart/finetune_base.py), and --general the manifest of its
own training speech, of which a part is replayed. Sets: the domain in three known voices, the same in a voice that no
base has heard, and general sentences in the known voices. The rest is as in barista.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bed import Bed, TestSet, parser, run_rows

QUICKSTART = Path(__file__).parents[1] / "quickstart"
SEED = 40961
SIZES = {"pool": 270, "dev": 90, "test": 150, "test_unseen_voice": 90}


def main() -> None:
    """Makes the data if need be, runs the rows that are not there yet and prints the tables."""
    made = parser(__doc__, steps=136)
    made.add_argument("--general", type=Path, required=True, help="the base's own training speech, with text")
    options = made.parse_args()
    data = options.out / "data"
    if not (data / "general.json").is_file():
        command = [sys.executable, str(QUICKSTART / "make_data.py"), "--shared", str(options.data), "--out", str(data)]
        sizes = [f"{name}={rows}" for name, rows in SIZES.items()]
        subprocess.run([*command, "--seed", str(SEED), "--sizes", *sizes], check=True)
    description = "a voice command in the stock room of a hospital"
    terms = data / "terms.txt"
    wrong = ("an order at a coffee shop", options.data / "barista" / "menu.json")
    bed = Bed(data / "pool.json", description, terms, {options.general: 1.0}, data / "pool_labels.json", wrong)
    general = "general_dev" if options.split == "dev" else "general"
    sets = [
        TestSet(f"invented_{options.split}", data / f"{options.split}.json", terms),
        TestSet(general, data / f"{general}.json", in_domain=False),
    ]
    if options.split == "test":
        sets.insert(1, TestSet("invented_unseen_voice", data / "test_unseen_voice.json", terms))
    run_rows(options, bed, sets=sets)


if __name__ == "__main__":
    main()
