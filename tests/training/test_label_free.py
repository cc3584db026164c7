"""What a run without any label takes from its pool: the weights of the reward and the learning rate."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fits import begin, config, label_reward
from helpers.ranks import run_ranks
from helpers.runs import MIXED, arguments, run
from helpers.tiny import write_manifest
from omegaconf import OmegaConf

from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.cli.jobs.start import reward_line
from nemo_llm_feedback.core.config import RewardConfig, parse_run_config
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.run_folder import read_steps
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.hypotheses.nbest import NBestBatch, NBestCache
from nemo_llm_feedback.hypotheses.reward_scale import from_spread
from nemo_llm_feedback.hypotheses.trust import Trust
from nemo_llm_feedback.training import setup as preparation
from nemo_llm_feedback.training.callbacks import lr_search
from nemo_llm_feedback.training.callbacks.lr_search import HeldOutLoss, choose_rate, smallest_good
from nemo_llm_feedback.training.inputs import rates_to_try
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.state import PoolStatistics

STEP = "trainer.max_steps=1"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("data") / "mixed.json", MIXED)


def test_the_spread_of_the_pool_weighs_the_llm(
    nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[NBestBatch] = []
    get = NBestCache.get

    def spied(*args: Any) -> NBestBatch:
        seen.append(get(*args))
        return seen[-1]

    monkeypatch.setattr(NBestCache, "get", spied)
    result = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path, STEP)
    statistics = json.loads((result.log_dir / "pool_statistics.json").read_text())
    # One boosting weight, so that the groups that are described are those that set the scale.
    wanted = from_spread(statistics["spread"], RewardConfig())
    assert (statistics["alpha"], statistics["beta"]) == wanted
    assert wanted[0] != 1.0
    assert seen, "no group was learned from"
    for found in seen:
        values = wanted[0] * found.parts["llm"] + found.parts["asr"] + wanted[1] * found.parts["length"]
        torch.testing.assert_close(found.rewards["ctc"], values, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert f"alpha {wanted[0]:g}, beta {wanted[1]:g}" in result.nemo.with_suffix(".md").read_text()


def test_the_spread_of_the_pool_weighs_listed_terms_too(
    nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path
) -> None:
    """`reward=entity` stands in the LLM's place and is scaled by its own spread, length bonus included."""
    entity = ("reward=entity", "reward.settings.weight=3", "context.terms=[latte,mocha]")
    result = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path, *entity, STEP)
    statistics = json.loads((result.log_dir / "pool_statistics.json").read_text())
    spread = statistics["spread"]
    wanted = from_spread(spread, RewardConfig(name="entity"))
    assert (statistics["alpha"], statistics["beta"]) == wanted == (wanted[0], pytest.approx(2 * wanted[0], rel=0.06))
    assert wanted[0] * spread["entity"] == pytest.approx(3 * spread["asr"], rel=0.06)
    given = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "given", *entity, "reward.alpha=2", STEP)
    statistics = json.loads((given.log_dir / "pool_statistics.json").read_text())
    assert (statistics["alpha"], statistics["beta"]) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("given", "alpha", "beta"),
    [(("reward.alpha=0.5",), 0.5, 1.0), (("reward.beta=7",), None, 7.0), (("reward.asr_weight=0",), 1.0, 2.0)],
)
def test_what_is_given_is_kept(
    given: tuple[str, ...],
    alpha: float | None,
    beta: float,
    nemo_file: Any,
    tiny_llm: Path,
    manifest: Path,
    tmp_path: Path,
) -> None:
    result = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path, *given, STEP)
    statistics = json.loads((result.log_dir / "pool_statistics.json").read_text())
    assert statistics["beta"] == beta
    if alpha is not None:
        assert statistics["alpha"] == alpha
    else:
        assert statistics["alpha"] == from_spread(statistics["spread"], RewardConfig())[0]


def test_a_rank_and_a_resumed_run_take_what_was_measured() -> None:
    found = PoolStatistics(4, 1.0, 8.0, {}, 1.0, 0.5, alpha=0.7, beta=1.4, heard={"a": 1.0}, trust={"a": 2.5})
    found = PoolStatistics(**asdict(found))  # as a checkpoint keeps it
    reweighed: list[tuple[float, float]] = []
    reward = SimpleNamespace(with_weights=lambda *, alpha, beta: reweighed.append((alpha, beta)) or "new")
    given = {"reward": {"name": "remote", "alpha": 0.9}, "context": {"description": "x"}}
    config = parse_run_config(given)
    applied = found.applied_to(config)
    assert applied.proposals.boosting_weight == 0.5
    assert applied.reward.weights == (0.7, 1.4)
    assert Trust.of(applied.reward) == Trust({"a": 2.5})
    assert Trust.of(config.reward) is None
    assert config.reward.weights == (0.9, 1.8), "what was given is changed"
    assert found.applied_to(applied) == applied
    heads = [SimpleNamespace(vocabulary=None)]
    reference = SimpleNamespace(heads=heads)
    setup: Any = SimpleNamespace(config=config, judge=reward, heads=heads, reference=reference, generator=None)
    build, _ = preparation._maker_builder(setup)
    assert build(config, reference).reward is reward
    assert build(applied, reference).reward == "new"
    assert build(applied, reference).proposer.config.boosting_weight == 0.5
    assert reweighed == [(0.7, 1.4)] * 2
    assert (build(config, reference)._trust, build(applied, reference)._trust) == (None, Trust({"a": 2.5}))


def test_where_there_is_no_pool_null_is_one_and_two() -> None:
    assert RewardConfig().weights == (1.0, 2.0)
    assert RewardConfig(alpha=3.0).weights == (3.0, 6.0)
    assert RewardConfig(alpha=3.0, beta=0.0).weights == (3.0, 0.0)
    assert RewardConfig().scaled_by_pool
    assert RewardConfig(name="remote").scaled_by_pool
    assert RewardConfig(name="entity").scaled_by_pool
    assert not any(RewardConfig(name=name).scaled_by_pool for name in ("judge", "rules", "composite"))
    with pytest.raises(ConfigError, match=r"reward\.spread_factor must be > 0"):
        parse_run_config({"reward": {"name": "length", "spread_factor": 0.0}})
    assert reward_line(RewardConfig(name="composite")) == "composite"
    assert reward_line(RewardConfig(spread_factor=5)) == "llm, alpha by the pool's spread (factor 5), beta 2·alpha"


def test_a_rate_is_given_or_can_be_tried(tmp_path: Path) -> None:
    base = arguments("a.nemo", "pool.json", "llm", tmp_path, "guards.every=5")

    def rates(*more: str) -> tuple[float, ...]:
        tree: Any = OmegaConf.to_container(compose_config([*base, *more]))
        return rates_to_try(tree["model"], parse_run_config(tree))

    assert rates("model.optim.lr=1e-4") == ()
    assert rates("model.optim.lr=null") == (1e-5, 3e-5, 1e-4, 3e-4)
    with pytest.raises(ConfigError) as error:
        rates(
            "model.optim.lr=null",
            "guards.every=0",
            "parameters.lr_candidates=[]",
            "objective.name=self_training",
            "+model.optim_param_groups.encoder.lr=1e-4",
        )
    for words in ("lr_candidates is empty", "guards.every=0", "no reward to judge by", "rates already", "Set model"):
        assert words in str(error.value)


def test_a_smaller_rate_that_gains_nearly_as_much_is_taken() -> None:
    nan = float("nan")
    assert smallest_good({1e-5: 6.0, 1e-4: 18.0, 3e-4: 19.9}) == 1e-4
    assert smallest_good({1e-5: 4.2, 1e-4: 8.8, 3e-4: 20.6}) == 3e-4
    assert smallest_good({1e-4: 2.0, 2e-4: -5.0}) == 1e-4
    assert smallest_good({1e-4: -2.0, 2e-4: 0.0, 3e-4: nan}) == 1e-4
    assert smallest_good({1e-4: nan, 2e-4: 1.0}) == 2e-4


@pytest.mark.parametrize(("losses", "told"), [([5.0, 8.0, 6.0], 1), ([5.0, 4.9, 3.0], 0)])
def test_a_rate_is_judged_by_the_loss_and_a_trial_in_which_it_never_falls_is_told(
    losses: list[float], told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On bed (c) transcripts got worse at first with every rate, and 1e-5 was taken, with which nothing was learned
    (issue 8): the gain of the held-out transcripts does not count."""
    module = "nemo_llm_feedback.training.callbacks.lr_search"
    for name in ("snapshot", "put_back", "_train", "_propose"):
        monkeypatch.setattr(f"{module}.{name}", lambda *args: None)
    monkeypatch.setattr(f"{module}.violations", lambda found, limits: [])
    warnings: list[str] = []
    monkeypatch.setattr(f"{module}.logging.warning", warnings.append)
    values = iter(losses)
    monkeypatch.setattr(f"{module}.HeldOutLoss", lambda model, feedback, audio: lambda model: next(values))
    evaluator: Any = SimpleNamespace(measure=lambda model, *, step: SimpleNamespace(gain=-3.0), audio=[])
    config = parse_run_config({"reward": {"name": "length"}, "parameters": {"lr_trial_steps": 2}})
    model = SimpleNamespace(
        feedback=SimpleNamespace(
            config=config, rates=(1e-4, 1e-5), release_llm=lambda: None, generator=torch.Generator()
        ),
        training_with=lambda feedback: contextlib.nullcontext(),
        trainer=SimpleNamespace(accumulate_grad_batches=1),
        pool_batches=lambda: iter("abc"),
    )
    rate = choose_rate(model, evaluator)
    assert rate == (1e-5 if told else 1e-4)
    assert ["in 2 steps" in text and "1e-05" in text for text in warnings] == [True] * told


@pytest.mark.parametrize(
    ("more", "times"),
    [
        ((), 1),
        (("proposals.boosting_weights=[0.5,1.0]",), 2),
        # Ratios want the policy of the step: what the start has proposed is used for measuring only.
        (("objective=grpo", "model.optim.lr=1e-3"), 2),
    ],
)
def test_a_group_that_the_start_has_proposed_is_used_for_scale_boosting_trial_and_the_first_refresh(
    more: tuple[str, ...],
    times: int,
    nemo_file: Any,
    tiny_llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    make, held_out = NBestMaker.make, HeldOutLoss.__init__

    def counted(self: NBestMaker, audio: Any, *args: Any) -> NBestBatch:
        made.extend(audio.utterances)
        return make(self, audio, *args)

    def not_counted(self: HeldOutLoss, *args: Any) -> None:
        number = len(made)
        held_out(self, *args)
        del made[number:]

    monkeypatch.setattr(NBestMaker, "make", counted)
    monkeypatch.setattr(HeldOutLoss, "__init__", not_counted)
    monkeypatch.setattr("nemo_llm_feedback.cli.jobs.adapt.judged_changes", lambda *args: [])  # for the report
    pool = write_manifest(tmp_path / "pool.json", [None] * 6)
    trial = (
        "model.optim.lr=null",
        "parameters.lr_candidates=[1e-4,1e-3]",
        "guards.every=1",
        "parameters.lr_trial_steps=2",
    )
    result = run(nemo_file("ctc_bpe"), pool, tiny_llm, tmp_path, "feedback.pool_utterances=6", *trial, *more)
    assert result.steps == 2, "six rows in batches of three"
    assert sorted(made) == sorted([*dict.fromkeys(made)] * times)
    assert len(dict.fromkeys(made)) == 6


def test_groups_of_the_start_remember_its_log_p(nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    settings = config(
        write_manifest(tmp_path / "m.json", [None] * 4), proposals={"samples": 0}, feedback={"pool_utterances": 4}
    )
    model.setup_feedback(settings, work_dir=tmp_path / "w", reward=label_reward)
    feedback = begin(model)
    assert len(feedback.cache) == 4
    with torch.no_grad(), evaluation_mode(model):
        for part in model.encoded_pool():
            nbest = feedback.nbest(*part, refresh=0)
            (head,) = feedback.heads
            now = head.score(part.encoded, part.lengths, nbest.labels)
            torch.testing.assert_close(nbest.old_logp[head.name][nbest.mask], now[nbest.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("ctc_bpe", ()),
        ("hybrid_bpe", ("feedback.heads=both",)),
        ("ctc_bpe", ("objective=mwer",)),
        ("ctc_bpe", ("objective=self_training", "objective.label=reward")),
    ],
)
def test_the_loss_held_out_falls_with_what_training_learns(
    kind: str,
    more: tuple[str, ...],
    nemo_file: Any,
    tiny_llm: Path,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the audio that is learned from, the loss falls as training lowers it, and does not change by itself."""
    found: list[float] = []

    class OnThePool(HeldOutLoss):
        def __init__(self, model: Any, feedback: Any, audio: Any) -> None:
            with evaluation_mode(model):
                pool = [part.audio for part in model.encoded_pool()]
            super().__init__(model, feedback, pool)
            found.extend((self(model), self(model)))

        def __call__(self, model: Any) -> float:
            found.append(super().__call__(model))
            return found[-1]

    monkeypatch.setattr("nemo_llm_feedback.training.callbacks.lr_search.HeldOutLoss", OnThePool)
    trial = ("parameters.lr_candidates=[1e-3]", "parameters.lr_trial_steps=6", "model.optim.lr=null")
    guards = ("guards.every=1", "guards.max_kl=1e9", "guards.max_length_ratio=100")
    run(nemo_file(kind), manifest, tiny_llm, tmp_path, STEP, *trial, *guards, "feedback.augment=false", *more)
    assert found[0] == found[1]
    assert found[-1] < found[0] - 1e-3


@pytest.mark.slow
def test_the_ranks_choose_one_learning_rate(nemo_file: Any, tiny_llm: Path, manifest: Path, tmp_path: Path) -> None:
    command = arguments(
        nemo_file("ctc_bpe"),
        manifest,
        tiny_llm,
        tmp_path / "runs",
        "model.optim.lr=null",
        "parameters.lr_candidates=[0.001,0.002,0.004]",
        "parameters.lr_trial_steps=1",
        "guards.every=2",
        "guards.max_kl=1e9",
        "guards.max_length_ratio=100",
        "trainer.devices=2",
        "++trainer.strategy=ddp",
        "+exp_manager.seconds_to_sleep=0",
        f"output={tmp_path / 'a.nemo'}",
    )
    found = run_ranks("adapt", tmp_path, command)
    assert "error" not in found[0], found[0]["error"]
    rate = found[0]["rate"]
    assert rate in (0.001, 0.002, 0.004)
    assert found[1]["rate"] == rate
    assert found[0]["lrs"] == found[1]["lrs"] == [rate, rate]
    lines = read_steps(found[0]["log_dir"] / "steps.jsonl")
    assert [line["lr"] for line in lines if "lr" in line] == [rate, rate]


@pytest.mark.parametrize(("objective", "own"), [("grpo", True), ("distill", False)])
def test_each_rate_of_the_trial_has_groups_of_its_own_policy_where_the_loss_compares_with_it(
    objective: str, own: bool, nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger rates were tried on groups and log p of the smallest one's policy, whose ratios end at the clip."""
    caches: list[Any] = []
    train = lr_search._train

    def noted(model: Any, batches: Any, rate: float) -> None:
        cache = model.feedback.cache
        fresh = all(cache is not other for other in caches) and cache.to_plain()["kept"] is None
        assert fresh is own or not caches
        caches.append(cache)
        train(model, batches, rate)

    monkeypatch.setattr(lr_search, "_train", noted)
    more = ("model.optim.lr=null", "parameters.lr_candidates=[1e-4,1e-3]", "parameters.lr_trial_steps=2")
    pool = write_manifest(tmp_path / "pool.json", [None] * 6)
    run(nemo_file("ctc_bpe"), pool, tiny_llm, tmp_path, *more, STEP, "guards.every=1", f"objective={objective}")
    assert len({id(cache) for cache in caches}) == (2 if own else 1)
