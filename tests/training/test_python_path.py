"""``setup_feedback`` with plain settings and a trainer of one's own: the same sections count as for the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import begin, config, fit, label_reward
from helpers.tiny import stock_class, write_manifest
from omegaconf import open_dict

from nemo_llm_feedback.core.errors import ConfigError, TrainingError
from nemo_llm_feedback.core.run_folder import read_steps
from nemo_llm_feedback.data.batches import BatchReader
from nemo_llm_feedback.training import losses, mixin
from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping, lr_search
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.weights import snapshot

# Limits that no tiny model passes.
LENIENT = {
    "max_kl": 1e9,
    "max_length_ratio": 1e3,
    "max_empty_rise": 1,
    "max_repetition_rise": 1,
    "max_style_change": 1,
}


def minimal(manifest: Path, **sections: Any) -> dict[str, Any]:
    """The least that a run must be given, with a rate."""
    model = {"train_ds": {"manifest_filepath": str(manifest), "batch_size": 2}, "optim": {"lr": 1e-3}}
    return {"model": model, "context": {"description": "an order"}} | sections


@pytest.fixture
def model(nemo_file: Any) -> Any:
    return restore(nemo_file("ctc_bpe"), map_location="cpu")


def test_plain_settings_and_an_own_trainer_are_enough(model: Any, tmp_path: Path) -> None:
    """No ``sample_rate``, no defaults spelled out; the optimizer and the guards of the settings are in force."""
    manifest = write_manifest(tmp_path / "m.json", [None] * 10)
    settings = minimal(manifest, guards={"every": 2, "held_out": 0.4, **LENIENT})
    settings["model"]["optim"] = {"name": "sgd", "lr": 0.05, "sched": None}
    model.setup_feedback(settings, work_dir=tmp_path / "work", reward=label_reward)
    before = snapshot(model)
    trainer = fit(model, steps=4)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert [group["lr"] for group in optimizer.param_groups] == [0.05]
    (guards,) = [callback for callback in trainer.callbacks if isinstance(callback, HeldOutEarlyStopping)]
    assert [found.step for found in guards.history] == [2, 4]
    assert guards.done
    lines = read_steps(tmp_path / "work" / "steps.jsonl")
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out/gain" in line] == [2, 4]
    statistics = json.loads((tmp_path / "work" / "pool_statistics.json").read_text())
    assert statistics["signal_fraction"] > 0
    assert len(model.feedback_setup.staged.held_out) == 4
    assert (guards.kept_step > 0) is any(not torch.equal(v, before[k]) for k, v in snapshot(model).items())


def test_the_schedule_is_the_commands_unless_another_is_given(model: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model.setup_feedback(minimal(manifest, guards={"every": 0}), reward=label_reward)
    trainer = fit(model, steps=2)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "CosineAnnealing"


def test_a_reward_by_name_is_taken_from_the_settings(model: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model.setup_feedback(minimal(manifest, reward={"name": "rules"}, guards={"every": 0}), work_dir=tmp_path / "w")
    fit(model, steps=1)
    assert model.feedback.config.reward.settings["repetition"] == 4.0  # of conf/reward/rules.yaml
    assert {"repetition", "edit_distance", "asr"} <= set(model.feedback.cache.latest.parts)


def test_what_is_wrong_is_said_before_any_work(model: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    with pytest.raises(ConfigError, match=r"feedback\.refresh_evry"):
        model.setup_feedback(minimal(manifest, feedback={"refresh_evry": 1}), reward=label_reward)
    settings = minimal(manifest, guards={"every": 0})
    settings["model"]["optim"] = {}
    with pytest.raises(ConfigError, match=r"Set model\.optim\.lr"):
        model.setup_feedback(settings, reward=label_reward)
    with pytest.raises(TrainingError, match=r"call model\.setup_feedback"):
        model.feedback_loss(None)


# ------------------------------------------------------------------------------------- faults that were mended


class _Recorded:
    """Another reward, and the groups that it was given."""

    name = "recorded"

    def __init__(self, reward: Any) -> None:
        self._reward, self.groups = reward, []  # type: ignore[var-annotated]

    def __call__(self, groups: Any) -> Any:
        self.groups += groups
        return self._reward(groups)


def test_the_held_out_gain_compares_with_the_starting_models_greedy(model: Any, tmp_path: Path) -> None:
    """Both texts were marked greedy, the new one first: rules took the new text for the recogniser's own."""
    from nemo_llm_feedback.rewards import build_reward

    manifest = write_manifest(tmp_path / "m.json", [None] * 6)
    recorded = _Recorded(label_reward)
    guards = {"every": 1, "held_out": 0.5}
    model.setup_feedback(config(manifest, guards=guards), work_dir=tmp_path / "w", reward=recorded)
    feedback = begin(model)
    evaluator = HeldOutEvaluator(model, feedback)
    started = evaluator._start.texts
    assert evaluator.measure(model, step=0).gain == 0.0
    feedback.maker.reward = recorded = _Recorded(build_reward("edit_distance"))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.neg_()
    found = evaluator.measure(model, step=1)
    assert found.changed > 0
    assert recorded.groups
    for group in recorded.groups:
        assert [h.source for h in group.hypotheses] == ["policy", "greedy"]
        assert group.texts[1] in started
        assert group.texts[0] not in started
    assert found.gain < 0, "every changed text is some words away from the starting model's"


def test_weight_zero_leaves_unlabeled_rows_out_of_nemos_loss(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They went into it as empty transcripts."""
    manifest = write_manifest(tmp_path / "m.json", ["a latte", None, "", "thank you", None, None])
    settings = config(manifest, feedback={"weight": 0.0})
    settings["model"]["train_ds"]["batch_size"] = 4
    model.setup_feedback(settings, work_dir=tmp_path / "w", reward=label_reward)
    seen: list[list[int]] = []
    stock = type(model).__mro__[2]
    step = stock.training_step
    monkeypatch.setattr(
        stock, "training_step", lambda s, batch, nb: (seen.append(batch[3].tolist()), step(s, batch, nb))[1]
    )
    fit(model, steps=1)
    assert [len(lengths) for lengths in seen] == [2]
    assert min(seen[0]) > 0
    begin(model)
    model.zero_grad()
    *_, bare = model._train_dl
    before = snapshot(model)
    loss = model.training_step(bare, 0)["loss"]
    loss.backward()
    assert float(loss) == 0.0
    assert len(seen) == 1
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_the_rate_trial_is_a_piece_of_the_run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had its own optimizer, in fp32, unclipped, one batch a step, and learned from unlabeled rows alone."""
    texts, use = ["a latte", None, "tea", None] * 3, [None, None, "kl", None] * 3
    manifest = write_manifest(tmp_path / "m.json", texts, replay=use)
    settings = config(
        manifest,
        parameters={"lr_candidates": [1e-3], "lr_trial_steps": 2},
        guards={"every": 2, "held_out": 0.3, **LENIENT},
    )
    settings["model"]["train_ds"]["batch_size"] = 3
    settings["model"]["optim"] = {"name": "sgd", "lr": None, "momentum": 0.9, "sched": None}
    model.setup_feedback(settings, work_dir=tmp_path / "w", reward=label_reward)
    trial: list[Any] = []
    steps: list[tuple[bool, bool, bool, bool]] = []
    clipped: list[float] = []
    taken: list[type] = []
    train, split = lr_search._train, BatchReader.split

    def watched(self: Any, batch: Any) -> Any:
        parts = split(self, batch)
        found = (parts.labelled is not None, parts.replay is not None, parts.unlabeled is not None)
        steps.append((torch.is_autocast_enabled("cpu"), *found))
        return parts

    def spied(given: Any, batches: Any, rate: float) -> None:
        trial.append((len(batches), rate))
        precision = given.trainer.precision_plugin
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchReader, "split", watched)
            clip = precision.clip_gradients
            patch.setattr(
                precision,
                "clip_gradients",
                lambda o, v, *more: (clipped.append(v), taken.append(type(o)), clip(o, v, *more)),
            )
            train(given, batches, rate)

    monkeypatch.setattr(lr_search, "_train", spied)
    trainer = fit(model, steps=1, precision="bf16-mixed", gradient_clip_val=0.5, accumulate_grad_batches=2)
    assert trial == [(4, 1e-3)], "as many batches as two accumulated steps take"
    assert len(steps) == 4
    assert all(autocast for autocast, *_ in steps)
    assert all(any(step[k] for step in steps) for k in (1, 2, 3)), "labelled, replay and unlabeled rows"
    assert clipped == [0.5, 0.5]
    assert set(taken) == {torch.optim.SGD}
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3


def test_what_is_measured_is_measured_in_the_precision_of_the_run(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of the pool, the trial's loss and the held-out measurements were in fp32 whatever the run had."""
    manifest = write_manifest(tmp_path / "m.json", [None] * 8)
    guards = {"every": 1, "held_out": 0.3, "everyday": "en", "interpolation": 1.0, **LENIENT}
    settings = config(manifest, parameters={"lr_candidates": [1e-3], "lr_trial_steps": 1}, guards=guards)
    settings["model"]["optim"] = {"name": "sgd", "lr": None, "sched": None}
    mixed: dict[bool, int] = {}
    forward = type(model.encoder).forward_internal

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = torch.is_autocast_enabled("cpu")
        mixed[found] = mixed.get(found, 0) + 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.encoder), "forward_internal", watched)
    model.setup_feedback(settings, work_dir=tmp_path / "w", reward=label_reward)
    fit(model, steps=1, precision="bf16-mixed")
    assert list(mixed) == [True]
    assert mixed[True] > 10, "pool, trial, two measurements and the guard set"
    mixed.clear()
    again = restore(model._source_path, map_location="cpu")
    again.setup_feedback(settings, work_dir=tmp_path / "again", reward=label_reward)
    fit(again, steps=1)
    assert list(mixed) == [False]


def test_a_step_with_a_micro_batch_that_is_not_finite_is_skipped_whole(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bad micro-batch erased the gradients before it, and the step was taken with those behind it."""
    import lightning.pytorch as pl

    manifest = write_manifest(tmp_path / "m.json", [None] * 8)
    model.setup_feedback(config(manifest, lr=1e-2), work_dir=tmp_path / "w", reward=label_reward)
    objective, calls = losses.objective_loss, []

    def poisoned(settings: Any, logp: torch.Tensor, nbest: Any, *, head: str) -> Any:
        calls.append(head)
        return objective(settings, logp * float("nan") if len(calls) == 2 else logp, nbest, head=head)

    monkeypatch.setattr(mixin, "objective_loss", poisoned)
    seen: list[tuple[int, dict[str, torch.Tensor]]] = [(0, snapshot(model))]

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((trainer.global_step, snapshot(pl_module)))

    fit(model, steps=2, accumulate_grad_batches=2, callbacks=[Watch()])
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2]
    same = [all(torch.equal(v, seen[0][1][name]) for name, v in weights.items()) for _, weights in seen]
    assert same == [True, True, True, True, False]
    assert all(bool(torch.isfinite(value).all()) for value in seen[-1][1].values())
    assert model.nonfinite_steps == 0


def test_without_setup_a_restored_model_trains_as_the_stock_one(nemo_file: Any, tmp_path: Path) -> None:
    """Every hook of the mixin stays out of the way of a model that feedback was not set up for."""
    train_ds = config(write_manifest(tmp_path / "m.json", ["a latte", "one mocha"]))["model"]["train_ds"]
    stock = stock_class("ctc_bpe").restore_from(str(nemo_file("ctc_bpe")), map_location="cpu")
    ours = restore(nemo_file("ctc_bpe"), map_location="cpu")
    for trained in (stock, ours):
        torch.manual_seed(0)
        fit(trained, steps=2, train_ds=train_ds)
    for (key, a), (other, b) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b), key


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_cannot_be_right_are_refused_on_an_own_trainer(
    precision: str, model: Any, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model.setup_feedback(minimal(manifest, guards={"every": 0}), reward=label_reward)
    with pytest.raises(ConfigError, match=f"precision={precision} is not supported: use bf16-mixed"):
        fit(model, steps=1, precision=precision)


def test_accumulated_steps_are_measured_once_and_the_start_is_not(model: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 10)
    settings = minimal(manifest, guards={"every": 1, "held_out": 0.4, **LENIENT})
    model.setup_feedback(settings, reward=label_reward)
    trainer = fit(model, steps=2, accumulate_grad_batches=2)
    (guards,) = [callback for callback in trainer.callbacks if isinstance(callback, HeldOutEarlyStopping)]
    assert [found.step for found in guards.history] == [1, 2]


def test_a_batch_without_a_pseudo_label_is_no_fault_where_the_encoder_is_frozen(model: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    objective = {"name": "self_training", "augment": True, "min_confidence": 0.999}
    settings = minimal(manifest, guards={"every": 0}, objective=objective, parameters={"freeze_encoder": True})
    model.setup_feedback(settings, reward=label_reward)
    before = snapshot(model)
    fit(model, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_rates_per_part_of_an_earlier_run_are_not_those_of_this_one(model: Any, tmp_path: Path) -> None:
    """The base's configuration keeps them, and its encoder learned at another rate than the plan said."""
    with open_dict(model.cfg):
        model.cfg.optim_param_groups = {"encoder": {"lr": 1e-9}}
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model.setup_feedback(minimal(manifest, guards={"every": 0}), reward=label_reward)
    assert "optim_param_groups" not in model.cfg
