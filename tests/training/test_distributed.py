"""Several ranks train what one process would, and fail together."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import measured, run_ranks, train
from helpers.runs import arguments
from helpers.tiny import build_nemo, write_manifest

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.training import distributed
from nemo_llm_feedback.training.distributed import CollectiveBlock, local_lengths, zero_grad_for_unused
from nemo_llm_feedback.training.losses import LossSum

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


@pytest.mark.slow
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
    kind: str, settings: dict[str, Any], manifest: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    still = STILL | (STILL_TRANSDUCER if kind.startswith("hybrid") else {})
    nemo = build_nemo(kind, tmp_path / "base.nemo", tokenizer_dir=tokenizer_dir, **still)
    found = run_ranks("equal", tmp_path, nemo, manifest, json.dumps(settings))
    assert "error" not in found[0], found[0]["error"]
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


@pytest.mark.slow
def test_two_ranks_share_trial_and_measurements_and_find_what_one_process_finds(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Rank 0 did all of it while the others waited in a collective, which has a time limit."""
    nemo = build_nemo("ctc_bpe", tmp_path / "base.nemo", tokenizer_dir=tokenizer_dir, **STILL)
    manifest = write_manifest(tmp_path / "m.json", [None] * 16, seconds=0.8)
    first, second = run_ranks("measured", tmp_path, nemo, manifest)
    assert "error" not in first, first["error"]
    assert first["agreed"] == second["agreed"]
    one = measured(nemo, manifest, tmp_path / "one", batch=4)
    assert not first["mine"] & second["mine"]
    assert first["mine"] | second["mine"] == one["mine"]
    assert abs(len(first["mine"]) - len(second["mine"])) <= 1
    ours, wanted = first["agreed"], one["agreed"]
    assert ours["falls"][0] == pytest.approx(wanted["falls"][0], rel=1e-5)
    assert all(abs(fall) > 1e-3 for fall in wanted["falls"][0].values()), "nothing was learned, nothing compared"
    assert (ours["rate"], ours["share"]) == (wanted["rate"], wanted["share"])
    assert ours["wer"] == pytest.approx(wanted["wer"])
    assert len(ours["history"]) == len(wanted["history"]) > 0
    assert len(set(wanted["history"][0])) > 8, "a gain of each utterance"
    for found, other in zip(ours["history"], wanted["history"], strict=True):
        assert found == pytest.approx(other, abs=1e-4)


def _weights_of(nemo: Path, folder: Path) -> Path:
    import tarfile

    with tarfile.open(nemo) as archive:
        archive.extract("./model_weights.ckpt", folder, filter="data")
    return folder / "model_weights.ckpt"


@pytest.mark.slow
def test_lhotse_splits_the_rows_over_the_ranks_once(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 8)
    found = run_ranks("lhotse", tmp_path, nemo_file("ctc_bpe"), manifest)
    assert "error" not in found[0], found[0]["error"]
    first, second = (set(rank["seen"]) for rank in found)
    assert not first & second
    assert len(first) == len(second) == 4


@pytest.mark.slow
def test_a_failing_reward_on_one_rank_stops_all_with_its_error(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 8)
    found = run_ranks("failure", tmp_path, nemo_file("ctc_bpe"), manifest)
    assert [rank.get("type") for rank in found] == ["RewardError", "RewardError"], found
    assert "out of memory" in found[1]["message"]
    assert "on rank 1" in found[0]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("loader", [[], ["model.train_ds.use_lhotse=true", "+model.train_ds.use_bucketing=false"]])
def test_ranks_of_either_loader_score_a_share_each_and_hold_all(
    loader: list[str], nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    """Each utterance is made once, by one rank, whether for the statistics of the pool or for the first refresh."""
    manifest = write_manifest(tmp_path / "m.json", [None] * 8)
    ranks = ("trainer.devices=2", "++trainer.strategy=ddp", "+exp_manager.seconds_to_sleep=0")
    more = ("llm.phase=cached", "trainer.max_steps=1", "model.train_ds.batch_size=2", f"output={tmp_path / 'a.nemo'}")
    command = arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", *ranks, *more, *loader)
    found = run_ranks("cached", tmp_path, command)
    assert "error" not in found[0], found[0]["error"]
    first, second = (rank["made"] for rank in found)
    assert len(first) == len(second) == 4
    assert not set(first) & set(second)
    for rank in found:
        assert set(rank["held"]) == {*first, *second}
        assert not rank["loaded"]
    assert [rank["written"] for rank in found] == [["pool_statistics.json"], []]


@pytest.mark.slow
def test_a_rank_whose_rows_have_no_spread_stops_nobody(tmp_path: Path) -> None:
    found = run_ranks("statistics", tmp_path)
    assert "error" not in found[0], found[0]["error"]
    assert found[0] == found[1]
    assert (found[0]["utterances"], found[0]["signal_fraction"], found[0]["members"]) == (2, 0.5, 1.5)
    assert found[0]["spread"] == {"llm": 3.0, "asr": 1.0, "length": 1.0}
    assert (found[0]["alpha"], found[0]["beta"]) == (1.0, 2.0)  # 3·1 / 3, and twice that


def _summed(value: float, count: float) -> LossSum:
    loss = LossSum()
    loss.add("a", torch.tensor(value), count=count)
    return loss


def _exchanged(losses: list[LossSum]) -> list[LossSum]:
    """As if each of them were a rank's."""
    for loss in losses:
        with loss:
            pass
    for loss in losses:
        loss.all = [other.mine for other in losses]
    return losses


def test_shares_make_the_mean_of_ranks_the_mean_of_items() -> None:
    values = [[1.0, 2.0, 6.0], [10.0], []]
    losses = _exchanged([_summed(sum(v) / max(len(v), 1), len(v)) for v in values])
    assert sum(float(loss.total()) for loss in losses) / len(losses) == pytest.approx(19 / 4)
    (alone,) = _exchanged([_summed(3.0, 2)])
    assert float(alone.total()) == 3.0
    assert [float(loss.total()) for loss in _exchanged([_summed(5.0, 0), _summed(7.0, 0)])] == [0.0, 0.0]
    assert _exchanged([LossSum()])[0].total() is None


def test_terms_are_weighed_and_named_by_their_head() -> None:
    loss, part = LossSum(), _summed(3.0, 2)
    part.log({"x": 1.0}, count=2)
    loss.join(part, weight=0.5, head="ctc", prefix="ctc/")
    loss.join(_summed(4.0, 1))
    with loss:
        pass
    assert set(loss.terms) == {"ctc/a", "a"}
    assert float(loss.total()) == 0.5 * 3 + 4
    assert loss.joined_metrics() == {"ctc/x": 1.0}


def test_metrics_are_joined_by_their_counts() -> None:
    nan, losses = float("nan"), [LossSum(), LossSum(), LossSum()]
    for loss, groups, reward, members, rows in ((losses[0], 3.0, 2.0, 4.0, 4), (losses[1], 0.0, nan, 1.0, 2)):
        loss.log({"reward": reward}, count=groups)
        loss.log({"groups": groups, "members": members}, count=rows)
    for loss in _exchanged(losses):
        assert loss.joined_metrics() == {"groups": 3.0, "reward": 2.0, "members": 3.0}


def test_every_parameter_gets_a_gradient_and_no_value_changes() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with torch.no_grad():
        module.weight[0, 0] = float("inf")
    zero = zero_grad_for_unused(module)
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


@pytest.mark.parametrize("items", [[1, 2, 3, 4, 5], [1], []])
def test_each_rank_works_on_its_share_and_gets_all_in_order(items: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    shares: dict[int, list[int]] = {}
    monkeypatch.setattr(distributed, "num_ranks", lambda: 2)
    for _ in range(2):  # once to find what each would send
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "this_rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "gather", lambda value: [(None, shares.get(r, [0] * 5)) for r in (0, 1)])
            done: list[int] = []
            found = distributed.shared(items, lambda mine, done=done: done.extend(mine) or [10 * x for x in mine])
            shares[rank] = [10 * x for x in done]
    assert [shares[0], shares[1]] == [[10 * x for x in items[0::2]], [10 * x for x in items[1::2]]]
    assert found == [10 * x for x in items]


def test_one_process_fails_as_it_would_alone() -> None:
    with pytest.raises(RewardError, match=r"^plain$"), CollectiveBlock():
        raise RewardError("plain")
    with CollectiveBlock() as ranks:
        ranks.mine = 3
    assert ranks.all == [3]
