"""Makes the sets: spoken requests to the stock room of an invented hospital.

Sentences come from a small grammar; its medicines, people and places are invented or rare, so that no text that the
base or the LM learned from has them (`check_unseen` proves it against ../shared/data and raises otherwise).
Everything is a function of the seed below: a second run gives the same sentences and, with the same flite, the same
audio.

    python examples/experiments/invented_names/make_data.py [--shared ../shared/data] [--out FOLDER]
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from domain import CARRIERS, DISTRACTORS, FILLERS, TERMS
from on_demand import HERE, SHARED
from speech import KNOWN_VOICES, UNSEEN_VOICE, require_flite, synthesise, write_opus

SEED = 20261
SPLITS = {"pool": 200, "dev": 60, "test": 120, "test_unseen_voice": 60}
GENERAL_SPLITS = {"general_dev": 60, "general": 80}
COMMON_WORD_COUNT = 5  # a general sentence has only words that the training texts have at least this often

Sentence = tuple[str, tuple[str, ...]]


def training_sentences(shared: Path) -> Iterator[str]:
    """Yield every sentence (lower case) that a base model or an LM of this project may have learned from."""
    for path in sorted((shared / "text").iterdir()):
        if path.name.startswith("reserved_"):
            continue
        if path.suffix == ".txt":
            yield from path.read_text().lower().splitlines()
        else:
            yield re.sub(r"[^a-z' ]+", " ", path.read_text().lower())
    for path in sorted((shared / "source").glob("*.json")):
        for line in path.read_text().splitlines():
            yield json.loads(line)["text"].lower()


def check_unseen(terms: list[str], sentences: list[str], shared: Path) -> dict[str, int]:
    """Check that no training text has a term or a sentence of the sets.

    A term passes if it occurs nowhere as a phrase and at least one of its words occurs nowhere at all.

    Args:
        terms: the whole term list, distractors included.
        sentences: the sentences of every domain split.
        shared: folder with `text/` and `source/`.

    Returns:
        Counts: training sentences read, distinct words in them, terms checked, term words, term words seen there.

    Raises:
        ValueError: names each term or sentence that was found.
    """
    seen = set(training_sentences(shared))
    words = {word for sentence in seen for word in sentence.split()}
    text = " \n ".join(sorted(seen))
    known = [term for term in terms if f" {term} " in text or all(word in words for word in term.split())]
    repeated = sorted(set(sentences) & seen)
    if known or repeated:
        raise ValueError(f"in the training text: terms {known}, sentences {repeated}; choose others in domain.py")
    term_words = {word for term in terms for word in term.split()}
    return {
        "training_sentences": len(seen),
        "training_words": len(words),
        "terms": len(terms),
        "term_words": len(term_words),
        "term_words_seen": len(term_words & words),
    }


def fill(carrier: str, rng: random.Random, usage: Counter[str]) -> Sentence:
    """Fill one carrier phrase; terms used least so far are drawn first, so that each occurs in every large split.

    Returns:
        The sentence and the terms in it, in order.
    """
    entities: list[str] = []

    def choose(match: re.Match[str]) -> str:
        kind = match.group(1)
        if kind not in TERMS:
            return rng.choice(FILLERS[kind])
        fewest = min(usage[term] for term in TERMS[kind] if term not in entities)
        term = rng.choice([term for term in TERMS[kind] if usage[term] <= fewest + 1 and term not in entities])
        usage[term] += 1
        entities.append(term)
        return term

    # An alternation such as [could you|please] is resolved before the slots, so that a slot may stand inside one.
    while "[" in carrier:
        carrier = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m.group(1).split("|")), carrier)
    text = re.sub(r"\{(\w+)\}", choose, carrier)
    return " ".join(text.split()), tuple(entities)


def domain_sentences(rng: random.Random, sizes: Mapping[str, int] = SPLITS) -> dict[str, list[Sentence]]:
    """Return the sentences of each domain split; no sentence occurs twice anywhere."""
    taken: set[str] = set()
    splits: dict[str, list[Sentence]] = {}
    for name, size in sizes.items():
        usage: Counter[str] = Counter()
        rows: list[Sentence] = []
        order: list[str] = []
        while len(rows) < size:
            if not order:
                order = rng.sample(CARRIERS, len(CARRIERS))
            text, entities = fill(order.pop(), rng, usage)
            if text not in taken:
                taken.add(text)
                rows.append((text, entities))
        splits[name] = rows
    return splits


def general_sentences(
    shared: Path, rng: random.Random, sizes: Mapping[str, int] = GENERAL_SPLITS
) -> dict[str, list[Sentence]]:
    """Draw everyday commands of 4 to 10 words from the reserved text, each word common in the training texts."""
    counts = Counter(word for sentence in training_sentences(shared) for word in sentence.split())
    lines = sorted(set((shared / "text" / "reserved_commands.txt").read_text().splitlines()))
    fit = [
        line
        for line in lines
        if 4 <= len(line.split()) <= 10 and all(counts[word] >= COMMON_WORD_COUNT for word in line.split())
    ]
    chosen = rng.sample(fit, sum(sizes.values()))
    splits: dict[str, list[Sentence]] = {}
    for name, size in sizes.items():
        splits[name] = [(text, ()) for text in chosen[:size]]
        chosen = chosen[size:]
    return splits


def write_split(name: str, rows: list[Sentence], out: Path, *, seed: int = SEED) -> float:
    """Speak and write one split with its manifest (the pool's has no text); returns its duration in seconds."""
    voices = (UNSEEN_VOICE,) if name == "test_unseen_voice" else KNOWN_VOICES
    total = 0.0
    lines = []
    for index, (text, entities) in enumerate(rows):
        voice = voices[index % len(voices)]
        file = f"audio/{name}/{index:03d}_{voice}.ogg"
        samples = synthesise(text, voice=voice, rng=random.Random(f"{seed}/{name}/{index}"))
        duration = write_opus(out / file, samples)
        row: dict[str, object] = {"audio_filepath": file, "duration": duration}
        if name != "pool":
            row |= {"text": text, "entities": list(entities), "voice": voice}
        lines.append(json.dumps(row))
        total += duration
    (out / f"{name}.json").write_text("\n".join(lines) + "\n")
    if name == "pool":
        # Labels of the pool, for oracle and ceiling rows of experiments only: adaptation never opens this file.
        labels = []
        for line, (text, entities) in zip(lines, rows, strict=True):
            labels.append(json.dumps(json.loads(line) | {"text": text, "entities": list(entities)}))
        (out / "pool_labels.json").write_text("\n".join(labels) + "\n")
    return total


def main() -> None:
    """Make every split, check that its terms are unseen, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with text/ and source/")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder for manifests and audio")
    parser.add_argument("--seed", type=int, default=SEED, help="of sentences and speech; another gives another set")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="SPLIT=ROWS", help="of domain and general splits")
    parser.add_argument("--terms-only", action="store_true", help="check all, write terms.txt and speak nothing")
    args = parser.parse_args()
    if not args.terms_only:
        require_flite()
    rng = random.Random(args.seed)
    given = dict(item.split("=") for item in args.sizes)
    domain, general = ({k: int(given.get(k, v)) for k, v in sizes.items()} for sizes in (SPLITS, GENERAL_SPLITS))
    splits = domain_sentences(rng, domain)
    terms = sorted([term for kind in TERMS.values() for term in kind] + DISTRACTORS)
    found = check_unseen(terms, [text for rows in splits.values() for text, _ in rows], args.shared)
    print("unseen check passed:", json.dumps(found))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "terms.txt").write_text("\n".join(terms) + "\n")
    if args.terms_only:
        return
    splits |= general_sentences(args.shared, rng, general)
    for name, rows in splits.items():
        seconds = write_split(name, rows, args.out, seed=args.seed)
        mentions = Counter(term for _, entities in rows for term in entities)
        print(f"{name}: {len(rows)} rows, {seconds:.0f} s, {len(mentions)} terms, {sum(mentions.values())} mentions")


if __name__ == "__main__":
    main()
