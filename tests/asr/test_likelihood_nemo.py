"""The transducer likelihoods on NeMo's own modules, against NeMo's own losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_llm_feedback.asr.likelihood import Band, BandReport, ctc_log_prob, transducer_log_prob
from nemo_llm_feedback.core.trie import PrefixTrie

rnnt_modules = pytest.importorskip("nemo.collections.asr.modules.rnnt", reason="NeMo is not installed")

LABELS, ENCODER, WIDTH = 20, 12, 16
SIZES, LENGTHS = (7, 3, 6, 1), torch.tensor([30, 17, 25, 9])
DURATIONS = [0, 1, 2, 3, 4]


def lstm(**extra: Any) -> torch.nn.Module:
    layers, norm = extra.pop("layers", 1), extra.pop("norm", None)
    prednet = {"pred_hidden": WIDTH, "pred_rnn_layers": layers, **extra.pop("prednet", {})}
    return rnnt_modules.RNNTDecoder(prednet=prednet, vocab_size=LABELS, normalization_mode=norm, **extra).eval()


def stateless(context: int) -> torch.nn.Module:
    return rnnt_modules.StatelessTransducerDecoder(
        prednet={"pred_hidden": WIDTH}, vocab_size=LABELS, context_size=context, normalization_mode="layer"
    ).eval()


def make_joint(*, activation: str = "relu", extra_outputs: int = 0, **extra: Any) -> torch.nn.Module:
    net = {
        "encoder_hidden": ENCODER,
        "pred_hidden": WIDTH,
        "joint_hidden": 14,
        "activation": activation,
        "dropout": 0.2,
    }
    return rnnt_modules.RNNTJoint(net, LABELS, num_extra_outputs=extra_outputs, **extra).eval()


DECODERS = {
    "lstm": lstm,
    "lstm-2-dropout": lambda: lstm(layers=2, prednet={"dropout": 0.1}),
    "lstm-projected": lambda: lstm(prednet={"rnn_hidden_size": 24}),
    "lstm-layer-norm": lambda: lstm(layers=2, norm="layer"),
    "lstm-batch-norm": lambda: lstm(layers=2, norm="batch"),
    "lstm-blank-not-pad": lambda: lstm(blank_as_pad=False),
    "stateless-1": lambda: stateless(1),
    "stateless-2": lambda: stateless(2),
    "stateless-4": lambda: stateless(4),  # NeMo's own stepping is wrong here
}
JOINTS = {
    "relu": make_joint,
    "tanh": lambda: make_joint(activation="tanh"),
    "sigmoid": lambda: make_joint(activation="sigmoid"),
    "log-softmax-off": lambda: make_joint(log_softmax=False),
    "fused-loss": lambda: make_joint(fuse_loss_wer=True, fused_batch_size=2),
}


def random_batch() -> tuple[Tensor, list[list[int]], Tensor]:
    """[B, T, D] frames, ragged labels, and the labels padded."""
    torch.manual_seed(0)
    labels = [torch.randint(0, LABELS, (size,)).tolist() for size in SIZES]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(hyp) for hyp in labels], batch_first=True)
    return torch.randn(len(SIZES), 30, ENCODER, requires_grad=True), labels, padded


def nemo_joint(encoded: Tensor, padded: Tensor, decoder: Any, joint: Any) -> Tensor:
    """[B, T, U + 1, V] output of NeMo's joint as its training step computes it."""
    prediction, _ = decoder.predict(padded, state=None, add_sos=True)
    return joint.joint(encoded, prediction)


def gradients(total: Tensor, encoded: Tensor, *modules: torch.nn.Module) -> list[Tensor]:
    params = [param for module in modules for param in module.parameters()]
    return list(torch.autograd.grad(total, [encoded, *params]))


def assert_same_gradients(mine: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(mine, other, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


@pytest.mark.parametrize(
    ("decoder_name", "joint_name"),
    [*((name, "relu") for name in DECODERS), *(("lstm", name) for name in JOINTS if name != "relu")],
)
def test_rnnt_equals_nemos_loss(decoder_name: str, joint_name: str) -> None:
    from nemo.collections.asr.losses.rnnt import RNNTLoss

    encoded, labels, padded = random_batch()
    decoder, joint = DECODERS[decoder_name](), JOINTS[joint_name]()
    ours = transducer_log_prob(encoded, LENGTHS, PrefixTrie.build(labels, range(len(labels))), decoder, joint)
    logits = nemo_joint(encoded, padded, decoder, joint)
    logits = logits.log_softmax(-1) if joint.log_softmax is False else logits
    loss = RNNTLoss(
        num_classes=LABELS, reduction=None, loss_name="warprnnt_numba", loss_kwargs={"fastemit_lambda": 0.0}
    )
    theirs = -loss(log_probs=logits, targets=padded, input_lengths=LENGTHS, target_lengths=torch.tensor(SIZES))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    weight = torch.tensor([1.0, -0.5, 2.0, 0.3])
    assert_same_gradients(
        gradients(ours @ weight, encoded, decoder, joint), gradients(theirs @ weight, encoded, decoder, joint)
    )


def test_ctc_equals_nemos_loss() -> None:
    from nemo.collections.asr.losses.ctc import CTCLoss

    torch.manual_seed(0)
    labels = [torch.randint(0, LABELS, (size,)).tolist() for size in SIZES]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(hyp) for hyp in labels], batch_first=True)
    logits = torch.randn(len(SIZES), 30, LABELS + 1, requires_grad=True)
    log_probs = logits.log_softmax(-1)
    ours = ctc_log_prob(log_probs, LENGTHS, PrefixTrie.build(labels, range(len(labels))))
    loss = CTCLoss(num_classes=LABELS, reduction="none")
    theirs = -loss(log_probs=log_probs, targets=padded, input_lengths=LENGTHS, target_lengths=torch.tensor(SIZES))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    weight = torch.tensor([1.0, -0.5, 2.0, 0.3])
    mine, other = (torch.autograd.grad(total @ weight, logits, retain_graph=True) for total in (ours, theirs))
    assert_same_gradients(list(mine), list(other))


@pytest.mark.parametrize("decoder_name", ["lstm", "stateless-2"])
@pytest.mark.parametrize("durations", [DURATIONS, [0, 1], [0, 1, 2, 4, 8]])
def test_tdt_equals_nemos_reference_loss(
    decoder_name: str, durations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo's TDT reference runs on a CPU once its two ``.cuda()`` calls do nothing."""
    from nemo.collections.asr.losses.rnnt_pytorch import TDTLossPytorch

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    encoded, labels, padded = random_batch()
    decoder, joint = DECODERS[decoder_name](), make_joint(extra_outputs=len(durations), log_softmax=False)
    trie = PrefixTrie.build(labels, range(len(labels)))
    ours = transducer_log_prob(encoded, LENGTHS, trie, decoder, joint, durations=durations)
    loss = TDTLossPytorch(blank=LABELS, durations=durations, reduction="none", sigma=0.0)
    theirs = -loss(
        acts=nemo_joint(encoded, padded, decoder, joint),
        labels=padded,
        act_lens=LENGTHS,
        label_lens=torch.tensor(SIZES),
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    weight = torch.tensor([1.0, -0.5, 2.0, 0.3])
    assert_same_gradients(
        gradients(ours @ weight, encoded, decoder, joint), gradients(theirs @ weight, encoded, decoder, joint)
    )


def test_adapters_are_part_of_the_joint() -> None:
    from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig

    encoded, labels, _ = random_batch()
    decoder, joint = lstm(), make_joint()
    trie = PrefixTrie.build(labels, range(len(labels)))
    plain = transducer_log_prob(encoded, LENGTHS, trie, decoder, joint)
    joint.add_adapter("extra", LinearAdapterConfig(in_features=14, dim=4))
    joint.eval()
    with torch.no_grad():
        for param in joint.adapter_layer.parameters():
            param.normal_()
    adapted = transducer_log_prob(encoded, LENGTHS, trie, decoder, joint)
    assert (adapted - plain).abs().min() > 0.1
    adapted.sum().backward()
    assert all(param.grad is not None and param.grad.norm() > 0 for param in joint.adapter_layer.parameters())
    joint.set_enabled_adapters(enabled=False)
    joint.zero_grad()
    disabled = transducer_log_prob(encoded, LENGTHS, trie, decoder, joint)
    torch.testing.assert_close(disabled, plain)
    disabled.sum().backward()
    assert all(param.grad is None for param in joint.adapter_layer.parameters())


@pytest.fixture(scope="module")
def checkpoints(shared: Path) -> Any:
    """``checkpoints(name)`` restores one of the shared checkpoints."""
    from nemo.collections.asr.models import ASRModel

    return lambda name: ASRModel.restore_from(str(shared / "checkpoints" / f"{name}.nemo"), map_location="cpu").eval()


@pytest.mark.parametrize("name", ["rnnt_ctc", "tdt_ctc"])
def test_trained_checkpoint_on_a_group_equals_one_hypothesis_at_a_time(checkpoints: Any, name: str) -> None:
    model = checkpoints(name)
    torch.manual_seed(0)
    signal = torch.randn(2, 48000) * 0.05
    with torch.no_grad():
        frames, lengths = model.forward(input_signal=signal, input_signal_length=torch.tensor([48000, 30000]))
    encoded = frames.transpose(1, 2).clone().requires_grad_()
    stem = [5, 17, 90, 3, 41, 8]
    labels = [stem, [*stem[:4], 77, 8], [*stem[:5], 9, 9], stem[:5], [], [99, *stem]]
    rows = [0, 0, 1, 0, 1, 1]

    def run(labels: list[list[int]], rows: list[int], band: Band | None = None) -> Tensor:
        trie = PrefixTrie.build(labels, rows)
        if name == "rnnt_ctc":
            return transducer_log_prob(encoded, lengths, trie, model.decoder, model.joint, band=band)
        return transducer_log_prob(encoded, lengths, trie, model.decoder, model.joint, durations=DURATIONS, band=band)

    together = run(labels, rows)
    alone = torch.cat([run([hyp], [row]) for hyp, row in zip(labels, rows, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    weight = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.2, -0.2])
    modules = (encoded, model.decoder, model.joint)
    assert_same_gradients(gradients(together @ weight, *modules), gradients(alone @ weight, *modules))
    reports: list[BandReport] = []
    banded = run(labels, rows, Band(1e-3, reports.append))
    assert (together - banded).abs().max() <= 1e-3
    assert reports[0].evaluated < reports[0].cells
