"""Metrics against hand-counted utterances, brute force, and identities between them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.text import basic, lower, none
from nemo_llm_feedback.evaluation.metrics import (
    COLUMNS,
    METRICS,
    oracle,
    paired_difference,
    score_corpus,
)


def counts(reference: str, hypothesis: str, **lists) -> dict[str, int]:
    """The counts of one utterance."""
    scores = score_corpus([reference], [hypothesis], normalize=lower, **{k: [v] for k, v in lists.items()})
    return dict(zip(COLUMNS, scores.counts[0].tolist(), strict=True))


def pick(values: dict[str, int], *names: str) -> tuple[int, ...]:
    return tuple(values[name] for name in names)


# --- WER and CER ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c", "a b c", (3, 0, 0, 0)),
        ("a b c", "a x c", (3, 1, 0, 0)),
        ("a b c", "a c", (3, 0, 1, 0)),
        ("a b c", "a b x c", (3, 0, 0, 1)),
        ("a b c", "", (3, 0, 3, 0)),
        ("", "x y", (0, 0, 0, 2)),
        ("", "", (0, 0, 0, 0)),
        ("  A\tb\n c ", "a B c", (3, 0, 0, 0)),
    ],
)
def test_word_counts(reference, hypothesis, expected):
    got = counts(reference, hypothesis)
    assert pick(got, "words", "substitutions", "deletions", "insertions") == expected
    assert got["word_errors"] == sum(expected[1:])


def test_character_counts_include_the_space():
    assert pick(counts("ab cd", "abcd"), "chars", "char_errors") == (5, 1)
    assert pick(counts("", "xy"), "chars", "char_errors") == (0, 2)
    assert pick(counts("kitten", "sitting"), "chars", "char_errors") == (6, 3)


def edit_distance(a: list, b: list) -> int:
    """Brute-force recursion, for short sequences."""
    if not a or not b:
        return len(a) + len(b)
    replace = edit_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replace, edit_distance(a[1:], b) + 1, edit_distance(a, b[1:]) + 1)


def random_words(rng: random.Random, longest: int) -> list[str]:
    return [rng.choice("abc") for _ in range(rng.randint(0, longest))]


def test_error_counts_against_brute_force():
    rng = random.Random(0)
    pairs = [(random_words(rng, 5), random_words(rng, 5)) for _ in range(150)]
    scores = score_corpus([" ".join(r) for r, _ in pairs], [" ".join(h) for _, h in pairs], normalize=none)
    assert scores.column("word_errors").tolist() == [edit_distance(r, h) for r, h in pairs]
    totals = scores.column("substitutions") + scores.column("deletions") + scores.column("insertions")
    assert (totals == scores.column("word_errors")).all()


def test_values_are_pooled_not_averaged():
    scores = score_corpus(["a b c d", "e"], ["a b c d", "x"], normalize=none)
    assert scores.value("wer") == pytest.approx(20.0)


# --- entities -------------------------------------------------------------------------------------------------------

ENTITY = ("entity_words", "entity_errors", "other_words", "other_errors", "entities", "entities_recalled")


@pytest.mark.parametrize(
    ("reference", "hypothesis", "entities", "expected"),
    [
        # every error outside
        ("i want iced mocha now", "i wand iced mocha", ["iced mocha"], (2, 0, 3, 2, 1, 1)),
        # substitution and deletion inside
        ("i want iced mocha", "i want nice", ["iced mocha"], (2, 2, 2, 0, 1, 0)),
        # insertion strictly between two words of the span
        ("want iced mocha now", "want iced uh mocha now", ["iced mocha"], (2, 1, 2, 0, 1, 0)),
        # insertions just before and just after the span are outside
        ("want iced mocha now", "want uh iced mocha uh now", ["iced mocha"], (2, 0, 2, 2, 1, 1)),
        # between two adjacent entities is within neither
        ("iced mocha skim milk", "iced mocha uh skim milk", ["iced mocha", "skim milk"], (4, 0, 0, 1, 2, 2)),
        # a repeated entity counts each time, listed once or twice
        ("milk and milk", "milk and silk", ["milk"], (2, 1, 1, 0, 2, 1)),
        ("milk and milk", "milk and silk", ["milk", "milk"], (2, 1, 1, 0, 2, 1)),
        # nested: words once, mentions twice
        ("skim milk", "skim silk", ["skim milk", "milk"], (2, 1, 0, 0, 2, 0)),
        ("skim milk", "slim milk", ["skim milk", "milk"], (2, 1, 0, 0, 2, 1)),
        # overlapping spans: the insertion is inside one of them
        ("a b c", "a b x c", ["a b", "b c"], (3, 1, 0, 0, 2, 1)),
        # spans are half-open and may stand beside strings
        ("mocha or mocha", "soda or soda", [[2, 3]], (1, 1, 2, 1, 1, 0)),
        ("mocha or mocha", "mocha or soda", [[2, 3], "mocha"], (2, 1, 1, 0, 2, 1)),
        # no entities, empty texts
        ("a b", "a", [], (0, 0, 2, 1, 0, 0)),
        ("", "x", [], (0, 0, 0, 1, 0, 0)),
        ("mocha", "", ["mocha"], (1, 1, 0, 0, 1, 0)),
        # part of a word is no mention of it: see the missing list
        ("mochas", "mochas", ["mocha"], (0, 0, 1, 0, 0, 0)),
    ],
)
def test_entity_counts(reference, hypothesis, entities, expected):
    assert pick(counts(reference, hypothesis, entities=entities), *ENTITY) == expected


def test_entity_and_other_errors_add_up():
    rng = random.Random(1)
    refs = [random_words(rng, 6) for _ in range(200)]
    hyps = [random_words(rng, 6) for _ in range(200)]
    entities = []
    for ref in refs:
        starts = [rng.randrange(len(ref)) for _ in range(rng.randint(0, 3))] if ref else []
        entities.append([[s, rng.randint(s + 1, len(ref))] for s in starts])
    texts = [[" ".join(words) for words in side] for side in (refs, hyps)]
    scores = score_corpus(*texts, normalize=none, entities=entities)
    assert (scores.column("entity_errors") + scores.column("other_errors") == scores.column("word_errors")).all()
    assert (scores.column("entity_words") + scores.column("other_words") == scores.column("words")).all()
    assert (scores.column("entities_recalled") <= scores.column("entities")).all()
    clean = scores.column("entity_errors") == 0
    assert (scores.column("entities_recalled") == scores.column("entities"))[clean].all()
    assert (scores.column("entities_recalled") < scores.column("entities"))[~clean].all()
    whole = score_corpus(*texts, normalize=none, entities=[[[0, len(ref)]] if ref else [] for ref in refs])
    outer = sum(len(hyp) for ref, hyp in zip(refs, hyps, strict=True) if not ref)
    inner = whole.column("entity_errors").sum()
    assert whole.column("word_errors").sum() - outer >= inner > 0


def test_missing_entities_are_listed():
    texts = ["an iced mocha", "tea"]
    entities = [["iced mocha", "Latte"], ["tea", "--"]]
    scores = score_corpus(texts, texts, normalize=basic, entities=entities)
    assert [(m.utterance, m.entity) for m in scores.missing] == [(0, "Latte"), (1, "--")]
    assert scores.value("entity_recall") == 100.0
    assert scores.column("entities").tolist() == [1, 1]


@pytest.mark.parametrize("span", [[1, 1], [2, 1], [-1, 1], [0, 4], [0], [0, 1, 2]])
def test_impossible_spans_are_errors(span):
    with pytest.raises(ManifestError, match=r"start < end <= 3"):
        counts("one two three", "", entities=[span])


@pytest.mark.parametrize("entity", [{"text": "one"}, ["one", "two"], 3, None])
def test_entities_of_another_kind_are_errors(entity):
    with pytest.raises(ManifestError, match="neither a string nor a word span"):
        counts("one two three", "", entities=[entity])


def test_spans_follow_the_normalisation():
    reference = "Well - the T-bone steak, please"  # words: Well | - | the | T-bone | steak, | please
    scores = score_corpus([reference], ["well the t bone stake please"], normalize=basic, entities=[[[3, 5]]])
    got = dict(zip(COLUMNS, scores.counts[0].tolist(), strict=True))
    assert pick(got, *ENTITY) == (3, 1, 3, 0, 1, 0)


def test_normalisation_applies_to_texts_entities_terms_and_bias_words():
    lists = {"entities": [["Iced-Mocha"]], "terms": [["MILK!"]], "bias_words": [["Mocha."]]}
    scores = score_corpus(["An iced mocha."], ["AN ICED MOCHA, milk"], normalize=basic, **lists)
    expected = {
        "wer": 100 / 3,
        "ewer": 0.0,
        "entity_recall": 100.0,
        "false_alarms": 100.0,
        "b_wer": 0.0,
        "b_u_wer": 50,
    }
    for metric, value in expected.items():
        assert scores.value(metric) == pytest.approx(value), metric


def test_a_bias_word_that_the_normalisation_splits_is_each_of_its_parts():
    """``Jean-Luc`` was one word "jean luc", which no reference has, and silently left B-WER."""
    lists = {"bias_words": [["Jean-Luc", "U.S."]]}
    scores = score_corpus(["Jean-Luc left the U.S."], ["john luke left the us"], normalize=basic, **lists)
    assert (scores.column("b_words").sum(), scores.column("b_u_words").sum()) == (4, 2)
    assert scores.value("b_wer") == 100.0


# --- false alarms ---------------------------------------------------------------------------------------------------

ALARMS = ("term_utterances", "hyp_terms", "false_alarms")


@pytest.mark.parametrize(
    ("reference", "hypothesis", "terms", "expected"),
    [
        ("a tea please", "a latte please", ["latte", "tea"], (1, 1, 1)),
        ("a latte", "a latte", ["latte"], (1, 1, 0)),
        # one more than the reference has
        ("latte", "latte latte latte", ["latte"], (1, 3, 2)),
        # the longest term counts, and counts once
        ("tea", "a lot of whole milk", ["milk", "whole milk", "a lot of whole milk"], (1, 1, 1)),
        ("iced", "iced tea", ["iced", "iced tea"], (1, 1, 1)),
        # what the hypothesis lacks of one term does not excuse another
        ("tea tea", "tea latte", ["tea", "latte"], (1, 2, 1)),
        # another term than the reference's
        ("mocha", "iced mocha", ["mocha", "iced mocha"], (1, 1, 1)),
        # the words of the hypothesis's term are in the reference, so it is none of its inventions
        ("iced mocha", "mocha", ["mocha", "iced mocha"], (1, 1, 0)),
        # a term cut short is no term, and a failed long match leaves the shorter one
        ("x", "iced", ["iced mocha"], (1, 0, 0)),
        ("x", "iced tea now", ["iced tea please", "iced tea"], (1, 1, 1)),
        # matches do not overlap
        ("x", "a b a", ["a b", "b a"], (1, 1, 1)),
        ("x", "latte", [], (0, 0, 0)),
        ("x", "latte", [" "], (0, 0, 0)),
        ("", "latte", ["latte", "LATTE"], (1, 1, 1)),
    ],
)
def test_false_alarms(reference, hypothesis, terms, expected):
    assert pick(counts(reference, hypothesis, terms=terms), *ALARMS) == expected


def test_false_alarm_rates():
    scores = score_corpus(["a", "b", "c"], ["tea tea", "b", "tea"], normalize=none, terms=[["tea"], ["tea"], []])
    assert scores.value("false_alarms") == pytest.approx(100.0)  # 2 in the 2 utterances that have a list
    assert scores.value("false_alarm_rate") == pytest.approx(100.0)


# --- B-WER ----------------------------------------------------------------------------------------------------------

BIASED = ("b_words", "b_errors", "b_u_words", "b_u_errors")


@pytest.mark.parametrize(
    ("reference", "hypothesis", "listed", "expected"),
    [
        ("we saw quixote", "we saw key hotel", ["quixote"], (1, 1, 2, 1)),
        ("we saw quixote", "we quixote", ["quixote"], (1, 0, 2, 1)),
        # inserted words count by what they are, not by where they are
        ("we saw", "we saw quixote", ["quixote"], (0, 1, 2, 0)),
        ("quixote", "oh quixote", ["quixote"], (1, 0, 0, 1)),
        # a substitution counts by its reference word
        ("we saw", "quixote saw", ["quixote"], (0, 0, 2, 1)),
        ("", "quixote x", ["quixote"], (0, 1, 0, 1)),
        ("a b", "", ["a"], (1, 1, 1, 1)),
        ("", "", ["a"], (0, 0, 0, 0)),
        # costs 4/3/3: three deletions, two hits and three insertions (18) beat five substitutions (20)
        ("a b c d e", "d e x y z", ["d", "e"], (2, 0, 3, 6)),
    ],
)
def test_bias_counts(reference, hypothesis, listed, expected):
    assert pick(counts(reference, hypothesis, bias_words=listed), *BIASED) == expected


def published_choice(ref: list[str], hyp: list[str], listed: set[str]) -> tuple[tuple[int, ...], int]:
    """B-WER by exhaustive dynamic programming with the published scorer's order of choice among equal costs.

    Diagonal first, then insertion, then deletion. Returns the four counts and the number of optimal alignments.
    """
    cost: dict[tuple[int, int], int] = {(0, 0): 0}
    ways = {(0, 0): 1}
    back: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(len(ref) + 1):
        for j in range(len(hyp) + 1):
            steps = []
            if i and j:
                steps.append(((i - 1, j - 1), 0 if ref[i - 1] == hyp[j - 1] else 4))
            if j:
                steps.append(((i, j - 1), 3))
            if i:
                steps.append(((i - 1, j), 3))
            if steps:
                cost[i, j] = min(cost[node] + price for node, price in steps)
                best = [node for node, price in steps if cost[node] + price == cost[i, j]]
                back[i, j], ways[i, j] = best[0], sum(ways[node] for node in best)
    got = dict.fromkeys(BIASED, 0)
    i, j = len(ref), len(hyp)
    while (i, j) != (0, 0):
        a, b = back[i, j]
        ref_word, hyp_word = ref[i - 1] if a < i else "", hyp[j - 1] if b < j else ""
        kind = "b" if (ref_word or hyp_word) in listed else "b_u"
        got[f"{kind}_words"] += bool(ref_word)
        got[f"{kind}_errors"] += ref_word != hyp_word
        i, j = a, b
    return pick(got, *BIASED), ways[len(ref), len(hyp)]


def noisy(rng: random.Random, words: list[str], vocabulary: list[str], rate: float) -> list[str]:
    """A recogniser's errors: substitutions, deletions and insertions at ``rate`` a word."""
    out = []
    for word in words:
        kind = rng.random() / rate
        if kind < 0.6:
            out.append(rng.choice(vocabulary))
        elif kind >= 0.8:
            out.append(word)
        if rng.random() < 0.2 * rate:
            out.append(rng.choice(vocabulary))
    return out


@pytest.mark.parametrize(("rate", "tolerance"), [(0.1, 0.0), (0.4, 0.01)])
def test_bias_counts_agree_with_the_published_scorer(rate, tolerance):
    """Exactly up to an error rate of 10 %; beyond, equally cheap alignments differ in a few words of a thousand."""
    rng = random.Random(2)
    vocabulary = [f"w{i}" for i in range(60)]
    listed = set(vocabulary[::4])
    unique, ours, theirs = 0, np.zeros(4), np.zeros(4)
    for _ in range(300):
        ref = [rng.choice(vocabulary) for _ in range(rng.randint(0, 20))]
        hyp = noisy(rng, ref, vocabulary, rate)
        got = pick(counts(" ".join(ref), " ".join(hyp), bias_words=listed), *BIASED)
        wanted, ways = published_choice(ref, hyp, listed)
        ours, theirs, unique = ours + got, theirs + wanted, unique + (ways == 1)
        assert ways > 1 or got == wanted
    assert unique > 50
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)


# --- oracle, selection, bad input -----------------------------------------------------------------------------------


def test_oracle():
    references = ["a b c", "d e", ""]
    nbest = [["a x c", "A b c", "a b c"], ["x", "y e"], ["u v", "w"]]
    best = oracle(references, nbest, normalize=lower)
    assert best == ["A b c", "y e", "w"]
    scores = score_corpus(references, best, normalize=lower)
    assert scores.column("word_errors").tolist() == [0, 1, 1]
    assert scores.value("wer") == pytest.approx(40.0)


def test_oracle_against_jiwer_on_random_lists():
    rng = random.Random(4)
    references = [" ".join(random_words(rng, 6)) for _ in range(40)]
    nbest = [[" ".join(random_words(rng, 6)) for _ in range(rng.randint(1, 5))] for _ in references]
    best = score_corpus(references, oracle(references, nbest, normalize=none), normalize=none)
    for reference, members, errors in zip(references, nbest, best.column("word_errors"), strict=True):
        every = score_corpus([reference] * len(members), members, normalize=none).column("word_errors")
        assert errors == every.min()


def test_select():
    scores = score_corpus(["a b", "c", "d"], ["a", "c", "x"], normalize=none, entities=[["q"], ["c"], ["z"]])
    part = scores.select([2, 0])
    assert part.references == ("d", "a b")
    assert part.value("wer") == pytest.approx(100 * 2 / 3)
    assert [(m.utterance, m.entity) for m in part.missing] == [(1, "q"), (0, "z")]
    assert scores.select([1]).value("entity_recall") == 100.0


def test_bad_input():
    with pytest.raises(ManifestError, match="no utterances"):
        score_corpus([], [], normalize=none)
    with pytest.raises(ManifestError, match="2 references but 1 hypotheses"):
        score_corpus(["a", "b"], ["a"], normalize=none)
    with pytest.raises(ManifestError, match="1 references but 2 terms"):
        score_corpus(["a"], ["a"], normalize=none, terms=[["a"], ["b"]])
    with pytest.raises(ManifestError, match="no hypotheses for utterance 1"):
        oracle(["a", "b"], [["a"], []], normalize=none)
    scores = score_corpus(["a"], ["a"], normalize=none)
    with pytest.raises(ConfigError, match=r"unknown metric 'wrr'.*wer, cer"):
        scores.value("wrr")
    other = score_corpus(["b"], ["a"], normalize=none)
    with pytest.raises(ManifestError, match="different references"):
        paired_difference(scores, other, "wer", samples=10, seed=0)


def test_every_metric_names_its_columns():
    assert {c for m in METRICS.values() for c in (m.numerator, m.denominator)} == set(COLUMNS)


def test_barista_entities_are_all_in_their_references():
    manifest = Path(__file__).parents[3] / "shared" / "data" / "barista" / "dev.json"
    if not manifest.exists():
        pytest.skip("the shared barista data is not beside this checkout")
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in rows]
    scores = score_corpus(texts, texts, normalize=basic, entities=[row["entities"] for row in rows])
    assert scores.missing == ()
    assert scores.column("entities").sum() >= sum(len(row["entities"]) for row in rows)
    assert scores.value("ewer") == 0.0
