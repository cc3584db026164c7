"""A run of several generations: the best weights of one teach the next; replay and guards keep to the base."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import begin, config, fit, label_reward
from helpers.ranks import run_ranks
from helpers.runs import run
from helpers.tiny import write_manifest

from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.config.run import parse_run_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.training import setup as training_setup
from nemo_llm_feedback.training.callbacks.early_stopping import HeldOutEarlyStopping
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator
from nemo_llm_feedback.training.generations import next_generation
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.weights import Weights, snapshot

NAN = math.nan
LOOSE = {"every": 1, "held_out": 0.3, "patience": 0, "max_kl": 1e6, "max_length_ratio": 1e6, "max_empty_rise": 1.0}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("data") / "m.json", [None] * 8, seconds=0.8)


class HeardText:
    """A function of the text, and of what the audio says of it."""

    name = "heard"

    def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
        rows = [
            [sum(map(ord, text)) % 11 + logp for text, logp in zip(g.texts, g.ref_logp, strict=True)] for g in groups
        ]
        return RewardOutput(pad_groups(rows), {})


def prepared(nemo: Path, manifest: Path, *, generations: int = 2, reward: Any = label_reward, **sections: Any) -> Any:
    """A model whose run has some generations."""
    model = restore(nemo, map_location="cpu")
    feedback = config(manifest)["feedback"] | {"generations": generations}
    settings = config(manifest, **({"guards": LOOSE} | sections), feedback=feedback)
    settings["model"]["optim"]["sched"] = {"name": "CosineAnnealing", "warmup_steps": 0, "min_lr": 0.0}
    model.setup_feedback(settings, reward=reward)
    return model


def scripted(monkeypatch: pytest.MonkeyPatch, gains: list[float], **beyond: float) -> dict[int, Any]:
    """Held-out measurements find these gains in order; step → weights, rate and teacher when it was measured."""
    script, seen, measure = iter(gains), {}, HeldOutEvaluator.measure

    def measured(self: HeldOutEvaluator, model: Any, *, step: int) -> Any:
        rate = model.trainer.optimizers[0].param_groups[0]["lr"]
        seen[step] = (snapshot(model), rate, model.feedback.teacher)
        gain = next(script)
        return dataclasses.replace(measure(self, model, step=step), gain=gain, gains=(gain,) * 4, **beyond)

    monkeypatch.setattr(HeldOutEvaluator, "measure", measured)
    return seen


def stopping(model: Any) -> HeldOutEarlyStopping:
    return next(callback for callback in model.trainer.callbacks if isinstance(callback, HeldOutEarlyStopping))


def same(left: Weights, right: Weights) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def scores(parts: Any, head: Any, audio: Any) -> torch.Tensor:
    """log p of some labels by the policy or a frozen copy."""
    with torch.no_grad(), evaluation_mode(parts) if isinstance(parts, torch.nn.Module) else torch.no_grad():
        encoded, lengths = encode(parts, audio.signal, audio.signal_len)
        return head.score(encoded, lengths, [[(1, 2), (3,)]] * len(audio.utterances))


def test_the_kept_weights_teach_the_second_generation_and_the_base_stays_the_reference(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [1.0, 2.0, 1.0, 0.5, 0.0, NAN])
    model = prepared(nemo_file("ctc_bpe"), manifest)
    base = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    fit(model, steps=6)
    feedback, found = model.feedback, stopping(model)
    assert (feedback.generation.number, feedback.generation.began) == (2, 3)
    assert [measured.generation for measured in found.history] == [1, 1, 1, 2, 2, 2]
    assert all(torch.equal(base[name], value) for name, value in feedback.reference.encoder.state_dict().items())
    assert seen[3][2] is feedback.reference
    assert seen[4][2] is feedback.teacher is not feedback.reference
    assert same(feedback.generation.weights, seen[2][0]), "the best of the first generation, not its last"
    teacher = feedback.teacher.encoder.state_dict()
    kept = {name.removeprefix("encoder."): v for name, v in seen[2][0].items() if name.startswith("encoder.")}
    assert all(torch.equal(teacher[name], value) for name, value in kept.items())
    assert feedback.maker._reference is feedback.teacher
    assert [seen[step][1] for step in (4, 5, 6)] == [seen[step][1] for step in (1, 2, 3)], "a schedule of its own"
    assert seen[3][1] == 0.0
    assert (found.kept_step, found.kept_generation, found.kept_gain) == (4, 2, 0.5), "a gain over the new teacher"
    assert same(snapshot(model), seen[4][0])


@pytest.mark.parametrize(
    ("gains", "steps", "kept", "reason"),
    [
        ([1.0, 2.0, 1.0, -1.0, 0.0, NAN], 6, (2, 1), ""),  # the second gained nothing: the first one's weights
        ([0.0, -1.0, NAN], 3, (0, 1), "generation 1 gained nothing"),
    ],
)
def test_a_generation_without_gain_leaves_the_weights_of_the_one_before(
    gains: list[float],
    steps: int,
    kept: tuple[int, int],
    reason: str,
    nemo_file: Any,
    manifest: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = scripted(monkeypatch, gains)
    model = prepared(nemo_file("ctc_bpe"), manifest)
    start = snapshot(model)
    trainer = fit(model, steps=6)
    found = stopping(model)
    assert (trainer.global_step, found.reason) == (steps, reason)
    assert (found.kept_step, found.kept_generation) == kept
    assert same(snapshot(model), seen[kept[0]][0] if kept[0] else start)


def test_patience_begins_the_next_generation_at_once(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [2.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    model = prepared(nemo_file("ctc_bpe"), manifest, guards=LOOSE | {"patience": 2})
    trainer = fit(model, steps=10)
    assert model.feedback.generation.began == 3
    assert (trainer.global_step, stopping(model).kept_step, stopping(model).reason) == (8, 8, "")


def test_a_guard_ends_the_run_in_any_generation(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1.0, 2.0, 3.0, 4.0], kl=0.5)
    limits = {"max_kl": 0.1}
    model = prepared(nemo_file("ctc_bpe"), manifest, guards=LOOSE | limits)
    trainer = fit(model, steps=6)
    assert (trainer.global_step, model.feedback.generation.number) == (1, 1)
    assert "distance from the starting model" in stopping(model).reason


def test_a_pool_that_teaches_nothing_more_ends_the_run_with_what_it_has(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [1.0, 2.0, 1.0])
    model, measure, calls = prepared(nemo_file("ctc_bpe"), manifest), training_setup.measure_pool, []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        found = measure(*args, **kwargs)
        return found if len(calls) == 1 else dataclasses.replace(found, signal_fraction=0.0)

    monkeypatch.setattr(training_setup, "measure_pool", once)
    trainer = fit(model, steps=6)
    assert trainer.global_step == 3
    assert "generation 2 has nothing to learn from: no utterance" in stopping(model).reason
    assert same(snapshot(model), seen[2][0])


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("ctc_bpe", {"lora_rank": 2}), ("rnnt_bpe", {}), ("tdt_bpe", {}), ("hybrid_bpe", {"freeze_encoder": True})],
)
def test_the_teacher_scores_as_the_policy_did_and_drift_is_still_from_the_base(
    kind: str, parameters: dict[str, Any], nemo_file: Any, manifest: Path
) -> None:
    model = prepared(nemo_file(kind), manifest, generations=1, reward=HeardText(), parameters=parameters)
    first = begin(model)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    with evaluation_mode(model):
        second = next_generation(model, model.feedback_setup, first, model.encoded_pool())
    audio = HeldOutEvaluator(model, first).audio[0]
    frozen = scores(second.teacher, second.teacher.heads[0], audio)
    assert torch.allclose(frozen, scores(model, second.heads[0], audio), atol=1e-4)
    base = scores(second.reference, second.reference.heads[0], audio)
    assert not torch.allclose(frozen, base, atol=1e-2)
    old = HeldOutEvaluator(model, first).measure(model, step=1)
    new = HeldOutEvaluator(model, second).measure(model, step=1)
    assert new.gain == 0.0, "the policy is its own teacher"
    assert (new.changed, new.length_ratio) == (old.changed, old.length_ratio)
    assert new.kl == pytest.approx(old.kl, rel=1e-3)
    assert new.changed > 0
    assert old.gain != 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    later = scores(second.teacher, second.teacher.heads[0], audio)
    assert torch.allclose(later, frozen, atol=1e-2), "frozen"
    assert not torch.allclose(later, scores(model, second.heads[0], audio), atol=0.1)


def test_what_the_pool_sets_is_measured_anew_and_the_old_state_is_left_as_it_was(
    nemo_file: Any, manifest: Path
) -> None:
    model = prepared(nemo_file("ctc_bpe"), manifest, generations=1)
    first = begin(model)
    first = dataclasses.replace(first, statistics=dataclasses.replace(first.statistics, learning_rate=0.5))
    old = (first.maker, first.statistics, first.config, first.teacher)
    torch.nn.init.normal_(model.decoder.decoder_layers[0].weight)
    with evaluation_mode(model):
        second = next_generation(model, model.feedback_setup, first, model.encoded_pool())
    assert (first.maker, first.statistics, first.config, first.teacher) == old
    assert second.statistics.learning_rate == 0.5, "the rate is chosen once"
    assert second.statistics != first.statistics
    groups = [found.cache.get(list(first.cache._rows)).ref_logp["ctc"] for found in (first, second)]
    assert groups[0].shape != groups[1].shape or not torch.allclose(*groups), "proposed and scored anew"


SETTINGS = [
    "model.optim.name=sgd",
    "~model.optim.betas",
    "model.optim.lr=0.02",
    "++model.optim.sched={name: CosineAnnealing, warmup_steps: 1, min_lr: 0.0}",
    "model.train_ds.shuffle=true",
    "proposals.samples=2",
    "feedback.refresh_every=2",
    "feedback.generations=2",
    "guards.every=2",
    "guards.patience=0",
    "guards.max_kl=100",
    "guards.max_length_ratio=100",
    "guards.held_out=0.2",
    "parameters.ema_decay=0.5",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
    "exp_manager.create_tensorboard_logger=false",
    "trainer.max_steps=6",
]


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_that_is_killed_in_any_generation_goes_on_as_if_nothing_had_happened(
    step: int, nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest(tmp_path / "m.json", ["a latte", None, None, "one mocha", None, None, None], seconds=0.8)
    scripted(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    command = (nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "runs", *SETTINGS)
    whole = run(*command)
    assert (whole.generation, whole.steps) == (2, 6)
    wanted = (whole.log_dir / "steps.jsonl").read_text().splitlines()
    weights = {name: value.clone() for name, value in _state(whole.nemo).items()}
    (whole.log_dir / "result.json").unlink()
    for path in (whole.log_dir / "checkpoints").glob("*.ckpt"):
        if f"global_step={step}" not in path.name or "last" in path.name:
            path.unlink()
    parts = run(*command)
    assert parts.log_dir == whole.log_dir
    assert parts.generation == 2
    for line, other in zip(
        _numbers((parts.log_dir / "steps.jsonl").read_text().splitlines()), _numbers(wanted), strict=True
    ):
        assert line == pytest.approx(other, rel=1e-4)
    for name, value in _state(parts.nemo).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


def _state(nemo: Path) -> Any:
    from helpers.runs import weights

    return weights(nemo)


def _numbers(lines: list[str]) -> list[dict[str, float]]:
    """The lines of the step log without the clock and scripted gains."""
    gone = ("seconds", "held_out/gain", "feedback/cache_hit_rate")
    return [{k: v for k, v in json.loads(line).items() if k not in gone} for line in lines]


@pytest.mark.slow
def test_two_ranks_go_through_the_generations_together(nemo_file: Any, manifest: Path, tmp_path: Path) -> None:
    found = run_ranks("generations", tmp_path, nemo_file("ctc_bpe"), manifest)
    assert not any("error" in rank for rank in found), found
    assert [(rank["number"], rank["began"]) for rank in found] == [(2, 2), (2, 2)]
    for name, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][name]), name
    assert same(found[0]["teacher"], found[1]["teacher"])


def test_generations_that_cannot_be_are_refused_before_any_work(nemo_file: Any, manifest: Path) -> None:
    with pytest.raises(ConfigError, match=r"feedback.generations must be > 0, got 0"):
        parse_run_config(config(manifest, feedback={"generations": 0}))
    with pytest.raises(ConfigError, match=r"feedback.generations=2 needs held-out measurements.*guards.every"):
        parse_run_config(config(manifest, feedback={"generations": 2}))
    for steps, said in ((2, "is 2"), (-1, "is not set")):
        model = prepared(nemo_file("ctc_bpe"), manifest, generations=3)
        with pytest.raises(ConfigError, match=f"splits trainer.max_steps, which {said}: set it to 3 or more"):
            fit(model, steps=steps, max_epochs=1)
