"""The LLM's corrections: greedy answers, which of them are usable, and how they become members of groups."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import write_manifest
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig, parse_run_config
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.llm import load_llm
from nemo_llm_feedback.llm.generation import Corrector
from nemo_llm_feedback.llm.prompts import Template, read_template
from nemo_llm_feedback.llm.view import LLMView
from nemo_llm_feedback.rewards import corrector_from_config, reward_from_config

CONTEXT = Context("an order", ("latte", "oat milk"))
NBEST = ["a large lattey", "a lard latte", "a large latte please"]


def corrector(llm: Any) -> Corrector:
    template = read_template(None, chat=llm.encoder.chat, use="correction")
    return Corrector(llm, template=template, view=LLMView(200))


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A chat LLM that was taught to answer ``a large latte`` to one list and nothing else to another."""
    folder = make_tiny_llm(tmp_path_factory.mktemp("writer"), chat=True, max_position_embeddings=2048)
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "max_length": 4}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    llm = load_llm(LLMConfig(str(folder), quantization="none", device="cpu"))
    ours = corrector(llm)
    lessons = [
        (*ours._prompt(CONTEXT, NBEST), *llm.encoder.encode_text("a large latte")),
        (*ours._prompt(CONTEXT, ["nothing"]), llm.encoder.end_id),
    ]
    model = llm.model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        losses = [model(torch.tensor([ids]), labels=_answer_only(llm, ids)).loss for ids in lessons]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    model.requires_grad_(False)
    assert max(map(float, losses)) < 0.1
    return llm


def _answer_only(llm: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """Labels in which only what follows the begin of the assistant's turn counts."""
    turn = llm.encoder.ids("<|im_start|>assistant\n")
    start = max(n for n in range(len(ids)) if ids[n - len(turn) : n] == turn)
    return torch.tensor([[-100] * start + list(ids[start:])])


def greedy(llm: Any, ids: tuple[int, ...], limit: int) -> list[int]:
    """Greedy generation by plain forwards."""
    out: list[int] = []
    with torch.no_grad():
        while len(out) < limit and (not out or out[-1] != llm.encoder.end_id):
            out.append(int(llm.model(torch.tensor([[*ids, *out]])).logits[0, -1].argmax()))
    return out


def test_the_answer_is_greedy_whatever_the_checkpoints_settings(writer):
    ours = corrector(writer)
    state = torch.get_rng_state()
    assert ours([CONTEXT], [NBEST]) == ["a large latte"]
    assert torch.equal(torch.get_rng_state(), state)
    assert writer.model.generation_config.do_sample  # put back
    ids = greedy(writer, ours._prompt(CONTEXT, NBEST), 40)
    assert writer.encoder.decode(ids) == "a large latte"


def test_batches_answer_as_single_questions_and_equal_ones_are_asked_once(writer, monkeypatch):
    lists = [NBEST, ["nothing"], [*NBEST[:2], NBEST[0]], ["", " "], NBEST]
    ours = corrector(writer)
    together = ours([CONTEXT] * 5, lists)
    assert together[0] == together[4] == "a large latte"
    assert together[1] is None  # the empty answer
    assert together[3] is None  # nothing to correct: not asked
    assert (ours.num_asked, ours.num_unusable) == (3, sum(text is None for text in together[1:3]))
    assert [corrector(writer)([CONTEXT], [texts])[0] for texts in lists] == together
    monkeypatch.setattr(ours, "_generate", None)
    assert ours([CONTEXT] * 5, lists) == together


def test_out_of_memory_halves_the_batch(writer, monkeypatch):
    ours = corrector(writer)
    generate, sizes = ours._generate, []

    def scarce(questions):
        sizes.append(len(questions))
        if len(questions) > 1:
            raise torch.OutOfMemoryError
        return generate(questions)

    monkeypatch.setattr(ours, "_generate", scarce)
    assert ours([CONTEXT] * 2, [NBEST, ["nothing"]]) == ["a large latte", None]
    assert sizes == [2, 1, 1]


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("a latte", True, "a latte"),
        (" “a latte” \n", True, "a latte"),
        ("o'clock'", True, "o'clock'"),
        ("a latte", False, None),
        ("Here it is:\na latte", True, None),
        ("", True, None),
        ("a latte " * 30, True, None),
        ("<|im_start|>a latte", True, "a latte"),
    ],
)
def test_what_is_usable(writer, text, end, expected):
    encoder = writer.encoder
    ids = [*encoder.ids(text), *([encoder.end_id, 5, 6] if end else [])]
    assert corrector(writer)._usable(ids, [encoder.end_id], 40) == expected


def test_a_base_llms_answer_is_its_first_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        llm = load_llm(LLMConfig(str(make_tiny_llm(tmp_path)), quantization="none", device="cpu"))
        ours = corrector(llm)
    assert "no chat template" in caplog.text
    assert ours._usable(llm.encoder.ids(" a latte\nterms that"), [1], 40) == "a latte"
    assert ours._usable(llm.encoder.ids(" a latte"), [1], 40) is None
    answer = ours([CONTEXT], [NBEST])[0]
    limit = 2 * max(len(llm.encoder.encode_text(text)) for text in NBEST) + 16
    plain = llm.encoder.decode(greedy(llm, ours._prompt(CONTEXT, NBEST), limit)).strip()
    assert answer is None or plain.startswith(answer)


def test_questions_that_do_not_fit_have_no_answer_and_contexts_are_cut(writer):
    ours = corrector(writer)
    long = Context("an order", tuple(f"latte number {n}" for n in range(2000)))
    assert len(ours._prompt(long, NBEST)) <= writer.encoder.max_tokens
    short = writer.encoder.decode(ours._prompt(long, NBEST))
    assert all(text in short for text in NBEST)
    assert ours([CONTEXT], [["latte " * 900]]) == [None]


def test_answers_unlike_every_listed_text_are_dropped(writer, monkeypatch):
    ours = corrector(writer)
    written = ["I am sorry, I cannot help with that.", "A large latte, with soy", "我要拿铁"]
    monkeypatch.setattr(ours, "_generate", lambda questions: [written.pop(0) for _ in questions])
    answers = [ours([CONTEXT], [texts])[0] for texts in (NBEST, ["a lard latte with soil"], ["我要那铁"])]
    assert answers == [None, "A large latte, with soy", "我要拿铁"]
    assert (ours.num_asked, ours.num_unusable) == (3, 1)


def test_identity_changes_with_what_the_answer_depends_on(writer):
    ours = corrector(writer)
    other = Corrector(writer, template=ours._template, view=LLMView(200, "sentence"))
    question = Template("{hypotheses}\nWhat was said:", "correction")
    third = Corrector(writer, template=question, view=LLMView(200))
    assert len({ours.identity, other.identity, third.identity}) == 3
    assert corrector(writer).identity == ours.identity
    assert ours.uses_context


def test_the_reward_is_the_distance_to_the_written_text(writer):
    config = parse_run_config(
        {"reward": {"name": "correction", "alpha": 3.0, "beta": 0.0}, "llm": {"model": "a/b"},
         "context": {"description": "x"}}
    )  # fmt: skip
    members = tuple(Hypothesis(text, ()) for text in NBEST)
    groups = [
        HypothesisGroup("u", members, CONTEXT, (-1.0, -2.0, -3.0)),
        HypothesisGroup("v", (Hypothesis("nothing", ()),), CONTEXT, (-1.0,)),
    ]
    reward = reward_from_config(config, writer)
    out = reward(groups)
    assert out.values[0].tolist() == [-1 - 3, -2 - 3, -3 - 3]
    assert out.values[1].isnan().all()
    assert reward.components[0].reward.num_unusable == 1
    assert isinstance(corrector_from_config(config, writer), Corrector)


# ---------------------------------------------------------------- as a proposal


@pytest.fixture(scope="module")
def maker(nemo_file, tmp_path_factory):
    """Corrector → N-best maker of a tiny hybrid, and one batch of its audio."""
    from helpers.fits import begin

    from nemo_llm_feedback.asr.reference import encode, evaluation_mode
    from nemo_llm_feedback.core.text import basic
    from nemo_llm_feedback.hypotheses.maker import NBestMaker
    from nemo_llm_feedback.training.models import restore

    folder = tmp_path_factory.mktemp("maker")
    model = restore(nemo_file("hybrid_bpe"), map_location="cpu")
    model.setup_feedback(
        {
            "model": {"train_ds": {"manifest_filepath": str(write_manifest(folder / "pool.json", [None, None])),
                                   "batch_size": 2, "shuffle": False}, "optim": {"lr": 1e-3}},
            "proposals": {"beam": 4, "boosted": 0, "term_swap": 0, "max_members": 3, "max_symbols": 3},
            "reward": {"name": "length"},
            "context": {"description": "an order"},
        },
        work_dir=folder,
    )  # fmt: skip
    feedback = begin(model)
    batch = next(iter(model._train_dl))
    audio = feedback.reader.split(batch).unlabeled
    with torch.no_grad(), evaluation_mode(model):
        encoded, lengths = encode(model, audio.signal, audio.signal_len)

    def make(corrector):
        known = feedback.maker
        return NBestMaker(
            known.proposer,
            feedback.reference,
            normalize=basic,
            reward=known.reward,
            corrector=corrector,
        )

    return make, audio, encoded, lengths


def test_a_correction_is_a_member_with_exact_scores(maker):
    make, audio, encoded, lengths = maker
    asked: list[Any] = []

    def correct(contexts, nbest):
        asked.append((contexts, nbest))
        return ["A latte, with soy!", None]

    without = make(None).make(audio, encoded, lengths)
    corrected = make(correct)
    found = corrected.make(audio, encoded, lengths)
    assert [h.source for h in found.hypotheses[0]][:2] == ["greedy", "llm_correction"]
    assert found.texts[0][1] == "a latte with soy"
    assert found.hypotheses[1] == without.hypotheses[1]
    size = found.sizes[1]
    for name, scores in without.ref_logp.items():
        assert found.ref_logp[name][1, :size].tolist() == pytest.approx(scores[1, :size].tolist(), abs=1e-3)
    assert asked[0][0] == audio.contexts
    assert asked[0][1][0] == list(dict.fromkeys(asked[0][1][0]))
    head = corrected._reference.heads[1]
    reference = corrected._reference.encode(audio.signal[:1], audio.signal_len[:1])
    expected = head.score(*reference, [[found.labels[0][1]]])
    torch.testing.assert_close(found.ref_logp[head.name][:1, 1:2], expected, rtol=0, atol=1e-3)
    assert found.sizes[0] == 3  # within max_members, which the correction is not the first to leave


def test_corrections_that_the_vocabulary_cannot_express_are_dropped(maker):
    make, audio, encoded, lengths = maker
    found = make(lambda contexts, nbest: ["拿铁", "zürich"]).make(audio, encoded, lengths)
    assert "llm_correction" not in {h.source for row in found.hypotheses for h in row}


def test_the_run_loads_the_llm_for_corrections_alone(nemo_file, tmp_path: Path):
    """Plain self-training asks for no reward, but its groups may have the LLM's rewrite in them."""
    from helpers.fits import begin

    from nemo_llm_feedback.training.models import restore

    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    folder = make_tiny_llm(tmp_path / "llm", chat=True)
    model.setup_feedback(
        {
            "model": {"train_ds": {"manifest_filepath": str(write_manifest(tmp_path / "pool.json", [None])),
                                   "batch_size": 1, "shuffle": False}, "optim": {"lr": 1e-3}},
            "proposals": {"beam": 4, "boosted": 0, "term_swap": 0, "llm_correction": 1},
            "objective": {"name": "self_training"},
            "llm": {"model": str(folder), "quantization": "none", "device": "cpu"},
        },
        work_dir=tmp_path,
    )  # fmt: skip
    feedback = begin(model)
    assert feedback.maker.reward is None
    assert isinstance(feedback.maker._corrector, Corrector)
