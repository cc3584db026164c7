"""Training examples for a small causal LM that uses the term list of its prompt.

One example is a *pack*: a prompt (domain description, term list) and several sentences that may use some of its terms.
Most terms are invented for the occasion, or rare in the text, so the only way to expect them is to read the list.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rapidfuzz.distance import Levenshtein

DESCRIPTIONS = {
    "nlu_ed_commands": "a voice command to an assistant",
    "slurp_lm": "a voice command to an assistant",
    "snips_commands": "a voice command to an assistant",
    "taskmaster4_coffee_user": "an order at a coffee shop",
    "common_voice": "a recording of read speech",
    "librispeech_tc100": "a recording of read speech",
}
# How often a pack is made of each text; barista_written_orders and reserved_* are in none.
WEIGHTS = {
    "nlu_ed_commands": 0.2,
    "slurp_lm": 0.2,
    "snips_commands": 0.12,
    "taskmaster4_coffee_user": 0.1,
    "common_voice": 0.23,
    "librispeech_tc100": 0.15,
}
# What a language model has not read that "saw no coffee text", in any of the texts.
COFFEE_TEXTS = ("taskmaster4_coffee_user",)
COFFEE = re.compile(
    r"\b(coffees?|espressos?|lattes?|cappuc\w*|mochas?|americanos?|macchiatos?|frapp\w*|flat whites?|chai|iced|"
    r"brew\w*|decaf\w*|creamers?|syrups?|whipped cream|(almond|oat|soy|coconut) milk|caf[eé]s?|baristas?|starbucks|"
    r"dunkin\w*)\b",
    re.IGNORECASE,
)
KINDS = ("a voice command", "a request", "a phone call", "a recording", "an order", "a question", "a conversation")
PLACES = ("in a library", "at a farm", "on a ship", "at a school", "in a workshop", "at a bank", "about a garden",
          "at a hotel", "about travel", "at an office", "about music", "in a factory", "at a museum")  # fmt: skip


def _list(text: str) -> list[str]:
    return text.split()


ONSETS = _list(
    "b br bl c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sn sp st str t th tr v w y z"
)
NUCLEI = _list("a a a e e e i i i o o o u u ai au ea ee ei ia ie io oa oo ou y")
CODAS = ["", "", "", "", *_list("l m n n r r s t x ck ld lm nd ng nk nt rd rn sk st")]
ENDINGS = _list(
    "a an ar ard ane ate ell en er ez ia ian ick ide il in ine io is ix o ol on one or ov son stone ton us ville well "
    "wick"
)


@dataclass(frozen=True)
class Pack:
    """A prompt ("" for none) and the sentences that follow it, each on its own."""

    prompt: str
    sentences: tuple[str, ...]


def make_prompt(description: str, terms: Sequence[str]) -> str:
    """The prompt of ../shared/checkpoints/README.md, word for word, ending in a newline; an empty part has no line."""
    described = f"The following is a transcript of {description}.\n" if description else ""
    listed = f"Terms that may occur: {', '.join(terms)}.\n" if terms else ""
    return described + listed


def read_texts(folder: Path, *, max_words: int = 24, coffee: bool = True) -> dict[str, list[str]]:
    """Read the texts of `WEIGHTS`, without one-word lines; longer sentences are cut to a head of random length.

    Args:
        folder: of the texts.
        max_words: of a sentence's head; it has at least half as many.
        coffee: False leaves out coffee orders, and every line of another text that has a word of `COFFEE`.
    """
    texts: dict[str, list[str]] = {}
    for name in WEIGHTS if coffee else [name for name in WEIGHTS if name not in COFFEE_TEXTS]:
        lines = sorted(set((folder / f"{name}.txt").read_text().splitlines()))
        lines = lines if coffee else [line for line in lines if not COFFEE.search(line)]
        rng = random.Random(name)
        cut = [" ".join(line.split()[: rng.randint(max_words // 2, max_words)]) for line in lines if " " in line]
        rng.shuffle(cut)
        texts[name] = cut
    return texts


class WordMaker:
    """Invents words: half from syllables, half from a character 4-gram model of the text's rarer words."""

    def __init__(self, vocabulary: Counter[str], *, forbidden: Sequence[str]) -> None:
        """Args: vocabulary: word counts of the texts; forbidden: words that nothing invented may resemble."""
        self.known = vocabulary
        self.forbidden = tuple(forbidden)
        self.next_char: dict[str, list[str]] = defaultdict(list)
        for word, count in sorted(vocabulary.items()):
            if count <= 30 and re.fullmatch(r"[a-z]{5,12}", word):
                padded = f"^^^{word}$"
                for i in range(3, len(padded)):
                    self.next_char[padded[i - 3 : i]].append(padded[i])

    def resembles_forbidden(self, word: str) -> bool:
        """True within two edits of a forbidden word (one edit for words under six letters)."""
        return any(
            Levenshtein.distance(word, other, score_cutoff=2) <= (2 if len(other) >= 6 else 1)
            for other in self.forbidden
        )

    def draw(self, rng: random.Random) -> str:
        """Return an invented word of 4 to 12 letters."""
        while True:
            word = self._syllables(rng) if rng.random() < 0.5 else self._markov(rng)
            if 4 <= len(word) <= 12 and word not in self.known and not self.resembles_forbidden(word):
                return word

    def _syllables(self, rng: random.Random) -> str:
        size = rng.choice((1, 1, 2, 2, 3))
        parts = [rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) for _ in range(size)]
        if rng.random() < 0.15:
            parts[0] = parts[0].lstrip("bcdfghjklmnpqrstvwxyz")
        return "".join(parts) + (rng.choice(ONSETS[:20]) if rng.random() < 0.3 else "") + rng.choice(ENDINGS)

    def _markov(self, rng: random.Random) -> str:
        word = "^^^"
        while not word.endswith("$") and len(word) < 16:
            word += rng.choice(self.next_char[word[-3:]])
        return word.strip("^$")


class PackMaker:
    """Draws packs from texts; see the module's docstring."""

    def __init__(self, texts: dict[str, list[str]], *, forbidden: Sequence[str], plain_share: float = 0.3) -> None:
        """Args: texts: name → sentences; forbidden: see `WordMaker`; plain_share: packs without a term list."""
        self.texts = texts
        self.counts = Counter(word for lines in texts.values() for line in lines for word in line.split())
        ranked = [word for word, _ in self.counts.most_common()]
        self.frequent = set(ranked[:250])
        self.middle = [word for word in ranked[250:6000] if len(word) >= 4]
        self.words = WordMaker(self.counts, forbidden=forbidden)
        self.plain_share = plain_share

    def term(self, rng: random.Random) -> str:
        """One term: invented, two invented words, invented with a common word, or two common words."""
        kind = rng.random()
        if kind < 0.62:
            return self.words.draw(rng)
        if kind < 0.75:
            return f"{self.words.draw(rng)} {self.words.draw(rng)}"
        if kind < 0.85:
            return f"{self.words.draw(rng)} {rng.choice(self.middle)}"
        if kind < 0.94:
            return f"{rng.choice(self.middle)} {self.words.draw(rng)}"
        return f"{rng.choice(self.middle)} {rng.choice(self.middle)}"

    def rare_words(self, sentence: str) -> list[str]:
        """The sentence's words that the texts have at most five times."""
        return [word for word in sentence.split() if self.counts[word] <= 5 and len(word) >= 4]

    def insert(self, sentence: str, terms: Sequence[str]) -> str:
        """Put each term in place of a content word (any word when none is left)."""
        words = sentence.split()
        open_slots = list(range(len(words)))
        order = sorted(open_slots, key=lambda i: (words[i] in self.frequent, hash_order(sentence, i)))
        for slot, term in zip(order, terms, strict=False):
            words[slot] = term
        return " ".join(words)

    def drill(self, rng: random.Random, *, size: int) -> Pack:
        """Return a pack of bare terms: nearly every token can be copied from the list, which teaches copying."""
        listed = [self.term(rng) for _ in range(rng.randint(3, 8))]
        prompt = make_prompt("", listed)
        return Pack(prompt, tuple(" ".join(rng.sample(listed, rng.randint(2, 3))) for _ in range(size)))

    def draw(self, rng: random.Random, *, max_terms: int, size: int) -> Pack:
        """Return a pack of `size` sentences whose list, if it has one, is 5 to `max_terms` long."""
        name = rng.choices(list(self.texts), weights=[WEIGHTS[n] for n in self.texts])[0]
        sentences = rng.sample(self.texts[name], size)
        description = DESCRIPTIONS[name]
        if rng.random() < 0.3:
            description = rng.choice(KINDS) + (" " + rng.choice(PLACES) if rng.random() < 0.7 else "")
        plain = rng.random() < self.plain_share
        invented = [self.term(rng) for _ in range(rng.randint(5, max_terms))]
        live = rng.sample(invented, max(2, round(len(invented) * rng.uniform(0.3, 1.0))))
        listed = list(invented)
        written = []
        for sentence in sentences:
            chance = rng.random()
            rare = self.rare_words(sentence)
            if plain or chance < 0.15:
                written.append(sentence)
            elif rare and chance < 0.45:
                listed += rare[:2]
                written.append(sentence)
            else:
                written.append(self.insert(sentence, rng.sample(live, rng.choice((1, 1, 1, 2)))))
        if plain:
            prompt = "" if rng.random() < 0.67 else make_prompt(description, ())
        else:
            listed = sorted(set(listed))
            rng.shuffle(listed)
            prompt = make_prompt(description if rng.random() < 0.92 else "", listed)
        return Pack(prompt, tuple(written))


def hash_order(sentence: str, index: int) -> float:
    """A fixed pseudo-random number of a word position, so that equal seeds give equal packs in every process."""
    return random.Random(f"{sentence}/{index}").random()
