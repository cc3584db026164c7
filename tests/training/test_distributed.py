"""Several ranks train what one process would, and fail together."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import judge, run_ranks, train
from helpers.tiny import build_nemo, write_manifest

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.training.distributed import Report, Together, join_metrics, local_lengths, shares, touch_all

# No dropout, no augmentation, no batch statistics: labelled rows must not depend on their neighbours.
STILL: dict[str, Any] = {
    "encoder__dropout": 0.0,
    "encoder__dropout_pre_encoder": 0.0,
    "encoder__dropout_att": 0.0,
    "encoder__conv_norm_type": "layer_norm",
    "spec_augment__freq_masks": 0,
    "spec_augment__time_masks": 0,
    "preprocessor__dither": 0.0,
}
STILL_TRANSDUCER = {"decoder__prednet__dropout": 0.0, "joint__jointnet__dropout": 0.0}

# Rows go to the ranks in turn, two a batch: in the first step rank 1 has only labelled rows, in the second rank 0 has
# no group with signal.
TEXTS = [None, "a latte", None, "one mocha", None, None, None, None]
CONTEXTS = [None, None, None, None, "unjudged", None, "unjudged", None]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("data") / "m.json", TEXTS, seconds=1.0, context=CONTEXTS)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ctc_bpe", {}),
        ("hybrid_bpe", {"heads": "ctc", "objective": "mwer"}),
        ("hybrid_bpe", {"objective": "self_training"}),
        ("hybrid_bpe", {"labelled": "replay"}),
    ],
)
def test_two_ranks_equal_one_process_with_the_same_batch(
    kind: str, settings: dict[str, Any], manifest: Path, tmp_path: Path, tokenizer_dir: Path, monkeypatch: Any
) -> None:
    still = STILL | (STILL_TRANSDUCER if kind.startswith("hybrid") else {})
    nemo = build_nemo(kind, tmp_path / "base.nemo", tokenizer_dir=tokenizer_dir, **still)
    found = run_ranks("equal", tmp_path, nemo, manifest, json.dumps(settings))
    assert "error" not in found[0], found[0]["error"]
    monkeypatch.setattr("nemo_llm_feedback.training.setup.make_reward", lambda config, scorer: judge)
    one = train(nemo, manifest, tmp_path / "one", batch=4, **settings)
    start = torch.load(_weights_of(nemo, tmp_path), weights_only=True)
    moved = 0.0
    for name, value in one.state_dict().items():
        for rank in found:
            difference = float((rank["weights"][name] - value).abs().max()) if value.numel() else 0.0
            assert difference <= 1e-5, f"{name}: {difference}"
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3, "nothing was learned, so nothing was compared"
    metrics = {k: float(v) for k, v in one.trainer.callback_metrics.items() if k.startswith("feedback/")}
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=0, abs=0, nan_ok=True)
    for name in set(metrics) & {"feedback/groups", "feedback/reward_policy", "feedback/members"}:
        assert found[0]["metrics"][name] == pytest.approx(metrics[name], rel=1e-4), name


def _weights_of(nemo: Path, folder: Path) -> Path:
    import tarfile

    with tarfile.open(nemo) as archive:
        archive.extract("./model_weights.ckpt", folder, filter="data")
    return folder / "model_weights.ckpt"


def test_lhotse_splits_the_rows_over_the_ranks_once(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 8)
    found = run_ranks("lhotse", tmp_path, nemo_file("ctc_bpe"), manifest)
    assert "error" not in found[0], found[0]["error"]
    first, second = (set(rank["seen"]) for rank in found)
    assert not first & second
    assert len(first) == len(second) == 4


def test_a_failing_reward_on_one_rank_stops_all_with_its_error(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 8)
    found = run_ranks("failure", tmp_path, nemo_file("ctc_bpe"), manifest)
    assert [rank.get("type") for rank in found] == ["RewardError", "RewardError"], found
    assert "out of memory" in found[1]["message"]
    assert "on rank 1" in found[0]["message"]


def test_shares_make_the_mean_of_ranks_the_mean_of_items() -> None:
    values = [[1.0, 2.0, 6.0], [10.0], []]
    reports = [Report({"a": float(len(v))}) for v in values]
    means = [sum(v) / max(len(v), 1) for v in values]
    joined = sum(shares(r, reports)["a"] * mean for r, mean in zip(reports, means, strict=True)) / len(reports)
    assert joined == pytest.approx(19 / 4)
    assert shares(reports[0], reports[:1]) == {"a": 1.0}
    assert shares(Report({"a": 0.0}), [Report({"a": 0.0})] * 2) == {"a": 0.0}


def test_metrics_are_joined_by_their_counts() -> None:
    nan = float("nan")
    reports = [
        Report({}, {"groups": 3.0, "reward": 2.0, "members": 4.0}, {"reward": 3.0}, rows=4),
        Report({}, {"groups": 0.0, "reward": nan, "members": 1.0}, {"reward": 0.0}, rows=2),
        Report(),
    ]
    assert join_metrics(reports) == {"groups": 3.0, "reward": 2.0, "members": 3.0}


def test_every_parameter_gets_a_gradient_and_no_value_changes() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with torch.no_grad():
        module.weight[0, 0] = float("inf")
    zero = touch_all(module)
    zero.backward()
    assert float(zero) == 0.0
    assert torch.equal(module.weight.grad, torch.zeros(2, 2))
    assert module.bias.grad is None


def test_the_convolutional_encoder_asks_no_other_rank(monkeypatch: Any) -> None:
    from nemo.collections.asr.modules import ConvASREncoder

    layer = {
        "filters": 8,
        "repeat": 1,
        "kernel": [3],
        "stride": [1],
        "dilation": [1],
        "dropout": 0.0,
        "residual": False,
    }
    encoder = ConvASREncoder(jasper=[layer], activation="relu", feat_in=4, init_mode=None)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    local_lengths(encoder)
    signal, lengths = torch.zeros(1, 4, 50), torch.tensor([50])
    output, _ = copy.deepcopy(encoder)(audio_signal=signal, length=lengths)  # asking would raise: there is no group
    assert output.shape == (1, 8, 50)


def test_one_process_fails_as_it_would_alone() -> None:
    with pytest.raises(RewardError, match=r"^plain$"), Together():
        raise RewardError("plain")
    with Together() as ranks:
        ranks.mine = 3
    assert ranks.all == [3]
