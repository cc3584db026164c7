"""Sources of hypotheses: exact samples, term swaps, boosted beams, which candidates become members."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo.collections.asr.modules.rnnt import RNNTJoint, StatelessTransducerDecoder

from nemo_llm_feedback.asr.heads import CTCHead, TransducerHead, Vocabulary, heads_of
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.asr.sampling import sample_transducer
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.hypotheses.proposals import Candidate, Proposer, build_members
from nemo_llm_feedback.hypotheses.term_swaps import swap_terms
from nemo_llm_feedback.training.models import restore


def _log_prob(head: Any, encoded: torch.Tensor, lengths: torch.Tensor, labels: list[list[int]]) -> list[float]:
    trie = PrefixTrie.build(labels, [0] * len(labels))
    return head.log_prob(encoded, lengths, trie).tolist()


@pytest.mark.parametrize("kind", ["ctc_char", "rnnt_char", "tdt_char"])
def test_samples_have_the_frequencies_of_the_exact_likelihood(kind: str, nemo_file: Any) -> None:
    """Sampler and likelihood are written apart; the relative frequency of every common text must agree to 4 SE."""
    model = restore(nemo_file(kind), map_location="cpu")
    head, count = heads_of(model)[0], 4000
    torch.manual_seed(0)
    frames = 3 if kind.startswith("tdt") else 1
    encoded, lengths = torch.randn(1, 16, frames), torch.tensor([frames])
    with torch.no_grad(), evaluation_mode(model):
        (drawn,) = head.sample(encoded, lengths, size=count, generator=torch.Generator().manual_seed(1))
        counts = Counter(drawn)
        common = [labels for labels, n in counts.most_common(8) if n >= 25]
        logp = _log_prob(head, encoded, lengths, [list(y) for y in common])
        # A TDT's incomplete paths are drawn again, so frequencies are relative to the complete mass.
        mass = 1.0
        if kind.startswith("tdt"):
            short = [list(y) for n in range(3) for y in itertools.product(range(head.vocabulary.vocab_size), repeat=n)]
            mass = sum(math.exp(v) for v in _log_prob(head, encoded, lengths, short))
    assert len(common) >= 3
    count = len(drawn)
    for labels, value in zip(common, logp, strict=True):
        p = math.exp(value) / mass
        # Longer texts are left out of `mass`; they add at most a little to it.
        slack = 0.03 if kind.startswith("tdt") else 0.0
        assert counts[labels] / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count) + slack * p), labels


@pytest.mark.parametrize("context", [2, 3])
def test_samples_of_a_stateless_network_have_the_frequencies_of_the_exact_likelihood(context: int) -> None:
    """A row that had emitted nothing got label 0 for its history as soon as another row had emitted one."""
    torch.manual_seed(0)
    decoder = StatelessTransducerDecoder({"pred_hidden": 16, "dropout": 0.0}, vocab_size=2, context_size=context)
    net = {"encoder_hidden": 8, "pred_hidden": 16, "joint_hidden": 16, "activation": "tanh"}
    joint = RNNTJoint(net, num_classes=2, vocabulary=["a", "b"])
    for parameter in (*decoder.parameters(), *joint.parameters()):
        parameter.data.mul_(3.0)
    joint.joint_net[-1].bias.data[-1] += 1.5
    encoded, lengths, count = torch.randn(1, 3, 8), torch.tensor([3]), 4000
    head = TransducerHead(decoder.eval(), joint.eval(), Vocabulary(None, ("a", "b")))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        (drawn,) = sample_transducer(encoded, lengths, decoder, joint, size=count, generator=generator)
        common = [labels for labels, _ in Counter(drawn).most_common(6)]
        (logp,) = head.score(encoded.transpose(1, 2), lengths, [common]).tolist()
    for labels, value in zip(common, logp, strict=True):
        p = math.exp(value)
        assert drawn.count(labels) / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count)), labels


def test_swaps_replace_the_span_that_looks_like_the_term() -> None:
    terms = ["cappuccino", "soy milk", "large"]
    found = swap_terms("can i get a cap a chino with soymelk", terms, min_similarity=65, limit=8)
    assert "can i get a cappuccino with soymelk" in found
    assert "can i get a cap a chino with soy milk" in found
    assert all("large" not in text for text in found)
    assert swap_terms("a soy milk", ["soy milk"], min_similarity=50, limit=8) == []
    assert swap_terms("", terms, min_similarity=50, limit=8) == swap_terms("a", [], min_similarity=50, limit=8) == []
    assert len(swap_terms("can i get a cap a chino with soymelk", terms, min_similarity=1, limit=2)) == 2


def test_members_are_distinct_after_normalisation_and_the_better_spelling_is_kept() -> None:
    vocabulary = Vocabulary(None, tuple("abAB ."))
    ids = {text: tuple(vocabulary.labels.index(c) for c in text) for text in ("ab", "AB.", "ba", "b")}
    texts = ("ab", "AB.", "ba", "b")

    def normalize(text: str) -> str:
        return text.lower().strip(".")

    def members(scores: list[float], **kwargs: Any) -> list[int]:
        settings = {"vocabulary": vocabulary, "normalize": normalize, "max_members": 9, "distinct": True} | kwargs
        candidates = [Candidate(ids[t], "beam", logp=logp) for t, logp in zip(texts, scores, strict=True)]
        return [[c.labels for c in candidates].index(c.labels) for c in build_members(candidates, **settings)]

    assert members([-2.0, -1.0, -3.0, -4.0]) == [1, 2, 3]
    assert members([-1.0, -2.0, -3.0, -4.0]) == [0, 2, 3]
    assert members([-1.0, -2.0, float("-inf"), -4.0]) == [0, 3]
    assert members([-1.0, -2.0, -3.0, -4.0], max_members=2) == [0, 2]
    assert members([-1.0, -2.0, -3.0, -4.0], distinct=False) == [0, 1, 2, 3]
    assert members([float("-inf")] * 4) == [0]


@pytest.mark.parametrize(("scores", "kept"), [([-2.0, -1.0], "AB"), ([-1.0, -2.0], "ab")])
def test_a_member_has_the_sources_of_all_its_spellings_the_first_first(scores: list[float], kept: str) -> None:
    vocabulary = Vocabulary(None, tuple("abAB"))
    labels = {text: tuple(vocabulary.labels.index(c) for c in text) for text in ("ab", "AB")}
    sources = {"ab": ("greedy", ("beam",)), "AB": ("cloud", ("beam", "boosted"))}
    candidates = [
        Candidate(labels[text], source, also, logp=logp)
        for (text, (source, also)), logp in zip(sources.items(), scores, strict=True)
    ]
    (found,) = build_members(candidates, vocabulary=vocabulary, normalize=str.lower, max_members=9, distinct=True)
    assert (found.labels, found.source, found.also) == (labels[kept], "greedy", ("beam", "cloud", "boosted"))


def test_a_group_does_not_depend_on_its_batch(nemo_file: Any) -> None:
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    head = heads_of(model)[0]
    proposer = Proposer(head, ProposalConfig(beam=4, boosted=4, term_swap=2))
    torch.manual_seed(2)
    encoded, lengths = torch.randn(3, 16, 12), torch.tensor([12, 7, 9])
    contexts = [Context(terms=("soy latte",)), Context(terms=("mocha", "tea")), Context()]
    with evaluation_mode(model):
        together = proposer.propose(encoded, lengths, contexts)
        for b in range(3):
            n = int(lengths[b])
            (alone,) = proposer.propose(encoded[b : b + 1, :, :n], lengths[b : b + 1], contexts[b : b + 1])
            assert {c.labels for c in alone} == {c.labels for c in together[b]}
    assert together[2]
    assert not any(c.source in ("boosted", "term_swap") for c in together[2])
    assert all(row[0].source == "greedy" for row in together)


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "tdt_bpe"])
def test_lists_that_differ_cost_one_beam_and_all_candidates_one_scoring(
    kind: str, nemo_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = restore(nemo_file(kind), map_location="cpu")
    head = heads_of(model)[0]
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        function = getattr(type(head), name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(self, *args, **kwargs)

        return counted

    for name in ("beam", "score"):
        monkeypatch.setattr(type(head), name, counting(name))
    torch.manual_seed(2)
    encoded, lengths = torch.randn(3, 16, 12), torch.tensor([12, 7, 9])
    contexts = [Context(terms=terms) for terms in (("soy latte",), ("mocha", "tea"), ("large",))]
    with evaluation_mode(model):
        proposer = Proposer(head, ProposalConfig(beam=0, boosted=4, term_swap=2, swap_similarity=1))
        together = proposer.propose(encoded, lengths, contexts)
        assert calls == {"beam": 1, "score": 1}
        exact = head.score(encoded, lengths, [[c.labels for c in row] for row in together])
    assert kind == "tdt_bpe" or any(c.source == "term_swap" for row in together for c in row)
    for row, logp in zip(together, exact.tolist(), strict=True):
        assert [c.logp for c in row] == pytest.approx(logp[: len(row)], abs=1e-4)
    swaps = [[c.logp for c in row if c.source == "term_swap"] for row in together]
    assert all(len(row) <= 4 for row in swaps)


def test_swaps_keep_the_punctuation_around_and_never_change_it_alone() -> None:
    assert swap_terms("A cap a chino, please.", ["cappuccino"], min_similarity=60, limit=8) == [
        "A cappuccino, please."
    ]
    assert swap_terms("a Soy-Milk, please", ["soy milk"], min_similarity=60, limit=8) == []
    assert swap_terms("A LATTE?", ["latte", "a latte"], min_similarity=60, limit=8) == []
    assert "a soy milk, please" in swap_terms("a soymilk, please", ["soy milk"], min_similarity=60, limit=8)


def test_boosting_and_swaps_bring_the_terms_in(nemo_file: Any) -> None:
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    head = heads_of(model)[0]
    torch.manual_seed(0)
    encoded, lengths = torch.randn(1, 16, 14), torch.tensor([14])
    with evaluation_mode(model):
        plain = Proposer(head, ProposalConfig(beam=4, boosted=0, term_swap=0))
        greedy = head.vocabulary.ids_to_text(plain.propose(encoded, lengths, [Context()])[0][0].labels)
        term = greedy.split()[0][:-2] + "qz"
        boosted = Proposer(head, ProposalConfig(beam=4, boosted=4, term_swap=4, boosting_weight=20))
        (without,) = plain.propose(encoded, lengths, [Context(terms=(term,))])
        (with_terms,) = boosted.propose(encoded, lengths, [Context(terms=(term,))])

    def texts(row: list[Candidate], source: str) -> list[str]:
        return [head.vocabulary.ids_to_text(c.labels) for c in row if c.source == source]

    assert not any(term in t for t in texts(without, "beam"))
    assert any(term in t for t in texts(with_terms, "boosted"))
    assert all(term in t for t in texts(with_terms, "term_swap"))
    assert texts(with_terms, "term_swap")


@pytest.mark.parametrize("kind", ["ctc_char", "ctc_bpe"])
def test_term_swaps_that_the_vocabulary_cannot_write_are_not_proposed(kind: str, nemo_file: Any) -> None:
    """They skipped the check, and a swap came out without the letters that the vocabulary lacks."""
    model = restore(nemo_file(kind), map_location="cpu")
    head = heads_of(model)[0]
    torch.manual_seed(0)
    encoded, lengths = torch.randn(1, 16, 14), torch.tensor([14])
    proposer = Proposer(head, ProposalConfig(beam=4, boosted=0, term_swap=4, swap_similarity=20.0))
    with evaluation_mode(model):
        ((greedy, *_),) = proposer.propose(encoded, lengths, [Context()])
        word = max(head.vocabulary.ids_to_text(greedy.labels).split(), key=len)
        (written,) = proposer.propose(encoded, lengths, [Context(terms=(word[:-1] + "tea",))])
        (lacking,) = proposer.propose(encoded, lengths, [Context(terms=(word[:-1] + "çéñ",))])
    assert any(c.source == "term_swap" for c in written)
    assert swap_terms(word, [word[:-1] + "çéñ"], min_similarity=20, limit=8), "the case shows nothing"
    assert not any(c.source == "term_swap" for c in lacking)


def test_sampled_groups_keep_multiplicity_and_no_greedy(nemo_file: Any) -> None:
    model = restore(nemo_file("rnnt_bpe"), map_location="cpu")
    config, encoded = ProposalConfig(beam=0, boosted=0, term_swap=0, samples=12), torch.randn(1, 16, 2)
    proposer = Proposer(heads_of(model)[0], config, copies=True)
    assert proposer.sampled_only
    with evaluation_mode(model):
        (row,) = proposer.propose(encoded, torch.tensor([2]), [Context()])
        (once,) = Proposer(heads_of(model)[0], config).propose(encoded, torch.tensor([2]), [Context()])
    assert [c.source for c in row] == ["samples"] * 12
    # To an objective over distinct members a copy would be a member more that pulls at the same text.
    assert [c.labels for c in once] == list(dict.fromkeys(c.labels for c in row))
    head: Any = SimpleNamespace(
        vocabulary=heads_of(model)[0].vocabulary,
        sample=lambda *args, **kwargs: [[(5,), (6,), (5,)]],
        score=lambda encoded, lengths, labels: torch.zeros(1, len(labels[0])),
    )
    for copies, number in ((True, 3), (False, 2)):
        (row,) = Proposer(head, config, copies=copies).propose(encoded, torch.tensor([2]), [Context()])
        assert len(row) == number


def test_beam_scores_of_padded_rows_are_those_of_single_rows() -> None:
    """NeMo's beam_batch reads padding as audio; CTCHead makes it neutral."""

    class Fixed:
        def __call__(self, encoder_output: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(encoder_output.transpose(1, 2), dim=-1)

    head = CTCHead(Fixed(), Vocabulary(None, tuple("abcd")))
    torch.manual_seed(1)
    encoded, lengths = torch.randn(2, 5, 9) * 2, torch.tensor([9, 4])
    together = head.beam(encoded, lengths, size=4, max_symbols=5)
    alone = head.beam(encoded[1:, :, :4], lengths[1:], size=4, max_symbols=5)
    assert together[1] == alone[0]


def test_packaged_configurations_are_found(tmp_path: Path) -> None:
    """What a wheel holds: `setup.py build_py` puts conf/ into the package, and conf_dir finds it there."""
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    build = ["setup.py", "-q", "build_py", "--build-lib", str(tmp_path), "egg_info", "-e", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=root, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "nemo_llm_feedback" / "conf" / "adapt.yaml").is_file()
    assert (tmp_path / "nemo_llm_feedback" / "conf" / "objective" / "mwer.yaml").is_file()
    assert (tmp_path / "nemo_llm_feedback" / "llm" / "templates" / "score_chat.txt").is_file()
    code = "from nemo_llm_feedback.core.config.compose import conf_dir; print(conf_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()) == tmp_path / "nemo_llm_feedback" / "conf"


def test_an_utterance_whose_samples_never_end_has_its_greedy_text(nemo_file: Any) -> None:
    model = restore(nemo_file("tdt_char"), map_location="cpu").eval()
    proposer = Proposer(heads_of(model)[0], ProposalConfig(beam=0, boosted=0, term_swap=0, samples=3, max_symbols=3))
    encoded, lengths = torch.randn(2, 16, 6), torch.tensor([6, 4])
    proposer._head.sample = lambda encoded, *args, **kwargs: [[(0,)], []]  # type: ignore[method-assign]
    first, second = proposer.propose(encoded, lengths, [Context(), Context()])
    assert [candidate.source for candidate in first] == ["samples"]
    assert [candidate.source for candidate in second] == ["greedy"]
