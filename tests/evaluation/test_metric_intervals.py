"""Bootstrap intervals and paired differences."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from nemo_llm_feedback.core.text import none
from nemo_llm_feedback.evaluation.metrics import COLUMNS, CorpusScores, bootstrap, paired_difference, score_corpus


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


def random_corpus(seed: int, size: int, rate: float) -> CorpusScores:
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(30)]
    shared = random.Random(99)
    refs = [[shared.choice(vocabulary) for _ in range(shared.randint(3, 12))] for _ in range(size)]
    hyps = [noisy(rng, ref, vocabulary, rate) for ref in refs]
    return score_corpus([" ".join(r) for r in refs], [" ".join(h) for h in hyps], normalize=none)


def test_bootstrap_against_a_plain_loop():
    scores = random_corpus(0, 40, 0.3)
    got = bootstrap(scores, "wer", samples=4000, seed=0)
    rng = random.Random(5)
    errors, words = scores.column("word_errors").tolist(), scores.column("words").tolist()
    values = []
    for _ in range(4000):
        rows = [rng.randrange(40) for _ in range(40)]
        values.append(100 * sum(errors[i] for i in rows) / sum(words[i] for i in rows))
    low, high = np.quantile(values, (0.025, 0.975))
    assert got.value == pytest.approx(scores.value("wer"))
    assert got.low == pytest.approx(low, abs=0.6)
    assert got.high == pytest.approx(high, abs=0.6)
    assert got.low < got.value < got.high


def test_bootstrap_is_deterministic_and_independent_of_the_block_size():
    scores = random_corpus(0, 30, 0.3)
    assert bootstrap(scores, "wer", samples=300, seed=7) == bootstrap(scores, "wer", samples=300, seed=7)
    assert bootstrap(scores, "wer", samples=300, seed=7) != bootstrap(scores, "wer", samples=300, seed=8)


def test_bootstrap_covers_the_truth():
    """Of 200 corpora of 60 utterances with a true error rate of 30 %, about 95 % of the intervals contain it."""
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        matrix = np.zeros((60, len(COLUMNS)), dtype=np.int64)
        matrix[:, COLUMNS.index("words")] = 10
        matrix[:, COLUMNS.index("word_errors")] = rng.binomial(10, 0.3, size=60)
        scores = CorpusScores(tuple(map(str, range(60))), ("",) * 60, matrix)
        interval = bootstrap(scores, "wer", samples=400, seed=trial)
        inside += interval.low <= 30.0 <= interval.high
    assert 180 <= inside <= 199


def test_undefined_metrics_are_nan():
    scores = score_corpus(["a", ""], ["a", "b"], normalize=none)
    for metric in ("ewer", "entity_recall", "false_alarms", "b_wer"):
        interval = bootstrap(scores, metric, samples=50, seed=0)
        assert all(math.isnan(x) for x in (interval.value, interval.low, interval.high)), metric
        difference = paired_difference(scores, scores, metric, samples=50, seed=0)
        assert math.isnan(difference.value)
        assert math.isnan(difference.p_value)
    # resamples that hold only the empty reference are left out
    assert bootstrap(scores, "wer", samples=50, seed=0).high < math.inf


def test_paired_difference():
    good, bad = random_corpus(1, 80, 0.1), random_corpus(2, 80, 0.4)
    result = paired_difference(good, bad, "wer", samples=2000, seed=0)
    assert result.value == pytest.approx(good.value("wer") - bad.value("wer"))
    assert result.low < result.value < result.high < 0
    assert result.p_value == pytest.approx(2 / 2001)
    mirrored = paired_difference(bad, good, "wer", samples=2000, seed=0)
    assert (mirrored.value, mirrored.low) == (pytest.approx(-result.value), pytest.approx(-result.high))
    assert mirrored.p_value == result.p_value


def test_paired_difference_uses_the_pairing():
    """Equal errors in every utterance but one: the paired interval is far narrower than those of the systems."""
    base = random_corpus(1, 80, 0.3)
    matrix = base.counts.copy()
    matrix[0, COLUMNS.index("word_errors")] += 1
    other = CorpusScores(base.references, base.hypotheses, matrix)
    result = paired_difference(other, base, "wer", samples=1000, seed=0)
    alone = bootstrap(base, "wer", samples=1000, seed=0)
    assert result.high - result.low < (alone.high - alone.low) / 5
    assert result.p_value > 0.3


def test_few_utterances_prove_nothing():
    """All resamples of one utterance agree, which is no evidence; the exact test by signs has 2^(1−k) at best."""
    for differing in (1, 3, 4, 8):
        references = ["a b c d"] * 100
        worse = ["a x c d"] * differing + references[differing:]
        bad = score_corpus(references, worse, normalize=none)
        good = score_corpus(references, references, normalize=none)
        result = paired_difference(good, bad, "wer", samples=2000, seed=0)
        assert result.p_value >= 2.0 ** (1 - differing)
    assert result.p_value < 0.05


def test_equal_systems_have_p_one():
    scores = random_corpus(1, 20, 0.3)
    result = paired_difference(scores, scores, "wer", samples=200, seed=0)
    assert (result.value, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_p_values_are_uniform_under_no_difference():
    small = 0
    for trial in range(60):
        a, b = random_corpus(2 * trial, 30, 0.3), random_corpus(2 * trial + 1, 30, 0.3)
        small += paired_difference(a, b, "wer", samples=300, seed=trial).p_value < 0.2
    assert 3 <= small <= 24  # 12 expected
