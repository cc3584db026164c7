"""Every structural kind of released checkpoint passes through every job, and comes out as a stock checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kinds import JAPANESE, KINDS, PUNCTUATED, build_kind, make_tokenizers
from helpers.runs import run, weights
from helpers.tiny import write_manifest
from nemo.collections.asr.models import ASRModel
from nemo.collections.asr.modules import RNNTDecoder, StatelessTransducerDecoder

from nemo_llm_feedback.asr.heads import TransducerHead, Vocabulary
from nemo_llm_feedback.asr.lora import choose_parameters
from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.asr.reference import encode, evaluation_mode, recomputed_layers
from nemo_llm_feedback.cli.jobs.evaluate import evaluate
from nemo_llm_feedback.cli.jobs.export import export
from nemo_llm_feedback.cli.jobs.score import NBestProbe, score
from nemo_llm_feedback.cli.jobs.transcribe import transcribe
from nemo_llm_feedback.core.config import ParametersConfig
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import CheckpointError, ConfigError
from nemo_llm_feedback.training.models import restore

REFUSED = {"stt_multilingual_fastconformer_hybrid_large_pc": "one language per tokenizer"}
TEXTS = {"cased": PUNCTUATED, "japanese": [JAPANESE[:6], JAPANESE[8:16], JAPANESE[21:26], JAPANESE[30:37]]}
LOWER = ["a latte with soy", "one mocha to go", "the small tea", "thank you"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Kind of tokenizer → a labelled manifest, and one with labelled and unlabeled rows."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    for name in ("lower", "cased", "japanese", ""):
        texts = TEXTS.get(name, LOWER)
        mixed = [texts[0], None, texts[1], None, None, texts[2]]
        found[name] = (
            write_manifest(folder / f"dev{name}.json", texts),
            write_manifest(folder / f"m{name}.json", mixed),
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in REFUSED])
def test_every_job_works_on(
    name: str, tokenizers: dict[str, Path], manifests: dict[str, tuple[Path, Path]], tiny_llm: Path, tmp_path: Path
) -> None:
    labelled, mixed = manifests[KINDS[name][1]]
    base = build_kind(name, tmp_path / "base.nemo", tokenizers)
    small = ("proposals.beam=3", "proposals.boosted=2", "proposals.max_symbols=3")
    cfg = compose_config([f"llm.model={tiny_llm}", "context.description=an order", *small])
    report = score(NBestProbe(base, labelled, cfg))
    logp = report.nbest.ref_logp.values()
    assert all(torch.isfinite(values[report.nbest.mask]).all() for values in logp)
    assert any(len(row) > 1 for row in report.nbest.texts)

    result = run(base, mixed, tiny_llm, tmp_path / "run", "model.train_ds.batch_size=6")
    before, after = weights(base), weights(result.nemo)
    assert list(before) == list(after)
    learned = [key for key in before if not torch.equal(before[key], after[key])]
    assert {key.split(".")[0] for key in learned} >= {"encoder", "decoder"}
    assert all(torch.isfinite(value).all() for value in after.values())

    systems = evaluate([base, result.nemo], labelled, samples=50).comparison.systems
    _check_rescored(result.nemo, labelled, tiny_llm)
    _check_stock(export(result.nemo, output=tmp_path / "out.nemo"), result.nemo, labelled, systems[1].texts)


def _check_rescored(nemo: Path, labelled: Path, llm: Path) -> None:
    """Rescored transcripts of every row, each with the times of its words."""
    rescoring: dict[str, Any] = {"llm": {"model": str(llm)}, "nbest": 3, "context": {"description": "an order"}}
    found = transcribe(nemo, manifest=labelled, rescoring=rescoring, timestamps=True)
    assert not found.failures
    for row, hyp in found.worked:
        assert math.isfinite(hyp.score)
        assert bool(hyp.text) <= bool(hyp.timestamp["word"])
        assert all(0 <= word["start"] <= word["end"] <= row.duration + 0.2 for word in hyp.timestamp["word"])


def _check_stock(exported: Path, adapted: Path, labelled: Path, texts: Any) -> None:
    """Stock NeMo restores the export with its encoder's settings, and transcribes as `evaluate` did."""
    model = ASRModel.restore_from(str(exported), map_location="cpu")
    assert type(model).__module__.startswith("nemo.collections.asr.models")
    assert read_config(exported).encoder == read_config(adapted).encoder
    audio = [str(path) for path in sorted((labelled.parent / "wav").glob(f"{labelled.stem}_*.wav"))]
    found = model.transcribe(audio, batch_size=4, verbose=False)
    assert [hyp.text for hyp in found] == list(texts)


def test_aggregate_tokenizers_are_refused_with_the_reason(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    for name, words in REFUSED.items():
        base = build_kind(name, tmp_path / "base.nemo", tokenizers)
        with pytest.raises(CheckpointError, match=words):
            restore(base)


CONVOLUTIONAL = ["stt_en_citrinet_256", "QuartzNet15x5Base-En", "stt_en_contextnet_256"]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_blocks_of_a_convolutional_encoder_are_recomputed(
    name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    model = restore(build_kind(name, tmp_path / "base.nemo", tokenizers), map_location="cpu")
    blocks, runs, gradients = list(model.encoder.encoder), [], []
    blocks[1].mconv[0].register_forward_pre_hook(lambda *_: runs.append(1))
    audio = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)), torch.tensor([16000, 12000])
    for active in (False, True):
        model.zero_grad()
        with evaluation_mode(model), recomputed_layers(model.encoder, active=active):
            encoded, _ = encode(model, *audio)
        encoded.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.encoder.parameters() if p.grad is not None])
        runs.append(0)
    assert runs == [1, 0, 1, 1, 0]  # with recomputation once more in the backward
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_an_encoder_without_layers_is_not_silently_left_as_it_is(nemo_file: Any) -> None:
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    model.encoder.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="recompute_encoder: ConformerEncoder has no layers"):
        choose_parameters(model, ParametersConfig(recompute_encoder=True))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_lora_is_refused_where_it_would_learn_next_to_nothing(
    name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    model = restore(build_kind(name, tmp_path / "base.nemo", tokenizers), map_location="cpu")
    with pytest.raises(ConfigError, match=r"LoRA learns in linear layers, which hold \d+ %"):
        choose_parameters(model, ParametersConfig(lora_rank=2))


def test_beams_of_a_stateless_network_take_over_the_right_states() -> None:
    """As NeMo's recurrent network does, which has the method."""
    head = TransducerHead(
        StatelessTransducerDecoder({"pred_hidden": 4}, vocab_size=5, context_size=3),
        None,
        Vocabulary(None, ("a",) * 5),
    )
    states, indices = torch.arange(12).reshape(6, 2), torch.tensor([[2, 0, 0], [1, 1, 2]])
    (wanted, _) = RNNTDecoder.batch_aggregate_states_beam((states[None], states[None]), 2, 3, indices)
    target = [torch.zeros_like(states)]
    (found,) = head._decoder.batch_aggregate_states_beam([states], 2, 3, indices, target)
    assert found.tolist() == target[0].tolist() == wanted[0].tolist()
