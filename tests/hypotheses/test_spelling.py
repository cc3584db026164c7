"""The user's terms and labels in letters of the checkpoint: lists in any case, hyphens, accents, unknown labels."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from helpers.fits import config, label_reward
from helpers.tiny import write_manifest
from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

from nemo_llm_feedback.asr.heads import Vocabulary, heads_of
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.config import GuardConfig, ProposalConfig, read_terms
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.hypotheses.spelling import spelled, spelled_terms, unwritable, written_labels
from nemo_llm_feedback.hypotheses.term_swaps import swap_terms
from nemo_llm_feedback.llm.term_ranking import find_terms
from nemo_llm_feedback.rewards import build_reward
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics, text_drift, violations
from nemo_llm_feedback.training.models import restore

LOWER = Vocabulary(None, tuple(" abcdefghijklmnopqrstuvwxyz'"))
UPPER = Vocabulary(None, tuple(" ABCDEFGHIJKLMNOPQRSTUVWXYZ'"))
CASED = Vocabulary(None, tuple(" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,-"))


class _Pieces:
    """A tokenizer of characters whose first label is unknown, and is written ⁇."""

    def text_to_ids(self, text: str) -> list[int]:
        return [self.vocab.index(c) if c in self.vocab else 0 for c in text]

    def ids_to_text(self, ids: Sequence[int]) -> str:
        return "".join(self.vocab[i] if i else " ⁇ " for i in ids)

    vocab = ("<unk>", *" abcdefghijklmnopqrstuvwxyz")


PIECES = Vocabulary(_Pieces(), _Pieces.vocab)


def test_terms_are_spelled_in_the_checkpoints_letters() -> None:
    for text, lower, upper, cased in (
        ("CAPPUCCINO", "cappuccino", "CAPPUCCINO", "CAPPUCCINO"),
        ("Jean-Luc", "jean luc", "JEAN LUC", "Jean-Luc"),
        ("O’Brien", "o'brien", "O'BRIEN", "O Brien"),
        ("AT&T", "at t", "AT T", "AT T"),
        ("soy milk", "soy milk", "SOY MILK", "soy milk"),
        ("Covid-19", None, None, None),
        ("Cafe\u0301", None, None, None),
        ("İzmir", "izmir", None, "izmir"),
        ("!!", None, None, None),
    ):
        assert [spelled(text, v) for v in (LOWER, UPPER, CASED)] == [lower, upper, cased], text
    assert spelled("Bed room — two darken.", CASED) == "Bed room two darken."


def test_the_unknown_label_is_in_no_spelling() -> None:
    assert written_labels("C++", PIECES) == written_labels("c", PIECES)
    assert written_labels("b12", PIECES) is None
    assert 0 not in (written_labels("Jean-Luc", PIECES) or (0,))
    assert unwritable(["latte", "Covid-19", "Café", "latte"], PIECES) == ["Covid-19 (1 9)", "Café (é)"]


@pytest.mark.parametrize("form", [str.lower, str.title, str.upper, lambda text: text.replace(" ", "-")])
def test_a_list_in_any_form_proposes_the_same_swaps(form: Any) -> None:
    terms = ["cappuccino", "soy milk", "flat white"]
    plain = swap_terms("a capachineo with soymelk", spelled_terms(tuple(terms), LOWER), min_similarity=60, limit=8)
    listed = spelled_terms(tuple(map(form, terms)), LOWER)
    assert swap_terms("a capachineo with soymelk", listed, min_similarity=60, limit=8) == plain
    assert any("cappuccino" in text for text in plain)
    assert swap_terms("A CAPACHINEO", spelled_terms(("cappuccino",), UPPER), min_similarity=60, limit=8) == [
        "A CAPPUCCINO"
    ]


@pytest.mark.parametrize("form", [str.title, str.upper, lambda text: text.replace(" ", "-")])
@pytest.mark.parametrize("kind", ["ctc_char", "ctc_bpe"])
def test_a_list_in_any_form_gives_the_same_candidates(nemo_file: Any, kind: str, form: Any) -> None:
    """Boosting and swaps by a list in upper case reached 17 of 39 entities where the same in lower case reached 33."""
    model = restore(nemo_file(kind), map_location="cpu")
    proposer = Proposer(
        heads_of(model)[0], ProposalConfig(beam=2, boosted=4, term_swap=4, swap_similarity=20.0, boosting_weight=8.0)
    )
    torch.manual_seed(0)
    encoded, lengths = torch.randn(1, 16, 14), torch.tensor([14])
    terms = ("soy milk", "large mocha", "tea")
    with evaluation_mode(model):
        (plain,) = proposer.propose(encoded, lengths, [Context(terms=terms)])
        (other,) = proposer.propose(encoded, lengths, [Context(terms=tuple(map(form, terms)))])
    assert [c.labels for c in other] == [c.labels for c in plain]
    assert {"boosted", "term_swap"} & {c.source for c in plain}


def test_decoded_unknown_labels_are_left_out_of_candidates(nemo_file: Any) -> None:
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    head = heads_of(model)[0]
    unknown = head.vocabulary.labels.index("<unk>")
    proposer = Proposer(head, ProposalConfig(beam=2, boosted=0, term_swap=0))
    head.greedy = lambda *args, **kwargs: [(unknown, 5, unknown, 6)]  # type: ignore[method-assign]
    with evaluation_mode(model):
        ((greedy, *others),) = proposer.propose(torch.randn(1, 16, 6), torch.tensor([6]), [Context()])
    assert greedy.labels == (5, 6)
    assert all(unknown not in c.labels for c in others)


def test_terms_are_found_in_the_transcripts_form() -> None:
    found = find_terms("call jean luc o'brien at the cafe\u0301", ["Jean-Luc", "O’Brien", "Café"])
    assert [mention.term for mention in found] == ["Jean-Luc", "O’Brien", "Café"]
    from nemo_llm_feedback.core.types import Hypothesis

    members = tuple(Hypothesis(text, ()) for text in ("call jean luc now", "call john"))
    output = build_reward("entity_hits")([HypothesisGroup("u", members, Context(terms=("Jean-Luc",)))])
    assert output.values.tolist() == [[1.0, 0.0]]


def _setup(nemo_file: Any, tmp_path: Path, path: Path, kind: str = "ctc_char", **sections: Any) -> Any:
    model = restore(nemo_file(kind), map_location="cpu")
    model.setup_feedback(config(path, **sections), work_dir=tmp_path / "run", reward=label_reward)
    return model


@pytest.mark.parametrize("kind", ["ctc_char", "ctc_bpe"])
def test_labels_are_brought_into_the_checkpoints_letters_or_left_out(
    nemo_file: Any, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """NeMo made unknown labels of what it lacked, and the adapted model wrote ⁇."""
    path = write_manifest(tmp_path / "m.json", ["A Latte.", "soy – milk", "Room 101", None])
    logging.getLogger("nemo_logger").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, logger="nemo_logger"):
        model = _setup(nemo_file, tmp_path, path, kind)
    copy = Path(model.feedback_setup.staged.manifest_filepath)
    assert [json.loads(line)["text"] for line in copy.read_text().splitlines()] == ["a latte", "soy milk", ""]
    (lost,) = model.feedback_setup.staged.left_out["with text that the checkpoint cannot write"]
    assert "Room 101" in lost
    assert "'A Latte.' as 'a latte'" in caplog.text
    assert lost in caplog.text


def test_terms_that_cannot_be_written_are_named_once_before_the_first_step(
    nemo_file: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_manifest(tmp_path / "m.json", [None, None], context=[["Covid-19"], ["B12", "Covid-19"]])
    with caplog.at_level(logging.WARNING, logger="nemo_logger"):
        _setup(nemo_file, tmp_path, path, context={"terms": ["Café au lait", "Jean-Luc"]})
    (message,) = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
    assert "3 term(s)" in message
    assert all(part in message for part in ("Covid-19 (1 9)", "B12 (1 2)", "Café au lait (é)", "as they are spoken"))
    assert "Jean-Luc" not in message


def test_a_model_that_writes_the_unknown_sign_trips_a_guard() -> None:
    start, now = ["a latte", "tea"], ["a latte", "tea ⁇"]
    other = {"step": 1, "gain": 1.0, "kl": 0.0, "wer_rise": float("nan")}
    assert violations(HeldOutMetrics(**other, **text_drift(start, start)), GuardConfig()) == []
    (found,) = violations(
        HeldOutMetrics(**other, **text_drift(now, start)), GuardConfig(max_style_change=1, max_length_ratio=9)
    )
    assert "⁇" in found


def test_shared_cases(shared: Path) -> None:
    terms = read_terms(shared / "cases" / "04-term-spelling" / "terms.txt")
    assert spelled_terms(tuple(terms), LOWER) == ("cappuccino", "jean luc", "o'brien", "x ray", "at t")
    assert len(unwritable(terms, LOWER)) == 3
    lines = (shared / "cases" / "12-labels-in-another-style" / "manifest.json").read_text().splitlines()
    texts = [row["text"] for row in map(json.loads, lines) if row.get("text")]
    assert len(texts) == 20
    assert all(spelled(text, PIECES) not in (None, text) for text in texts)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bpe_over_spaces"])
def test_labels_word_by_word_are_those_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    """Swapped texts share their words, so a word is tokenized once; a label that spans a space forbids it."""
    rng = random.Random(3)
    words = ["".join(rng.choices("aeiou'lmnst", k=rng.randint(1, 7))) for _ in range(60)]
    lines = [" ".join(rng.choices(words, k=6)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=400 if "spaces" in kind else 120,
        model_type=kind.split("_")[0],
        split_by_whitespace="spaces" not in kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(str(tmp_path / "pieces.model"))
    vocabulary = Vocabulary(tokenizer, tuple(tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size)))))
    assert vocabulary.by_word == ("spaces" not in kind)
    whole = dataclasses.replace(vocabulary)
    vars(whole)["by_word"] = False
    strange = ["", " ", "tea\u3000time", "  sane  lion ", "ｌion", "a⁇b", "café", "x", "▁", "a▁b"]
    for text in [*strange, *(" ".join(rng.choices([*words, "q"], weights=[*[9] * 60, 9], k=5)) for _ in range(300))]:
        assert written_labels.__wrapped__(text, vocabulary) == written_labels.__wrapped__(text, whole), text
