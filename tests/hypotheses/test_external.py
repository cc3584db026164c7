"""Other recognisers' transcripts as members: their form, their readings, their sources."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_llm_feedback.asr.heads import Vocabulary, heads_of
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.text import basic, none
from nemo_llm_feedback.core.types import Audio, Context, ExternalText
from nemo_llm_feedback.hypotheses.external import ExternalTexts, readings
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.proposals import Candidate, Proposer, distinct
from nemo_llm_feedback.training.models import restore

LETTERS = tuple(" abcdefghijklmnopqrstuvwxyz'")


def _texts(vocabulary: Vocabulary, *given: ExternalText | str, normalize: Any = basic, **config: Any) -> list[Any]:
    """What becomes of the given texts: (text, source)."""
    maker = ExternalTexts(vocabulary, normalize, ProposalConfig(**config))
    listed = [text if isinstance(text, ExternalText) else ExternalText(text) for text in given]
    return [(vocabulary.ids_to_text(labels), source) for labels, source in maker.labels(listed, frames=99)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1200", ["one thousand two hundred", "twelve hundred", "one two zero zero"]),
        ("the 2nd", ["the second"]),
        ("$3.50", ["three dollars fifty cents", "three dollars and fifty cents", "three fifty"]),
        ("$3", ["three dollars"]),
        ("10:30", ["ten thirty"]),
        ("10:05", ["ten oh five", "ten five"]),
        ("10:00", ["ten", "ten o'clock"]),
        ("3.5", ["three point five"]),
        ("105", ["one hundred and five", "one hundred five", "one zero five"]),
        ("007", ["zero zero seven", "oh oh seven"]),
        ("5551234", ["five five five one two three four"]),
        ("1,200.", ["one thousand two hundred.", "twelve hundred."]),
        ("50% off", ["fifty percent off"]),
        ("a 16-ounce latte, 20L", ["a sixteen ounce latte, twenty L"]),
        ("10-12", ["ten twelve"]),
        ("no number", ["no number"]),
    ],
)
def test_numbers_are_read_as_people_read_them(text: str, expected: list[str]) -> None:
    assert readings(text) == expected


def test_all_numbers_of_a_text_are_read_in_one_manner_and_the_readings_are_few() -> None:
    found = readings("1999, 1200, 105 and 8")
    assert len(found) == 4
    assert found[0] == (
        "one thousand nine hundred and ninety nine, one thousand two hundred, one hundred and five and eight"
    )
    assert "nineteen ninety nine, one two zero zero, one zero five and eight" in found
    assert len(readings(" ".join(["1999"] * 50))) == 4


def test_numbers_are_read_in_the_language_of_the_run_and_what_it_cannot_read_stays() -> None:
    assert readings("1200", "de") == ["eintausendzweihundert", "zwölfhundert", "eins zwei null null"]
    assert readings("$3.50", "ja") == ["$3.50"]
    huge = ",".join(["123"] * 200)
    assert readings(huge) == [huge]


def test_a_text_comes_into_the_checkpoints_letters_with_numbers_as_words() -> None:
    small, digits = Vocabulary(None, LETTERS), Vocabulary(None, (*LETTERS, *"0123456789"))
    assert _texts(small, "Two Café-Lattes, 12 ounces!") == [("two cafe lattes twelve ounces", "external")]
    assert _texts(digits, "12 Ounces") == [("12 ounces", "external")]
    assert [text for text, _ in _texts(small, "1200")] == readings("1200"), "every reading is a member"


def test_a_checkpoint_that_writes_case_is_offered_the_text_as_it_is_and_normalised() -> None:
    cased = Vocabulary(None, (*LETTERS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ.,"))
    assert _texts(cased, "A latte, please.") == [("A latte, please.", "external"), ("a latte please", "external")]
    assert _texts(cased, "A latte, please.", normalize=none) == [("A latte, please.", "external")]


def test_what_the_checkpoint_cannot_write_is_named_once() -> None:
    texts = [ExternalText(t) for t in ("кофе", "tea", "кофе", "茶 please", "12 teas")]
    maker = ExternalTexts(Vocabulary(None, LETTERS), basic, ProposalConfig())
    head, *lines = maker.fault(texts).splitlines()
    assert head.startswith("3 of 5 texts under `hypotheses` are left out")
    assert [line.strip() for line in lines] == ["кофе (к о ф е)", "茶 please (茶)"]
    assert maker.fault(texts[1:2]) == ""
    assert _texts(Vocabulary(None, LETTERS), *texts) == [("tea", "external"), ("twelve teas", "external")]


def test_many_texts_are_bounded_per_source_and_in_all_and_each_sources_best_comes_first() -> None:
    vocabulary = Vocabulary(None, LETTERS)
    many = [ExternalText(f"{a}{b}", source) for source in ("one", "two") for a in "abc" for b in "defgh"]
    found = _texts(vocabulary, *many, external=2)
    assert found == [("ad", "one"), ("ad", "two"), ("ae", "one"), ("ae", "two")]
    assert len(_texts(vocabulary, *many, external=50, max_members=10)) == 5
    assert _texts(vocabulary, *many, external=0) == []


def test_a_text_that_no_decoder_could_write_in_the_time_is_left_out() -> None:
    maker = ExternalTexts(Vocabulary(None, LETTERS), basic, ProposalConfig(max_symbols=2))
    assert maker.labels([ExternalText("abcd")], frames=2)
    assert not maker.labels([ExternalText("abcde")], frames=2)


def test_a_label_sequence_that_several_propose_keeps_all_their_names() -> None:
    row = [Candidate((1,), "greedy"), Candidate((2,), "whisper"), Candidate((1,), "whisper"), Candidate((2,), "beam")]
    found = distinct([*distinct(row), Candidate((1,), "beam")])
    assert [(c.labels, c.source, c.also) for c in found] == [
        ((1,), "greedy", ("whisper", "beam")),
        ((2,), "whisper", ("beam",)),
    ]


class _Reference:
    def __init__(self, head: Any, encoded: Any) -> None:
        self.heads, self._encoded = [head], encoded

    def encode(self, signal: Any, signal_len: Any) -> Any:
        return self._encoded


def _make(nemo_file: Any, kind: str, external: Any, **config: Any) -> NBestBatch:
    model = restore(nemo_file(kind), map_location="cpu")
    head = heads_of(model)[0]
    torch.manual_seed(0)
    encoded = torch.randn(2, 16, 20), torch.tensor([20, 15])
    if external == "greedy":
        with evaluation_mode(model), torch.no_grad():
            texts = [head.vocabulary.ids_to_text(y) for y in head.greedy(*encoded, max_symbols=10)]
        external = [[ExternalText(text.upper() + "!", "cloud")] for text in texts]
    proposer = Proposer(head, ProposalConfig(**{"beam": 3, "boosted": 0, "term_swap": 0, **config}))
    maker = NBestMaker(proposer, _Reference(head, encoded), normalize=basic)
    audio = Audio(
        torch.zeros(2, 1), torch.ones(2), ("a", "b"), (Context(), Context()), tuple(tuple(row) for row in external)
    )
    with evaluation_mode(model):
        return maker.make(audio, *encoded)


@pytest.mark.parametrize("kind", ["ctc_char", "rnnt_bpe", "tdt_char", "hybrid_bpe"])
def test_external_texts_are_members_under_their_sources_names(kind: str, nemo_file: Any) -> None:
    nbest = _make(nemo_file, kind, [[ExternalText("1 tea", "cloud"), ExternalText("a latte", "whisper")], []])
    texts = dict(zip(nbest.texts[0], nbest.sources[0], strict=True))
    assert texts["one tea"] == ("cloud",)
    assert texts["a latte"] == ("whisper",)
    assert nbest.hypotheses[0][0].source == "greedy"
    assert nbest.hypotheses[0][1].source == "cloud", "behind greedy, so that max_members does not cut it"
    assert not {"cloud", "whisper"} & {name for names in nbest.sources[1] for name in names}
    assert nbest.supplied_by("cloud").sum() == 1
    assert torch.isfinite(next(iter(nbest.ref_logp.values()))[0, : nbest.sizes[0]]).all()
    assert NBestBatch.from_plain(nbest.to_plain()).hypotheses == nbest.hypotheses


def test_a_member_that_beam_and_another_recogniser_propose_is_one_and_has_both_names(nemo_file: Any) -> None:
    with_cloud, without = _make(nemo_file, "ctc_char", "greedy"), _make(nemo_file, "ctc_char", [[], []])
    assert with_cloud.texts == without.texts
    for row in with_cloud.hypotheses:
        assert row[0].source == "greedy"
        assert "cloud" in row[0].sources
    assert with_cloud.supplied_by("cloud").sum() == 2


def test_groups_of_samples_alone_take_no_external_text(nemo_file: Any) -> None:
    texts = [[ExternalText("a latte", "cloud")]] * 2
    nbest = _make(nemo_file, "rnnt_bpe", texts, beam=0, samples=4)
    assert {name for row in nbest.sources for names in row for name in names} == {"samples"}
    mixed = _make(nemo_file, "rnnt_bpe", texts, beam=2, samples=4)
    assert mixed.supplied_by("cloud").any(dim=1).all()


def test_audio_keeps_each_utterances_external_texts_when_rows_are_selected() -> None:
    texts = tuple((ExternalText(t),) for t in "abc")
    audio = Audio(torch.zeros(3, 1), torch.ones(3), ("a", "b", "c"), (Context(),) * 3, texts)
    assert audio.select([2, 0]).external == (texts[2], texts[0])
    assert Audio(torch.zeros(3, 1), torch.ones(3), ("a", "b", "c"), (Context(),) * 3).select([1]).external == ()
