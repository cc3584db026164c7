"""``feedback.score_ahead``: the reward judges the next batch while the model learns from this one."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.fits import LabelReward, config, fit
from helpers.tiny import build_streaming, write_manifest
from nemo.collections.asr.modules import ConformerEncoder
from nemo.utils import logging
from torch.utils.data import DataLoader

from nemo_llm_feedback.core.config import parse_run_config
from nemo_llm_feedback.core.errors import ConfigError, RewardError
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput
from nemo_llm_feedback.data.resumable_loader import ResumableLoader
from nemo_llm_feedback.hypotheses.maker import NBestMaker
from nemo_llm_feedback.training import mixin
from nemo_llm_feedback.training.callbacks.score_ahead import ScoreAhead
from nemo_llm_feedback.training.mixin import CHECKPOINT_KEY, LLMFeedbackMixin
from nemo_llm_feedback.training.models import restore

AHEAD = {"score_ahead": True}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "m.json", [None] * 8)


def train(nemo: Path, settings: dict[str, Any], reward: Any, *, steps: int) -> None:
    """Takes some steps from a checkpoint."""
    model = restore(nemo, map_location="cpu")
    model.setup_feedback(settings, reward=reward)
    fit(model, steps=steps)


class Watched(LabelReward):
    """Notes the thread that asks; a second one waits until the step has begun that it works beside."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.asked: list[tuple[bool, int]] = []

    def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
        main = threading.current_thread() is threading.main_thread()
        if not main:
            assert self.steps.acquire(timeout=60), "nothing went on beside the reward"
        self.asked.append((main, len(groups)))
        return super().__call__(groups)


def test_the_next_batch_is_judged_beside_the_step(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, learned = Watched(), LLMFeedbackMixin.training_step

    def step(self: Any, *args: Any) -> Any:
        reward.steps.release()
        return learned(self, *args)

    monkeypatch.setattr(LLMFeedbackMixin, "training_step", step)
    train(nemo_file("ctc_bpe"), config(manifest, feedback=AHEAD), reward, steps=6)
    # The pool, whose groups the first step takes, and three beside a step; an epoch's first, and one more beside it.
    # The batch behind the last step is judged, too: the run may be prolonged.
    beside = (False, 2)
    assert reward.asked == [(True, 2), beside, beside, beside, (True, 2), beside, beside]


@pytest.mark.parametrize("family", ["ctc_bpe", "rnnt_bpe"])
def test_groups_are_those_of_the_same_weights(
    family: str, nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate of next to zero the policy that proposes one step ahead is the one that proposes in the step."""
    used: list[Any] = []
    loss = mixin.objective_loss

    def noted(chosen: Any, logp: torch.Tensor, nbest: Any, *, head: str) -> Any:
        used.append((nbest.utterances, nbest.texts, nbest.rewards[head].tolist(), logp.tolist()))
        return loss(chosen, logp, nbest, head=head)

    monkeypatch.setattr(mixin, "objective_loss", noted)
    found = []
    for feedback in ({}, AHEAD):
        train(nemo_file(family), config(manifest, lr=1e-30, feedback=feedback), LabelReward(), steps=6)
        found.append(list(used))
        used.clear()
    assert found[0] == found[1]


def distances(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far log p of each step's groups is from that of the policy that proposed them, from now on, nats."""
    moved: list[float] = []
    loss = mixin.objective_loss

    def noted(chosen: Any, logp: torch.Tensor, nbest: Any, *, head: str) -> Any:
        moved.append(float((logp.detach() - nbest.old_logp[head])[nbest.mask].abs().max()))
        return loss(chosen, logp, nbest, head=head)

    monkeypatch.setattr(mixin, "objective_loss", noted)
    return moved


def test_ratios_are_of_the_members_that_trust_leaves(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members that judging drops took theirs with them: those behind had the ratios of others."""
    moved = distances(monkeypatch)
    texts = ["a latte with soy", "one mocha to go", "the small tea", "thank you"]
    heard = [[{"text": text, "source": "other"} for text in texts[i:]] for i in range(4)]
    manifest = write_manifest(tmp_path / "m.json", [None] * 4, hypotheses=heard)
    members: list[int] = []
    judge = NBestMaker.judge

    def judged(self: Any, unjudged: Any) -> Any:
        found = judge(self, unjudged)
        members.extend(len(before) - after for before, after in zip(unjudged.hypotheses, found.sizes, strict=True))
        return found

    monkeypatch.setattr(NBestMaker, "judge", judged)
    reward = {"name": "rules", "alpha": 1.0, "beta": 0.0, "trust": {"other": 0.5}, "settings": {"length": 1.0}}
    settings = config(manifest, lr=1e-30, feedback=AHEAD, objective={"name": "gspo"}, reward=reward)
    train(nemo_file("ctc_bpe"), settings, None, steps=4)
    assert max(members) > 0
    assert max(moved) < 1e-3


def test_the_next_batch_is_proposed_in_the_look_ahead_that_it_is_learned_in(
    nemo_file: Any, tokenizer_dir: Path, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = distances(monkeypatch)
    base = build_streaming(tmp_path / "base.nemo", "ctc_bpe", tokenizer_dir=tokenizer_dir)
    learned, masks = set(), ConformerEncoder._create_masks

    def watched(self: Any, *args: Any, **settings: Any) -> Any:
        if torch.is_grad_enabled():
            learned.add(tuple(settings["att_context_size"]))
        return masks(self, *args, **settings)

    monkeypatch.setattr(ConformerEncoder, "_create_masks", watched)
    train(base, config(manifest, lr=1e-30, feedback=AHEAD, objective={"name": "gspo"}), LabelReward(), steps=8)
    assert len(learned) == 2
    assert max(moved) < 1e-3


def test_ratios_are_to_the_policy_that_proposed(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = distances(monkeypatch)
    settings = config(manifest, lr=1e-2, feedback=AHEAD, objective={"name": "gspo"})
    train(nemo_file("ctc_bpe"), settings, LabelReward(), steps=3)
    assert moved[0] < 1e-4 < min(moved[1:])


def test_a_reward_that_fails_beside_the_step_stops_the_next_with_its_error(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(LabelReward):
        asked = 0

        def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
            self.asked += 1
            if self.asked > 2:
                raise RewardError("the server has gone")
            return super().__call__(groups)

    logged: list[str] = []
    monkeypatch.setattr(logging, "warning", logged.append)
    with pytest.raises(RewardError, match="the server has gone"):
        train(nemo_file("ctc_bpe"), config(manifest, feedback=AHEAD), Failing(), steps=4)
    assert "feedback.score_ahead: RewardError: the server has gone; the next step asks again." in logged
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score_ahead")]


def test_no_batch_is_judged_for_nothing(nemo_file: Any, manifest: Path) -> None:
    """Kept groups are not judged again."""
    reward = Watched()
    reward.steps.release(99)
    settings = config(manifest, feedback={**AHEAD, "refresh_every": 100})
    train(nemo_file("ctc_bpe"), settings, reward, steps=7)
    assert sum(size for _, size in reward.asked) == 8  # two of them with the pool


def test_an_llm_that_is_not_in_memory_yet_is_asked_between_the_steps(
    nemo_file: Any, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading it sets torch's default dtype and random state, which are the step's, too."""
    reward, starts = Watched(), ScoreAhead.on_train_batch_start

    def unloaded(self: Any, trainer: Any, model: Any, *args: Any) -> None:
        model._feedback = replace(model.feedback, scorer=SimpleNamespace(loaded=False))
        starts(self, trainer, model, *args)

    monkeypatch.setattr(ScoreAhead, "on_train_batch_start", unloaded)
    train(nemo_file("ctc_bpe"), config(manifest, feedback=AHEAD), reward, steps=3)
    assert reward.asked == [(True, 2)] * 4


def test_a_checkpoint_of_a_callback_before_has_what_was_judged(nemo_file: Any, manifest: Path, tmp_path: Path) -> None:
    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    model.setup_feedback(config(manifest, feedback=AHEAD), reward=LabelReward())
    fit(model, steps=2, callbacks=[Saver()])
    rows = [row.utterance for row in model.feedback_setup.staged.rows]
    for step in (1, 2):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=False)
        assert saved[CHECKPOINT_KEY]["nbest"][0]["kept"]["utterances"] == rows[2 * step : 2 * step + 2]


def test_a_loader_knows_what_stands_behind_its_last_batches() -> None:
    loader = ResumableLoader(DataLoader(range(7), batch_size=2), seed=1, rank=0, num_ranks=1, shuffle=False)  # type: ignore[arg-type]
    assert [loader.following(number) for number, _ in enumerate(loader)] == [None] * 4
    loader.looks_ahead = True
    batches = iter(loader)
    next(batches), next(batches)  # as Lightning's fetcher of streams, which takes one early
    assert loader.following(0).tolist() == [2, 3]
    assert loader.following(1).tolist() == [4, 5]
    assert len(list(batches)) == 2
    assert loader.following(3) is None
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6]]
    loader.start_at(epoch=0, batches=2)  # whose numbers go on
    assert [loader.following(number).tolist() for number, _ in zip((2,), loader, strict=False)] == [[6]]


def test_settings_under_which_nothing_is_scored_ahead_are_refused() -> None:
    sections: dict[str, Any] = {"llm": {"model": "a/b"}, "context": {"description": "x"}, "feedback": AHEAD}
    with pytest.raises(ConfigError, match="phase=cached scores the whole pool at once"):
        parse_run_config({**sections, "llm": {"model": "a/b", "phase": "cached"}})
    with pytest.raises(ConfigError, match="asks no reward"):
        parse_run_config({**sections, "objective": {"name": "self_training"}})
