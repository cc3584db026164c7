"""Rescoring in NeMo's decoding objects: exact scores, every strategy, and nothing that NeMo does switches it off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rescored import decode, decoding_cfg, encoded, exact, stock_models
from nemo.collections.asr.models import ASRModel
from omegaconf import OmegaConf

from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.reference import FrozenReference
from nemo_llm_feedback.core.config.rescoring import parse_rescoring_config
from nemo_llm_feedback.core.errors import CheckpointError, ConfigError, DecodingError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.rescoring import Rescorer, attach, disable_rescoring, enable_rescoring, utterance_contexts
from nemo_llm_feedback.rewards import CallableReward, LLMReward, build_reward
from nemo_llm_feedback.rewards.composite import Component, CompositeReward

FAMILIES = ("ctc_char", "ctc_bpe", "rnnt_bpe", "tdt_bpe", "tdt_char", "hybrid_bpe", "hybrid_tdt_char")
SHORT = build_reward("negative_length")


@pytest.fixture
def stock(nemo_file: Any) -> Iterator[Callable[..., Any]]:
    """``stock(kind)``: a stock model."""
    with stock_models(nemo_file) as get:
        yield get


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_score_is_exact_log_p_plus_weighted_reward_and_length(kind: str, stock: Any) -> None:
    model = stock(kind)
    reward = CallableReward(lambda texts: [text.count("e") for text in texts], name="es")
    enable_rescoring(model, reward, alpha=0.7, beta=0.3, nbest=5)
    x, lengths = encoded()
    found = decode(model, x, lengths)
    assert max(len(hyp.n_best) for hyp in found) > 1
    for row, hyp in enumerate(found):
        scores = [member.score for member in hyp.n_best]
        assert scores == sorted(scores, reverse=True)
        assert len({member.text for member in hyp.n_best}) == len(hyp.n_best) <= 5
        assert hyp.y_sequence.tolist() == list(hyp.n_best[0].labels)
        assert not hyp.y_sequence.is_inference()
        for member in hyp.n_best:
            parts = member.parts
            assert parts["asr"] == pytest.approx(exact(model, list(member.labels), x, lengths, row), abs=1e-4)
            assert parts["es"] == member.text.count("e")
            assert member.score == pytest.approx(parts["asr"] + 0.7 * parts["es"] + 0.3 * parts["length"], abs=1e-4)
        assert hyp.score_parts == dict(hyp.n_best[0].parts)


def test_without_a_reward_the_most_probable_member_wins(stock: Any) -> None:
    model = stock("rnnt_bpe")
    enable_rescoring(model, nbest=6)
    for hyp in decode(model, *encoded(seed=3)):
        assert hyp.score == max(member.parts["asr"] for member in hyp.n_best) == hyp.score_parts["asr"]


def test_an_llm_reward_gives_the_one_parameterisation(stock: Any, tiny_llm: Path) -> None:
    from nemo_llm_feedback.core.config import LLMConfig
    from nemo_llm_feedback.llm import load_llm

    model = stock("ctc_bpe")
    reward = LLMReward(load_llm(LLMConfig(model=str(tiny_llm), quantization="none")), alpha=0.5, beta=3.0)
    with pytest.raises(ConfigError, match="has alpha and beta itself"):
        enable_rescoring(model, reward, alpha=1.0)
    enable_rescoring(model, reward, context=Context("an order at a coffee shop", ("soy latte",)), boosted=0)
    for hyp in decode(model, *encoded()):
        for member in hyp.n_best:
            parts = member.parts
            wanted = 0.5 * parts["llm"] + parts["asr"] + 3.0 * parts["length"]
            assert member.score == pytest.approx(wanted, abs=1e-3)


def test_a_reward_without_the_recognisers_part_is_the_whole_score_all_the_same(stock: Any, tiny_llm: Path) -> None:
    """With ``asr_weight=0`` log p(y|x) was added again, and alpha and beta counted twice."""
    from nemo_llm_feedback.core.config import LLMConfig
    from nemo_llm_feedback.llm import load_llm

    model, llm = stock("ctc_bpe"), load_llm(LLMConfig(model=str(tiny_llm), quantization="none"))
    context = Context("an order at a coffee shop")
    enable_rescoring(model, LLMReward(llm, alpha=0.5, beta=3.0, asr_weight=0.0), context=context)
    for hyp in decode(model, *encoded()):
        for member in hyp.n_best:
            wanted = 0.5 * member.parts["llm"] + 3.0 * member.parts["length"]
            assert member.score == pytest.approx(wanted, abs=1e-3)
    components = [{"name": "length", "weight": 2.0}, {"name": "repetition", "weight": -4.0}]
    settings = parse_rescoring_config({"reward": {"name": "composite", "settings": {"components": components}}})
    rescorer = Rescorer.from_settings(settings)
    attach(model, rescorer)
    for hyp in decode(model, *encoded()):
        for member in hyp.n_best:
            wanted = 2.0 * member.parts["length"] - 4.0 * member.parts["repetition"]
            assert member.score == pytest.approx(wanted, abs=1e-3)


def test_a_reward_of_the_settings_is_the_whole_score_as_in_training(
    stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that reads log p(y|x) itself had it added once more, and two nats per word."""
    code = "def audio_and_es(texts, ref_logp): return [p + 2 * t.count('e') for t, p in zip(texts, ref_logp)]\n"
    (tmp_path / "judging.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    model, settings = stock("ctc_bpe"), {"name": "callable", "settings": {"function": "judging:audio_and_es"}}
    attach(model, Rescorer.from_settings(parse_rescoring_config({"reward": settings})))
    for hyp in decode(model, *encoded()):
        for member in hyp.n_best:
            wanted = member.parts["asr"] + 2 * member.text.count("e")
            assert member.score == pytest.approx(wanted, abs=1e-3) == pytest.approx(member.parts["audio_and_es"])


def test_a_composite_with_an_llm_reward_weighs_the_audio_once(stock: Any, tiny_llm: Path) -> None:
    from nemo_llm_feedback.core.config import LLMConfig
    from nemo_llm_feedback.llm import load_llm

    model, llm = stock("ctc_bpe"), load_llm(LLMConfig(model=str(tiny_llm), quantization="none"))
    judge = CompositeReward([Component(LLMReward(llm, alpha=0.5, beta=3.0), 1.0), Component(SHORT, 2.0)])
    enable_rescoring(model, judge, context=Context("an order at a coffee shop"))
    for hyp in decode(model, *encoded()):
        for member in hyp.n_best:
            wanted = member.parts["llm"] + 2.0 * member.parts["negative_length"]
            assert member.score == pytest.approx(wanted, abs=1e-3)


def test_a_plain_function_is_a_reward_beside_the_audio(stock: Any) -> None:
    model = stock("ctc_bpe")
    enable_rescoring(model, lambda texts: [float(text.count("e")) for text in texts])
    for hyp in decode(model, *encoded()):
        assert hyp.score == pytest.approx(hyp.score_parts["asr"] + hyp.text.count("e"), abs=1e-3)


@pytest.mark.parametrize("kind", ["ctc_char", "tdt_bpe"])
def test_the_context_s_terms_add_boosted_and_swapped_members_with_exact_scores(kind: str, stock: Any) -> None:
    """Character models, too, for which NeMo itself builds no boosting tree; rows without terms get none."""
    model = stock(kind)
    enable_rescoring(model)
    x, lengths = encoded(frames=14, seed=2)
    plain = decode(model, x, lengths)
    text = plain[0].text.strip()
    term = text[:-1] + next(c for c in "aeiou" if c != text[-1])
    with utterance_contexts(model, ["a", "b"], [Context(terms=(term,)), Context()]):
        found = decode(model, x, lengths)
    assert "beam" in {m.source for m in found[0].n_best}
    assert {"boosted", "term_swap"} & {m.source for m in found[0].n_best}
    assert found[1].n_best == plain[1].n_best
    for member in found[0].n_best:
        assert member.score == pytest.approx(exact(model, list(member.labels), x, lengths, 0), abs=1e-4)


STRATEGIES = [
    ("ctc_bpe", "beam_batch"),
    *itertools.product(("rnnt_bpe",), ("malsd_batch", "maes_batch", "maes", "beam")),
    ("rnnt_char", "beam"),
    *itertools.product(("tdt_bpe",), ("malsd_batch", "maes", "beam")),
]


@pytest.mark.parametrize(("kind", "strategy"), STRATEGIES)
def test_every_n_best_strategy_is_rescored(kind: str, strategy: str, stock: Any) -> None:
    """`beam` can return one text several times: members are distinct all the same."""
    model = stock(kind)
    model.change_decoding_strategy(decoding_cfg(model, strategy=strategy, beam_size=3), verbose=False)
    enable_rescoring(model, SHORT, alpha=1.0)
    x, lengths = encoded(frames=7)
    for row, hyp in enumerate(decode(model, x, lengths)):
        assert len({member.text for member in hyp.n_best}) == len(hyp.n_best)
        assert hyp.score_parts["asr"] == pytest.approx(
            exact(model, hyp.y_sequence.tolist(), x, lengths, row), abs=1e-4
        )
    assert model.decoding.cfg.strategy == strategy


@pytest.mark.parametrize(
    ("kind", "beam", "more", "words"),
    [
        ("rnnt_bpe", {"strategy": "alsd"}, {}, "strategy=malsd_batch"),
        ("rnnt_bpe", {"strategy": "tsd"}, {}, "strategy=malsd_batch"),
        ("ctc_bpe", {"strategy": "flashlight"}, {}, "strategy=beam_batch"),
        ("ctc_char", {"strategy": "pyctcdecode"}, {}, "strategy=beam_batch"),
        ("rnnt_bpe", {"strategy": "malsd_batch", "beam_size": 1}, {}, "beam_size to 2"),
        ("rnnt_bpe", {"strategy": "maes_batch", "ngram_lm_model": "x.arpa"}, {}, "NeMo's maes_batch has no such"),
        ("rnnt_bpe", {"strategy": "beam", "boosting_tree": {"key_phrases_list": ["tea"]}}, {}, "need strategy=malsd"),
        ("ctc_char", {"strategy": "beam_batch", "boosting_tree": {"key_phrases_list": ["tea"]}}, {}, "boosted=8"),
        ("rnnt_bpe", {}, {"preserve_alignments": True}, "preserve_alignments"),
        ("ctc_bpe", {}, {"confidence_cfg": {"preserve_word_confidence": True}}, "no confidence"),
    ],
)
def test_what_cannot_be_rescored_is_refused_and_the_model_stays_as_it_was(
    kind: str, beam: dict[str, Any], more: dict[str, Any], words: str, stock: Any
) -> None:
    model = stock(kind)
    enable_rescoring(model, SHORT)
    before = model.decoding
    with pytest.raises(ConfigError, match=words):
        model.change_decoding_strategy(OmegaConf.merge(decoding_cfg(model, **beam), more), verbose=False)
    assert model.decoding is before
    assert "negative_length" in decode(model, *encoded())[0].score_parts


def test_a_refused_model_is_the_stock_one_again(stock: Any) -> None:
    model = stock("rnnt_bpe", fresh=True)
    model.change_decoding_strategy(decoding_cfg(model, strategy="alsd"), verbose=False)
    cls = type(model)
    with pytest.raises(ConfigError, match="alsd"):
        enable_rescoring(model, SHORT)
    assert type(model) is cls
    model.cfg.target = model.cfg.target.replace("EncDecRNNTBPEModel", "EncDecRNNTBPEEOUModel")
    with pytest.raises(CheckpointError, match="end-of-utterance"):
        enable_rescoring(model, SHORT)
    with pytest.raises(ConfigError, match=r"rescoring\.nbest must be ≥ 2, got 1"):
        enable_rescoring(model, SHORT, nbest=1)


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe"])
def test_phrase_boosting_in_the_first_pass_works_together_with_rescoring(kind: str, stock: Any) -> None:
    model = stock(kind)
    enable_rescoring(model, SHORT, alpha=0.0)
    x, lengths = encoded(frames=14)
    without = [member.text for hyp in decode(model, x, lengths) for member in hyp.n_best]
    phrase = next(word for word in ("mocha", "small", "please") if not any(word in text for text in without))
    tree = {"boosting_tree": {"key_phrases_list": [phrase]}, "boosting_tree_alpha": 8.0}
    model.change_decoding_strategy(decoding_cfg(model, strategy=BATCHED[kind], beam_size=4, **tree), verbose=False)
    boosted = [member.text for hyp in decode(model, x, lengths) for member in hyp.n_best]
    assert any(phrase in text for text in boosted)
    # A greedy strategy's tree is taken along into the beam.
    cfg = OmegaConf.merge(decoding_cfg(model, boosting_tree=None), {"strategy": "greedy_batch", "greedy": tree})
    model.change_decoding_strategy(cfg, verbose=False)
    assert any(phrase in member.text for hyp in decode(model, x, lengths) for member in hyp.n_best)


BATCHED = {"ctc_bpe": "beam_batch", "rnnt_bpe": "malsd_batch"}


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe"])
def test_an_n_gram_model_in_the_first_pass_works_together_with_rescoring(
    kind: str, stock: Any, tmp_path: Path
) -> None:
    """A bigram model that prefers one label to all others brings it in; the scores stay exact."""
    model = stock(kind)
    size = heads_of(model)[0].vocabulary.vocab_size
    # NeMo writes label i as the character i + 100; log10 probabilities and back-off weights.
    rows = "".join(f"{-1.0 if i == 5 else -2.7:.1f}\t{chr(i + 100)}\t0\n" for i in range(size))
    head = f"\\data\\\nngram 1={size + 3}\nngram 2=1\n\n\\1-grams:\n-9\t<unk>\t0\n0\t<s>\t0\n-9\t</s>\t0\n"
    arpa = f"{head}{rows}\n\\2-grams:\n-1.0\t{chr(105)} {chr(105)}\n\n\\end\\\n"
    (tmp_path / "lm.arpa").write_text(arpa, encoding="utf-8")
    enable_rescoring(model, nbest=4)
    x, lengths = encoded()
    fused = decoding_cfg(
        model, strategy=BATCHED[kind], beam_size=4, ngram_lm_model=str(tmp_path / "lm.arpa"), ngram_lm_alpha=6.0
    )
    count = [sum(list(m.labels).count(5) for h in decode(model, x, lengths) for m in h.n_best)]
    model.change_decoding_strategy(fused, verbose=False)
    found = decode(model, x, lengths)
    count.append(sum(list(m.labels).count(5) for h in found for m in h.n_best))
    assert count[1] > count[0]
    for row, hyp in enumerate(found):
        assert hyp.score == pytest.approx(exact(model, hyp.y_sequence.tolist(), x, lengths, row), abs=1e-4)


@pytest.mark.parametrize("kind", ["ctc_char", "rnnt_bpe", "hybrid_bpe"])
def test_rescoring_outlives_every_way_in_which_nemo_builds_a_decoder(
    kind: str, stock: Any, tokenizer_dir: Path
) -> None:
    model = stock(kind, fresh=True)
    enable_rescoring(model, SHORT)
    kinds = (False, True) if kind.startswith("hybrid") else (kind.startswith("ctc"),)

    def check() -> None:
        for ctc in kinds:
            assert all("negative_length" in hyp.score_parts for hyp in decode(model, *encoded(), ctc=ctc))
        wer = [model.wer, *([model.ctc_wer] if len(kinds) > 1 else [])]
        assert all(hasattr(metric.decoding, "rescorer") for metric in wer)

    check()
    model.change_decoding_strategy(decoding_cfg(model, strategy="greedy"), verbose=False)
    check()
    model.change_decoding_strategy(None)
    check()
    if len(kinds) > 1:
        model.change_decoding_strategy(None, decoder_type="ctc", verbose=False)
        assert model.cur_decoder == "ctc"
        check()
    if kind == "ctc_char":
        model.change_vocabulary([*"abcdefgh "])
    else:
        model.change_vocabulary(str(tokenizer_dir), "bpe")
    check()
    assert model.cfg.get("decoding", {}).get("strategy", "greedy") != "malsd_batch"


@pytest.mark.parametrize("kind", ["ctc_bpe", "hybrid_tdt_bpe"])
def test_what_is_saved_is_the_stock_file_and_disabling_gives_the_stock_model(
    kind: str, stock: Any, nemo_file: Any, tmp_path: Path
) -> None:
    model = stock(kind, fresh=True)
    x, lengths = encoded()
    before = [hyp.text for hyp in decode(model, x, lengths)]
    config, keys, cls = OmegaConf.to_yaml(model.cfg), set(model.state_dict()), type(model)
    enable_rescoring(model, SHORT)
    model.save_to(str(tmp_path / "saved.nemo"))
    assert OmegaConf.to_yaml(model.cfg) == config
    assert set(model.state_dict()) == keys
    again = ASRModel.restore_from(str(tmp_path / "saved.nemo"), map_location="cpu").eval()
    assert type(again) is cls
    assert "rescor" not in OmegaConf.to_yaml(again.cfg).lower()
    assert [hyp.text for hyp in decode(again, x, lengths)] == before
    disable_rescoring(model)
    disable_rescoring(model)
    assert type(model) is cls
    assert [hyp.text for hyp in decode(model, x, lengths)] == before
    assert not hasattr(decode(model, x, lengths)[0], "n_best")


def test_a_reference_frozen_from_a_rescoring_model_does_not_copy_the_reward(stock: Any) -> None:
    """The joint holds the WER metric, which holds the decoding object, which holds the rescorer and its LLM."""
    model = stock("hybrid_bpe", fresh=True)
    enable_rescoring(model, SHORT)
    model.joint.set_fuse_loss_wer(True, model.loss, model.wer)
    copied = FrozenReference(model, which="auto").joint.wer.decoding
    assert copied is not model.decoding
    assert copied.rescorer is model._rescorer


def test_each_row_is_judged_by_its_own_context(stock: Any) -> None:
    model = stock("ctc_bpe")
    seen: dict[str, tuple[str, list[str]]] = {}

    def judge(texts: list[str], utterances: list[str], descriptions: list[str], terms: list[list[str]]) -> list[float]:
        seen.update({u: (d, t) for u, d, t in zip(utterances, descriptions, terms, strict=True)})
        return [0.0] * len(texts)

    enable_rescoring(model, CallableReward(judge), context=Context("a shop", ("tea",)), boosted=0, term_swap=0)
    with utterance_contexts(model, ["a", "b"], [Context(), Context("a desk", ("key",))]):
        decode(model, *encoded())
    assert seen == {"a": ("a shop", ["tea"]), "b": ("a desk", ["key", "tea"])}
    with (
        utterance_contexts(model, ["a"], [Context()]),
        pytest.raises(ConfigError, match="1 utterances were announced"),
    ):
        decode(model, *encoded())
    disable_rescoring(model)
    with pytest.raises(ConfigError, match="rescoring is off"), utterance_contexts(model, [], []):
        pass


def test_a_member_that_cannot_be_judged_loses_and_log_p_decides_where_none_can(stock: Any) -> None:
    model = stock("ctc_bpe")
    enable_rescoring(model, nbest=4)
    first = [hyp.n_best[0].text for hyp in decode(model, *encoded())]
    enable_rescoring(model, CallableReward(lambda texts: [None if t in first else -1e6 for t in texts]), nbest=4)
    for hyp, text in zip(decode(model, *encoded()), first, strict=True):
        assert [math.isnan(member.score) for member in hyp.n_best] == [False] * (len(hyp.n_best) - 1) + [True]
        assert hyp.n_best[-1].text == text
    enable_rescoring(model, CallableReward(lambda texts: [None] * len(texts)), nbest=4)
    assert [hyp.n_best[0].text for hyp in decode(model, *encoded())] == first


def test_streaming_and_plain_labels_are_refused(stock: Any) -> None:
    model = stock("hybrid_bpe")
    enable_rescoring(model)
    x, lengths = encoded()
    with pytest.raises(DecodingError, match="whole utterances"):
        model.decoding.rnnt_decoder_predictions_tensor(x, lengths, partial_hypotheses=decode(model, x, lengths))
    with pytest.raises(DecodingError, match="log-probabilities"):
        model.ctc_decoding.ctc_decoder_predictions_tensor(torch.zeros(2, 5, dtype=torch.long), lengths)
