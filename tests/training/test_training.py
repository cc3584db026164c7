"""A run that is left alone: guards, choice of weights, what is trained, precision and memory."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import arguments, weights
from helpers.tiny import write_manifest

from nemo_llm_feedback.cli.jobs.adapt import AdaptResult, adapt
from nemo_llm_feedback.cli.jobs.start import trainer_settings
from nemo_llm_feedback.core.config import GuardConfig, ProposalConfig, RunConfig
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.run_folder import read_steps
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.training import pool
from nemo_llm_feedback.training.callbacks.early_stopping import HeldOutEarlyStopping
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics, text_drift, violations
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator
from nemo_llm_feedback.training.mixin import LLMFeedbackMixin
from nemo_llm_feedback.training.weights import MovingAverage, interpolated, put_back, snapshot

POOL: list[str | None] = [None] * 6


def run(nemo: Path, llm: Path, folder: Path, *more: str, texts: Any = POOL) -> AdaptResult:
    """A run whose guards are on, on a pool of six rows that the guards watch too."""
    manifest = write_manifest(folder / "pool.json", texts)
    overrides = arguments(nemo, manifest, llm, folder, "guards.every=5", "trainer.max_steps=20", *more)
    return adapt(compose_config(overrides))


@pytest.mark.parametrize("reward", ["length", "negative_length", "tests_repeated:reward"])
def test_a_hacked_reward_is_caught_within_20_steps_and_the_model_is_unharmed(
    reward: str, nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests_repeated.py").write_text(
        "from nemo_llm_feedback.rewards import RuleReward\nfrom nemo_llm_feedback.rewards.rules import repetition\n"
        "def reward():\n    return RuleReward('repeats', lambda text: 20 * repetition(text))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run(
        nemo_file("ctc_bpe"),
        tiny_llm,
        tmp_path,
        f"reward.name={reward}",
        "model.optim.lr=1e-2",
        "objective.temperature=0.1",
        "proposals.samples=8",
        "guards.patience=0",
    )
    assert "limit" in result.ended, result.history
    assert all(
        torch.equal(value, weights(nemo_file("ctc_bpe"))[name]) for name, value in weights(result.nemo).items()
    ), "no measurement passed, so the start must come back"


def test_what_texts_tell_and_which_limits_they_break() -> None:
    start = ["a latte with soy", "one mocha", "tea"]
    same = text_drift(start, start)
    assert all(value == (name == "length_ratio") for name, value in same.items())
    drift = text_drift(["a latte. With SOY!", "tea tea tea tea", ""], start)
    assert drift["length_ratio"] == pytest.approx(8 / 7)
    assert drift["empty_rise"] == pytest.approx(1 / 3)
    assert drift["repetition_rise"] == pytest.approx(1 / 3)
    assert drift["changed"] == 1
    characters = len("alatte.WithSOY!teateateatea")
    assert drift["style_change"] == pytest.approx(max(4, 2) / characters)

    fine = HeldOutMetrics(1, 1.0, 1.0, 0.0, 0.0, 0.0, 0.1, 0.5, 0.5)
    assert violations(fine, GuardConfig()) == []  # the guard set's WER is mended by interpolation
    assert "guard set" in violations(fine, GuardConfig(interpolation=1.0))[0]
    for field, value in (
        ("length_ratio", 0.5),
        ("length_ratio", 2.0),
        ("empty_rise", 0.5),
        ("repetition_rise", 0.5),
        ("style_change", 0.2),
        ("kl", 9.0),
    ):
        assert len(violations(HeldOutMetrics(**{**vars(fine), field: value}), GuardConfig())) == 1, field


def test_a_measurement_that_the_reward_cannot_judge_is_no_gain() -> None:
    gains = iter([1.0, math.nan, 0.5, 2.0])
    model = torch.nn.Linear(1, 1)
    evaluator: Any = SimpleNamespace(
        rewarded=True,
        start_wer=None,
        measure=lambda model, step: HeldOutMetrics(step, next(gains), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, math.nan),
    )
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[], callbacks=[], global_step=0)
    setup: Any = SimpleNamespace(
        config=RunConfig(),
        held_out_rows=tuple,
        staged=SimpleNamespace(held_out=()),
        guard_rows=(),
        start=snapshot(model),
    )
    stopping = HeldOutEarlyStopping(setup)
    stopping._evaluator = evaluator
    kept = []
    for step in range(1, 5):
        torch.nn.init.constant_(model.weight, step)
        stopping._measure(trainer, model, step)
        kept.append(float(stopping.state_dict()["best"]["weight"]))
    assert kept == [1, 1, 1, 4]
    resumed = HeldOutEarlyStopping(setup)
    resumed.load_state_dict({**stopping.state_dict(), "start_wer": None})
    assert float(resumed.state_dict()["best"]["weight"]) == 4


@pytest.mark.parametrize(
    ("every", "steps", "interval"),
    [(None, 100, 10), (None, 200, 12), (None, 612, 38), (None, math.inf, 10), (5, 612, 5)],
)
def test_measurements_are_a_share_of_the_run_unless_their_interval_is_named(
    every: Any, steps: float, interval: int
) -> None:
    assert GuardConfig(every=every).interval(steps) == interval
    assert GuardConfig(every=every).measures
    assert not GuardConfig(every=0).measures


def test_a_run_without_a_named_interval_measures_by_its_length(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    lenient = ("guards.max_kl=1e3", "guards.max_length_ratio=1e3", "guards.max_empty_rise=1", "guards.patience=0")
    result = run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, "guards.every=null", "trainer.max_steps=20", *lenient)
    assert [found.step for found in result.history] == [10, 20]


def test_lhotse_is_split_over_ranks_by_itself_only() -> None:
    for use_lhotse in (True, False):
        cfg = compose_config(["model.train_ds.manifest_filepath=m", f"model.train_ds.use_lhotse={use_lhotse}"])
        assert trainer_settings(cfg).get("use_distributed_sampler") is (False if use_lhotse else None)


@pytest.mark.parametrize("more", [[], ["model.validation_ds.manifest_filepath=d", "trainer.limit_val_batches=0"]])
def test_without_validation_lightning_gets_no_interval_of_it(more: list[str]) -> None:
    """It refuses an interval that is longer than the data."""
    settings = trainer_settings(compose_config(["model.train_ds.manifest_filepath=m", *more]))
    assert (settings["limit_val_batches"], settings["val_check_interval"]) == (0, None)


def test_weights_are_kept_put_back_interpolated_and_averaged() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    start = snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
        model[1].running_mean += 2
    end = snapshot(model)
    half = interpolated(start, end, 0.5)
    assert torch.allclose(half["0.weight"], start["0.weight"] + 0.5)
    assert torch.allclose(half["1.running_mean"], torch.ones(2))
    put_back(model, start)
    assert torch.equal(model[0].weight, start["0.weight"])
    assert model[1].running_mean.sum() == 0
    average = MovingAverage(0.5, snapshot(model), torch.device("cpu"))
    put_back(model, end)
    average.update(model)  # n = 1: d = 1 / 10
    assert torch.allclose(average.weights["0.weight"], start["0.weight"] + 0.9)
    low = {"x.lora_A.default.weight": torch.ones(1), "x.lora_B.default.weight": torch.ones(1)}
    zero = {name: torch.zeros(1) for name in low}
    scaled = interpolated(zero, low, 0.25)  # B·A scales linearly
    assert scaled["x.lora_A.default.weight"] * scaled["x.lora_B.default.weight"] == 0.25


@pytest.fixture(scope="module")
def trained(nemo_file: Any, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that adapts the tiny hybrid for two steps without guards, at a constant rate by SGD."""

    def make(*more: str, kind: str = "hybrid_bpe", texts: Any = POOL) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("trained")
        sgd = ("model.optim.name=sgd", "~model.optim.betas", "model.optim.lr=1e-2", "trainer.max_steps=2")
        common = ("guards.every=0", "model.train_ds.shuffle=false", *sgd)
        return weights(run(nemo_file(kind), tiny_llm, folder, *common, *more, texts=texts).nemo)

    return make


@pytest.mark.slow
def test_a_frozen_encoder_stays_and_parts_learn_at_their_own_rates(trained: Any, nemo_file: Any) -> None:
    base = weights(nemo_file("hybrid_bpe"))
    # Its BatchNorm is in train mode in NeMo's step on labelled rows, whose statistics it would take over.
    mixed = [None, None, "a latte", "one mocha"]
    tdt = trained("parameters.freeze_encoder=true", kind="tdt_bpe", texts=mixed)
    assert all(torch.equal(v, tdt[n]) for n, v in weights(nemo_file("tdt_bpe")).items() if n.startswith("encoder"))
    frozen = trained("parameters.freeze_encoder=true", texts=mixed)
    moved = {name for name in base if not torch.equal(base[name], frozen[name])}
    assert moved
    assert not any(name.startswith("encoder") for name in moved)
    plain = trained("trainer.max_steps=1")
    grouped = trained("trainer.max_steps=1", "model.optim_param_groups.encoder.lr=1e-3")
    for part, factor in (("encoder.", 0.1), ("joint.", 1.0)):
        name = max((n for n in base if n.startswith(part)), key=lambda n: float((plain[n] - base[n]).abs().max()))
        torch.testing.assert_close(
            grouped[name] - base[name], factor * (plain[name] - base[name]), rtol=0.02, atol=1e-7
        )
    with pytest.raises(ConfigError, match="no such part"):
        trained("model.optim_param_groups.encodr.lr=1e-3")


def test_lora_is_merged_into_stock_names_and_equals_the_trained_model(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    from nemo.collections.asr.models import ASRModel

    from nemo_llm_feedback.asr.lora import inject, merged_state_dict
    from nemo_llm_feedback.cli.jobs.export import export
    from nemo_llm_feedback.training.models import restore

    more = ("parameters.lora_rank=2", "guards.every=0", "trainer.max_steps=2", "model.optim.lr=1e-2")
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    result = run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, *more, every)
    base, adapted = weights(nemo_file("ctc_bpe")), weights(result.nemo)
    assert adapted.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], adapted[name])}
    assert any("linear" in name for name in changed)
    assert not any("encoder.pre_encode.conv" in name or "norm" in name for name in changed)

    stock = ASRModel.restore_from(str(result.nemo), map_location="cpu").eval()
    model = restore(nemo_file("ctc_bpe"), map_location="cpu").eval()
    inject(model, rank=2, alpha=16)
    last = torch.load(next(result.log_dir.rglob("*-last.ckpt")), map_location="cpu", weights_only=False)
    model.load_state_dict(last["state_dict"])
    signal, length = torch.randn(1, 16000) * 0.1, torch.tensor([16000])
    torch.testing.assert_close(
        stock(input_signal=signal, input_signal_length=length)[0],
        model(input_signal=signal, input_signal_length=length)[0],
        rtol=1e-4,
        atol=1e-5,
    )
    assert all(torch.equal(value, adapted[name]) for name, value in merged_state_dict(model).items())
    exported = export(next(result.log_dir.rglob("*-last.ckpt")), output=tmp_path / "exported.nemo")
    assert all(torch.equal(value, adapted[name]) for name, value in weights(exported).items())


def test_batchnorm_statistics_stay_in_feedback_steps_unless_asked(trained: Any, nemo_file: Any) -> None:
    base = weights(nemo_file("ctc_bpe"))
    names = [name for name in base if "running_" in name]
    assert names
    for more, frozen in (
        (("objective=distill",), True),
        (("objective=self_training",), True),
        (("objective=self_training", "parameters.freeze_batchnorm=false"), False),
    ):
        after = trained(*more, kind="ctc_bpe")
        assert all(torch.equal(base[n], after[n]) for n in names) is frozen, more


def test_two_accumulated_halves_are_one_batch(trained: Any) -> None:
    clean = ("trainer.max_steps=1", "feedback.augment=false")
    whole = trained(*clean, "model.train_ds.batch_size=4", kind="ctc_bpe", texts=[None] * 4)
    halves = trained(
        *clean,
        "model.train_ds.batch_size=2",
        "++trainer.accumulate_grad_batches=2",
        kind="ctc_bpe",
        texts=[None] * 4,
    )
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_recomputed_layers_learn_the_same(trained: Any) -> None:
    plain, recomputed = trained(), trained("parameters.recompute_encoder=true")
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=1e-5, atol=1e-7)


def test_bf16_mixed_learns_nearly_the_same_with_a_lattice_in_fp32(
    trained: Any, nemo_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.asr.heads import CTCHead

    base = weights(nemo_file("ctc_bpe"))  # oneDNN has no bf16 LSTM on every CPU
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    honest = CTCHead.log_prob

    def watched(self: Any, encoded: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        logp = honest(self, encoded, *args, **settings)
        if logp.requires_grad:
            seen.add((encoded.dtype, logp.dtype))
        return logp

    full = trained(kind="ctc_bpe")
    monkeypatch.setattr(CTCHead, "log_prob", watched)
    mixed_precision = trained("trainer.precision=bf16-mixed", kind="ctc_bpe")
    assert seen == {(torch.bfloat16, torch.float32)}
    with pytest.raises(ConfigError, match="bf16-mixed, or 32"):
        trained("trainer.precision=16-mixed", kind="ctc_bpe")
    assert all(torch.isfinite(value).all() for value in mixed_precision.values())
    change = torch.cat([(full[n] - base[n]).flatten() for n in base if base[n].is_floating_point()])
    other = torch.cat([(mixed_precision[n] - base[n]).flatten() for n in base if base[n].is_floating_point()])
    assert torch.cosine_similarity(change, other, dim=0) > 0.9


def test_a_step_that_is_not_finite_is_skipped_and_three_end_the_run(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, bad = LLMFeedbackMixin.feedback_loss, {2}

    def poisoned(self: Any, *args: Any) -> Any:
        loss = honest(self, *args)
        if self.trainer.global_step in bad:
            loss.join(loss, weight=math.nan)
        return loss

    monkeypatch.setattr(LLMFeedbackMixin, "feedback_loss", poisoned)
    result = run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, "trainer.max_steps=6", "guards.every=0")
    assert result.ended == ""
    assert all(torch.isfinite(v).all() for v in weights(result.nemo).values())
    bad |= {3, 4, 5}
    result = run(nemo_file("ctc_bpe"), tiny_llm, tmp_path / "b", "trainer.max_steps=20", "guards.every=0")
    assert "3 steps in a row" in result.ended
    assert json.loads((result.log_dir / "result.json").read_text())["ended"] == result.ended


def test_the_update_is_interpolated_down_to_what_the_guard_set_bears(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, name = weights(nemo_file("ctc_bpe")), "decoder.decoder_layers.0.weight"
    ends: list[torch.Tensor] = []

    def wer_rise(self: Any, model: Any) -> float:
        """Rises by 10 % over the whole update, in proportion to how much of it the weights hold."""
        now = dict(model.named_parameters())[name].detach() - base[name]
        ends.append(now.norm())
        return 0.1 * float(now.norm() / max(*ends, torch.tensor(1e-9)))

    monkeypatch.setattr(HeldOutEvaluator, "wer_rise", wer_rise)
    monkeypatch.setattr(HeldOutEvaluator, "_gains", lambda self, now: [1.0] * len(now.texts))
    guard = write_manifest(tmp_path / "guard.json", ["a latte", "one mocha to go"])
    more = (f"guards.manifest_filepath={guard}", "guards.max_wer_rise=0.045", "guards.max_kl=1e3")
    result = run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, "trainer.max_steps=5", *more)
    assert result.share == 0.4
    moved = (weights(result.nemo)[name] - base[name]).norm()
    assert math.isclose(float(moved / max(ends)), 0.4, rel_tol=1e-4)


@pytest.mark.parametrize("objective", ["gspo", "distill"])
def test_a_phase_of_its_own_has_the_llm_in_memory_only_while_the_pool_is_scored(
    objective: str, nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.llm.scorer import LLMScorer
    from nemo_llm_feedback.training import mixin

    seen: list[tuple[int, int, bool]] = []
    moved: list[float] = []
    learned, loss = LLMFeedbackMixin.feedback_loss, mixin.objective_loss

    def watched(self: Any, *args: Any) -> Any:
        feedback = self.feedback
        seen.append((self.trainer.global_step, len(feedback.cache), feedback.scorer.loaded))
        return learned(self, *args)

    def compared(config: Any, logp: torch.Tensor, nbest: NBestBatch, *, head: str) -> Any:
        moved.append(abs(float(logp[0, 0]) - float(nbest.old_logp[head][0, 0])))
        return loss(config, logp, nbest, head=head)

    unloads: list[LLMScorer] = []
    unload = LLMScorer.unload
    monkeypatch.setattr(LLMScorer, "unload", lambda self: (unloads.append(self), unload(self))[1])
    monkeypatch.setattr(LLMFeedbackMixin, "feedback_loss", watched)
    monkeypatch.setattr(mixin, "objective_loss", compared)
    more = (
        "feedback.augment=false",
        "llm.phase=cached",
        "feedback.refresh_every=2",
        "trainer.max_steps=4",
        "guards.every=0",
        f"objective={objective}",
    )
    run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, *more)
    assert seen == [(step, len(POOL), False) for step in range(4)]
    assert len(unloads) == 2  # two refreshes
    # Ratios are to the policy that proposed a group, not to the one that first learns from it. Objectives without
    # ratios need none; only what is measured on the pool is scored all the same.
    assert max(moved[0], moved[2]) < 1e-4, moved
    assert min(moved[1], moved[3]) > 1e-3 if objective == "gspo" else moved[3] == 0, moved


def test_a_pool_of_several_manifests_is_scored_once_by_lhotse(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo's Lhotse loader repeats a list of manifests for ever; the run sat before its first step."""
    made: list[str] = []
    make = NBestMaker.make
    monkeypatch.setattr(
        NBestMaker, "make", lambda self, audio, *rest: made.extend(audio.utterances) or make(self, audio, *rest)
    )
    manifests = [write_manifest(tmp_path / f"{name}.json", [None] * 3) for name in "ab"]
    lhotse = ("model.train_ds.use_lhotse=true", "+model.train_ds.use_bucketing=false", "llm.phase=cached")
    more = (
        f"model.train_ds.manifest_filepath=[{','.join(map(str, manifests))}]",
        "guards.every=0",
        "trainer.max_steps=3",
    )
    run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, *lhotse, *more, "reward.alpha=1", "feedback.refresh_every=10")
    assert len(made) == len(set(made)) == 6


@pytest.mark.parametrize("objective", ["distill", "grpo"])
def test_measurements_and_the_trial_leave_no_llm_in_memory_that_works_between_the_steps(
    objective: str, nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement loaded it, and it stayed beside the activations of the steps behind."""
    measured: list[bool] = []
    stepped: list[bool] = []
    gains, step = HeldOutEvaluator._gains, LLMFeedbackMixin.training_step

    def asks(self: Any, now: Any) -> Any:
        self._feedback.scorer.load()
        measured.append(self._feedback.scorer.loaded)
        return gains(self, now)

    def watched(self: Any, *args: Any) -> Any:
        stepped.append(self.feedback.scorer.loaded)
        return step(self, *args)

    monkeypatch.setattr(HeldOutEvaluator, "_gains", asks)
    monkeypatch.setattr(LLMFeedbackMixin, "training_step", watched)
    trial = ("model.optim.lr=null", "parameters.lr_candidates=[1e-4,2e-4]", "parameters.lr_trial_steps=1")
    more = (
        "llm.phase=cached",
        "feedback.refresh_every=10",
        "trainer.max_steps=3",
        "guards.every=1",
        "guards.max_kl=1e9",
        f"objective={objective}",
    )
    run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, *trial, *more)
    assert measured == [True] * 5
    assert stepped == [False] * 5


def test_the_strength_of_boosting_is_the_one_with_the_best_rewarded_members() -> None:
    best = {0.5: 1.0, 1.0: 3.0, 2.0: 3.04}  # the last two are equal to a tenth: the weaker is taken

    def build(config: RunConfig) -> Any:
        values = [best[config.proposals.boosting_weight], float("nan"), -5.0]
        made = SimpleNamespace(rewards={"ctc": torch.tensor([values, values])})
        return SimpleNamespace(make=lambda *args: made, proposer=SimpleNamespace(same_weights=nullcontext))

    def chosen(context: Context) -> float:
        audio = SimpleNamespace(utterances=("a", "b"), contexts=(context,))
        share: Any = [pool.EncodedAudio(audio, None, None)]  # type: ignore[arg-type]
        return pool._with_boosting(pool.PoolShare(share, build), RunConfig(), head="ctc").proposals.boosting_weight

    mocha = Context(terms=("mocha",))
    assert chosen(mocha) == 1.0
    best[0.5] = 9.0
    assert chosen(mocha) == 0.5
    assert chosen(Context("no terms")) == ProposalConfig.boosting_weight


def test_the_learning_rate_with_the_greatest_fall_of_the_held_out_loss_is_taken(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, name, moved = weights(nemo_file("ctc_bpe")), "decoder.decoder_layers.0.weight", []

    def loss(self: Any, model: Any) -> float:
        """Falls most where the weights have moved by the second of the three rates."""
        moved.append(float((dict(model.named_parameters())[name].detach() - base[name]).norm()))
        return [9.0, 8.0, 6.0, 7.0][len(moved) - 1]

    monkeypatch.setattr("nemo_llm_feedback.training.callbacks.lr_search.HeldOutLoss.__call__", loss)
    more = ("parameters.lr_candidates=[1e-4,4e-4,2e-4]", "parameters.lr_trial_steps=2", "guards.max_kl=1e9")
    schedule = "model.optim.sched={name: CosineAnnealing, warmup_steps: 1, min_lr: 0.0}"
    steps = ("trainer.max_steps=3", "guards.every=3", "proposals.samples=2", schedule)
    result = run(nemo_file("ctc_bpe"), tiny_llm, tmp_path, "model.optim.lr=null", *more, *steps)
    assert 0 == moved[0] < moved[1] < moved[2] < moved[3]
    assert result.learning_rate == 2e-4
    # The trials left no trace: the run has its schedule and learns what it does where the rate is given.
    plain = run(nemo_file("ctc_bpe"), tiny_llm, tmp_path / "plain", *more[1:], "model.optim.lr=2e-4", *steps)
    rates = [[line["lr"] for line in read_steps(r.log_dir / "steps.jsonl") if "lr" in line] for r in (result, plain)]
    assert rates[0] == rates[1]
    assert max(rates[0]) == pytest.approx(2e-4)
    assert len(set(rates[0])) > 1
    assert all(torch.equal(value, weights(plain.nemo)[key]) for key, value in weights(result.nemo).items())
