"""What only a GPU can show. ``make gpu-check`` runs this on one, which has not happened yet for lack of one.

Elsewhere the tests run on the CPU, so that they themselves are tested; only NeMo's TDT loss needs CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import TEXTS, begin, config, fit, label_reward
from helpers.rescored import decode, decoding_cfg, encoded
from helpers.tiny import stock_class, write_manifest

from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.likelihood import Band
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.config import LLMConfig, ProposalConfig
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.llm import load_llm
from nemo_llm_feedback.training.models import restore

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRAINER: dict[str, Any] = {"accelerator": "gpu" if CUDA else "cpu", "deterministic": "warn"}


@pytest.mark.skipif(not CUDA, reason="NeMo's TDT loss needs a CUDA device")
@pytest.mark.parametrize("kind", ["tdt_bpe", "hybrid_tdt_bpe"])
def test_labelled_tdt_batches_are_bit_equal_to_stock(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    mixed = write_manifest(tmp_path / "mixed.json", [*TEXTS, None, None])
    stock = stock_class(kind).restore_from(str(nemo_file(kind)))
    labelled = write_manifest(tmp_path / "all.json", TEXTS)
    fit(stock, steps=2, train_ds=config(labelled)["model"]["train_ds"], **TRAINER)
    ours = restore(nemo_file(kind))
    ours.setup_feedback(config(mixed), work_dir=tmp_path / "run", reward=label_reward)
    fit(ours, steps=2, **TRAINER)
    for key, value in stock.state_dict().items():
        assert torch.equal(value.cpu(), ours.state_dict()[key].cpu()), key


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "tdt_bpe", "hybrid_bpe"])
def test_the_feedback_pass_runs_in_eval_mode(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    """cuDNN refuses the backward of an LSTM in eval mode; the likelihood must have switched it off."""
    model = restore(nemo_file(kind), map_location=DEVICE)
    model.setup_feedback(
        config(write_manifest(tmp_path / "m.json", [None] * 4)), work_dir=tmp_path / "run", reward=label_reward
    )
    before = {k: v.cpu().clone() for k, v in model.state_dict().items()}
    fit(model, steps=2, **TRAINER)
    assert any(not torch.equal(v.cpu(), before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "tdt_bpe"])
def test_under_autocast_every_parameter_gets_a_gradient(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    """torch below 2.11 kept weights that were cast without gradient, here by the pass that proposes, for the next."""
    model = restore(nemo_file(kind), map_location=DEVICE)
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    given = config(manifest, feedback={"augment": True}, objective={"mass_weight": 1.0})
    model.setup_feedback(given, work_dir=tmp_path / "run", reward=label_reward)
    feedback = begin(model)
    batch = [item.to(DEVICE) for item in next(iter(model._train_dl))]
    audio = feedback.reader.split(batch).unlabeled
    with torch.autocast(DEVICE, torch.bfloat16), torch.backends.mkldnn.flags(enabled=False):  # oneDNN: no bf16 LSTM
        model.feedback_loss(audio).total().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


@pytest.mark.parametrize("band", [None, Band()])
@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "tdt_bpe"])
def test_likelihood_and_gradient_equal_those_of_the_cpu_in_float64(kind: str, band: Any, nemo_file: Any) -> None:
    x, lengths = encoded(rows=3, frames=14)
    labels = [[[1, 2, 3], [1, 2], [7, 7, 9]], [[4]], [[], [5, 6, 5, 6]]]
    found = {}
    for device, dtype in ((DEVICE, torch.float32), ("cpu", torch.float64)):
        model = restore(nemo_file(kind), map_location="cpu").to(device, dtype).eval()
        (head,) = heads_of(model, band=band if dtype == torch.float32 else None)
        frames = x.to(device, dtype, copy=True).requires_grad_()
        logp = head.score(frames, lengths.to(device), labels)
        logp[torch.isfinite(logp)].sum().backward()
        found[dtype] = (logp.detach().double().cpu(), frames.grad.double().cpu())
    (ours, gradient), (exact, its_gradient) = found[torch.float32], found[torch.float64]
    torch.testing.assert_close(ours, exact, atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(gradient, its_gradient, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("strategy", ["greedy_batch", "malsd_batch"])
@pytest.mark.parametrize("kind", ["rnnt_bpe", "tdt_bpe"])
def test_decoders_with_cuda_graphs_write_what_the_cpu_writes(kind: str, strategy: str, nemo_file: Any) -> None:
    written = {}
    for device in dict.fromkeys(("cpu", DEVICE)):
        model = stock_class(kind).restore_from(str(nemo_file(kind)), map_location=device).eval()
        model.change_decoding_strategy(decoding_cfg(model, strategy=strategy, beam_size=4), verbose=False)
        x, lengths = (part.to(device) for part in encoded(rows=3, frames=14))
        for _ in range(2):  # the second one replays the graph
            written[device] = [hyp.text for hyp in decode(model, x, lengths)]
        graphs = model.decoding.decoding.decoding_computer.cuda_graphs_mode
        assert graphs is not None or not CUDA
    assert written[DEVICE] == written["cpu"]


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_bpe", "tdt_bpe"])
def test_captured_searches_propose_what_the_others_do(kind: str, nemo_file: Any) -> None:
    """NeMo keeps what it computes when it captures; here lists change, and a batch grows."""
    model = restore(nemo_file(kind), map_location=DEVICE)
    x, lengths = (part.to(DEVICE) for part in encoded(rows=4, frames=14))
    lists = [("mocha",) * 4, ("mocha",) * 4, ("mocha", "tea", "large", "tea")]
    made = {}
    for graphs in (False, True):
        proposer = Proposer(heads_of(model)[0], ProposalConfig(beam=4, boosted=4, max_symbols=3, cuda_graphs=graphs))
        with evaluation_mode(model), torch.no_grad(), proposer.same_weights():
            made[graphs] = [
                [[c.labels for c in row] for row in proposer.propose(x[:rows], lengths[:rows], contexts[:rows])]
                for rows, terms in zip((3, 4, 4), lists, strict=True)
                for contexts in [[Context(terms=(term,)) for term in terms]]
            ]
    assert made[True] == made[False]


def test_nf4_scores_equal_those_of_the_cpu(tiny_llm: Path) -> None:
    context, texts = (
        Context("an order at a coffee shop", ("latte",)),
        ["a large latte please", "he read the paper", ""],
    )
    scores = {}
    for device in dict.fromkeys(("cpu", DEVICE)):
        nf4 = LLMConfig(model=str(tiny_llm), quantization="nf4", device=device, compute_dtype="float32")
        scores[device] = [score.logp for score in load_llm(nf4).score([(context, texts)])[0]]
    assert scores[DEVICE] == pytest.approx(scores["cpu"], abs=0.05)
