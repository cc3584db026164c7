"""NeMo's N-best path has bugs (each named here); none of them reaches a user of rescoring. And timestamps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rescored import decode, decoding_cfg, encoded, exact, stock_models
from helpers.tiny import write_audio
from omegaconf import OmegaConf, open_dict

from nemo_llm_feedback.asr.heads import TransducerHead, heads_of
from nemo_llm_feedback.core.errors import DecodingError
from nemo_llm_feedback.rescoring import NBest, enable_rescoring
from nemo_llm_feedback.rescoring.alignment import _best_path, align_ctc, align_transducer
from nemo_llm_feedback.rescoring.strategies import BATCHED_BEAM
from nemo_llm_feedback.rewards import build_reward

SHORT = build_reward("negative_length")


def head_kind(kind: str, decoder_type: str | None) -> str:
    return "ctc" if "ctc" in (kind[:3], decoder_type) else "transducer"


@pytest.fixture
def stock(nemo_file: Any) -> Iterator[Callable[..., Any]]:
    """``stock(kind)``: a stock model."""
    with stock_models(nemo_file) as get:
        yield get


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("audio")
    return [str(write_audio(folder / f"{i}.wav", seconds=1.0 + 0.5 * i, seed=i)) for i in range(2)]


def test_padding_changes_neither_members_nor_scores(stock: Any) -> None:
    """`beam_batch` scores padded frames as audio."""
    model = stock("ctc_bpe")
    enable_rescoring(model, nbest=6)
    x, lengths = encoded(rows=3, frames=14)
    together = decode(model, x, lengths)
    for row, n in enumerate(lengths.tolist()):
        (alone,) = decode(model, x[row : row + 1, :, :n], lengths[row : row + 1])
        assert [m.labels for m in alone.n_best] == [m.labels for m in together[row].n_best]
        assert alone.score == pytest.approx(together[row].score, abs=1e-4)


def test_the_score_is_log_p_and_the_order_follows_it(stock: Any) -> None:
    """NeMo's `Hypothesis.score` is not log p(y|x), and its order can differ; `beam_beta` is 1 by default."""
    model = stock("ctc_bpe")
    cfg = decoding_cfg(model, strategy="beam_batch", beam_size=6, return_best_hypothesis=False)
    x, lengths = encoded()
    model.change_decoding_strategy(cfg, verbose=False)
    theirs = decode(model, x, lengths)[0][0]
    theirs_exact = exact(model, theirs.y_sequence.tolist(), x, lengths, 0)
    assert abs(float(theirs.score) - theirs_exact) > 0.1
    enable_rescoring(model)
    hyps = decode(model, x, lengths)[0]
    assert hyps[0].score == pytest.approx(exact(model, hyps[0].y_sequence.tolist(), x, lengths, 0), abs=1e-4)
    assert hyps[0].score >= theirs_exact - 1e-4


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "hybrid_bpe"])
def test_n_best_lists_pass_through_transcribe_with_labels_and_timestamps(
    kind: str, stock: Any, audio: list[str]
) -> None:
    """CTC `transcribe(return_hypotheses=True)` raises on lists and puts log-probabilities in the place of labels;
    n-best with timestamps raises in every family; `transcribe` leaves encoder, decoder and joint in train mode."""
    model = stock(kind)
    enable_rescoring(model, SHORT)
    for decoder_type in ("rnnt", "ctc") if kind.startswith("hybrid") else (None,):
        head = {"decoder_type": decoder_type} if decoder_type else {}
        own = model.cfg.aux_ctc.decoding if decoder_type == "ctc" else model.cfg.get("decoding", {})
        beam = {"strategy": BATCHED_BEAM[head_kind(kind, decoder_type)], "beam": {"return_best_hypothesis": False}}
        cfg = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(own)), beam)
        model.change_decoding_strategy(cfg, verbose=False, **head)
        modes = [(module, module.training) for module in model.modules()]
        for settings in ({"return_hypotheses": True}, {"timestamps": True}):
            rows = model.transcribe(audio, verbose=False, batch_size=2, **settings)
            assert len(rows) == 2
            for hyps in rows:
                assert isinstance(hyps, list)
                assert hyps.text == hyps[0].text
                for hyp, member in zip(hyps, hyps[0].n_best, strict=True):
                    assert hyp.y_sequence.tolist() == list(member.labels)
                    assert hyp.score_parts["asr"] == member.parts["asr"]
                    if "timestamps" in settings and hyp.text:
                        assert hyp.timestamp["word"][-1]["end"] <= 1.7
        assert not model.encoder.training
        kept = set(model.modules())
        assert all(module.training == training for module, training in modes if module in kept)
        assert isinstance(model.transcribe(audio, verbose=False, timestamps=False)[0][0].text, str)


def test_transcribe_gives_what_it_gave_before_on_released_transducers(stock: Any, audio: list[str]) -> None:
    """Their configurations have `beam.return_best_hypothesis: false` beside a greedy strategy."""
    model = stock("rnnt_bpe")
    with open_dict(model.cfg):
        model.cfg.decoding = decoding_cfg(model, strategy="greedy_batch", return_best_hypothesis=False)
    model.change_decoding_strategy(None, verbose=False)
    before = [type(hyp) for hyp in model.transcribe(audio, verbose=False)]
    enable_rescoring(model, SHORT)
    assert [type(hyp) for hyp in model.transcribe(audio, verbose=False)] == before


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe"])
def test_validation_and_predict_read_n_best_lists(kind: str, stock: Any, capsys: Any) -> None:
    """With `log_prediction: true`, the RNN-T default, NeMo's WER raises on lists."""
    model = stock(kind)
    enable_rescoring(model, SHORT)
    cfg = decoding_cfg(model, strategy=BATCHED_BEAM[head_kind(kind, None)], return_best_hypothesis=False)
    model.change_decoding_strategy(cfg, verbose=False)
    model.wer.log_prediction = True
    x, lengths = encoded()
    with torch.no_grad():
        inputs = x if kind == "rnnt_bpe" else model.decoder(encoder_output=x)
    hyps = decode(model, x, lengths)
    assert all(isinstance(row, NBest) and len(row) > 1 for row in hyps)
    targets = torch.nn.utils.rnn.pad_sequence([row[0].y_sequence for row in hyps], batch_first=True)
    target_len = torch.tensor([len(row[0].y_sequence) for row in hyps])
    model.wer.update(predictions=inputs, predictions_lengths=lengths, targets=targets, targets_lengths=target_len)
    assert float(model.wer.compute()[0]) == 0.0, "the best of each list is what is compared"
    signal = torch.randn(2, 16000)
    with torch.inference_mode():
        found = model.predict_step((signal, torch.tensor([16000, 12000]), None, None, torch.tensor([4, 7])), 0)
    assert [int(sample) for sample, _ in found] == [4, 7]
    assert all(row.n_best for _, row in found)


def test_character_tdt_keeps_the_last_labels_of_its_vocabulary(stock: Any) -> None:
    """NeMo's character TDT drops as many labels as there are durations, from hypotheses and references alike."""
    model = stock("tdt_char")
    enable_rescoring(model)
    labels = list(model.joint.vocabulary)
    ids = [labels.index(c) for c in "wxyz'"]
    assert model.decoding.decode_ids_to_str(ids) == "wxyz'"
    assert model.decoding.blank_id == len(labels)


def test_greedy_settings_reach_the_beam(stock: Any) -> None:
    """The batched beam reads `beam.max_symbols`, not the `max_symbols_per_step` of its own dataclass."""
    model = stock("rnnt_bpe")
    cfg = OmegaConf.merge(decoding_cfg(model), {"strategy": "greedy_batch", "greedy": {"max_symbols": 3}})
    enable_rescoring(model, nbest=5)
    model.change_decoding_strategy(cfg, verbose=False)
    search = model.decoding.decoding
    assert (model.decoding.cfg.beam.max_symbols, search.beam_size) == (3, 5)
    assert search.decoding_computer.allow_cuda_graphs, "graphs are off in training only"
    x, _ = encoded(frames=2, rows=1)
    assert all(len(m.labels) <= 6 for hyp in decode(model, x, torch.tensor([2])) for m in hyp.n_best)


@pytest.mark.parametrize("decoder", ["greedy", "greedy_batch"])
def test_ctc_timestamps_of_the_greedy_text_are_those_of_nemo(stock: Any, audio: list[str], decoder: str) -> None:
    """The greedy path is the best path of its own text, so the alignment after the choice must find it again."""
    model = stock("ctc_bpe")
    model.change_decoding_strategy(OmegaConf.create({"strategy": decoder}), verbose=False)
    theirs = model.transcribe(audio, verbose=False, timestamps=True)
    texts = [hyp.text for hyp in theirs]
    enable_rescoring(model, _Prefers(texts), alpha=1e6, beta=0.0, nbest=12)
    ours = model.transcribe(audio, verbose=False, timestamps=True)
    assert not model.decoding.decoding.compute_timestamps  # NeMo's CTC searches give none
    assert [hyp.text for hyp in ours] == texts
    for a, b in zip(theirs, ours, strict=True):
        for level in ("char", "word", "segment"):
            assert a.timestamp[level] == b.timestamp[level]


class _Prefers:
    """Rewards the texts given."""

    name = "prefers"

    def __init__(self, texts: list[str]) -> None:
        self._judge = build_reward("callable", function=lambda found: [float(t in texts) for t in found])

    def __call__(self, groups: Any) -> Any:
        return self._judge(groups)


def test_ctc_alignment_is_the_best_of_all_paths() -> None:
    generator = torch.Generator().manual_seed(0)
    for labels in [(0,), (0, 1), (1, 1), (0, 1, 0)]:
        log_probs = torch.randn(5, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
        best, path = -math.inf, None
        for frames in itertools.product(range(3), repeat=5):
            spelled = tuple(k for k, _ in itertools.groupby(frames) if k != 2)
            score = float(sum(log_probs[t, v] for t, v in enumerate(frames)))
            if spelled == labels and score > best:
                best, path = score, frames
        assert path is not None
        starts = [t for t, v in enumerate(path) if v != 2 and (t == 0 or path[t - 1] != v)]
        assert align_ctc(log_probs, labels) == (starts, [t for t, v in enumerate(path) if v != 2])
    assert align_ctc(log_probs, ()) == ([], [])
    never = log_probs.clone()
    never[:, 1] = -math.inf
    for scores, impossible in [
        (log_probs, (0, 0, 0, 0)),
        (log_probs, (0, 1, 0, 1, 0, 1)),
        (log_probs[:0], (0,)),
        (never, (0, 1)),
    ]:
        with pytest.raises(DecodingError, match="no path spells"):
            align_ctc(scores, impossible)


@pytest.mark.parametrize("durations", [(), (0, 1, 2), (1, 2, 4)])
def test_transducer_alignment_is_the_best_of_all_paths(durations: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    frames, width = 5, 2
    moves = durations or (0, 1)
    blank = {m: np.log(rng.random((frames, width + 1))) for m in (moves if durations else (1,)) if m}
    label = {m: np.log(rng.random((frames, width))) for m in (moves if durations else (0,))}

    def paths(t: int, k: int) -> list[tuple[float, tuple[tuple[int, int], ...]]]:
        """All completions from a cell: (score, the labels' frames and moves)."""
        found: list[tuple[float, tuple[tuple[int, int], ...]]] = []
        for m, arcs in blank.items():
            if t + m == frames and k == width:
                found.append((arcs[t, k], ()))
            elif t + m < frames:
                found += [(arcs[t, k] + score, rest) for score, rest in paths(t + m, k)]
        for m, arcs in label.items():
            if k < width and t + m < frames:
                found += [(arcs[t, k] + s, ((t, m), *rest)) for s, rest in paths(t + m, k + 1)]
        return found

    assert _best_path(blank, label) == list(max(paths(0, 0))[1])
    assert _best_path({9: blank[1]}, label) is None, "nothing reaches the end"


@pytest.mark.parametrize("kind", ["rnnt_bpe", "tdt_bpe"])
def test_transducer_timestamps_ascend_within_the_audio_and_chunks_do_not_matter(kind: str, stock: Any) -> None:
    model = stock(kind)
    (head,) = heads_of(model)
    assert isinstance(head, TransducerHead)
    x, _ = encoded(rows=1, frames=9)
    path = frames, taken = align_transducer(head, x[0], (3, 5, 5))
    assert 0 <= frames[0] <= frames[1] <= frames[2] < 9
    assert all(d in head.durations if head.durations else d == 1 for d in taken)
    (small,) = heads_of(model, memory_budget_mb=0)  # a cell at a time
    assert align_transducer(small, x[0], (3, 5, 5)) == path
    with pytest.raises(DecodingError, match="too short"):
        align_transducer(head, x[0, :, :0], (3,))


def test_the_settings_shown_are_the_defaults() -> None:
    import dataclasses

    import yaml

    from nemo_llm_feedback.core.config.compose import conf_dir
    from nemo_llm_feedback.core.config.rescoring import RescoringConfig

    shown = yaml.safe_load(Path(conf_dir() / "rescoring.yaml").read_text(encoding="utf-8"))
    defaults = dataclasses.asdict(dataclasses.replace(RescoringConfig(), llm=None))
    for key, value in shown.items():
        if key == "llm":
            continue
        for name, inner in value.items() if isinstance(value, dict) else [("", value)]:
            wanted = defaults[key][name] if name else defaults[key]
            assert inner == (list(wanted) if isinstance(wanted, tuple) else wanted), (key, name)
    assert set(shown) == set(defaults)
