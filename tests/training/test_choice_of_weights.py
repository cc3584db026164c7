"""Which weights a run gives, when it ends, and what a resumed run remembers: each test is the death of a mutant."""

from __future__ import annotations

import logging
import math
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fits import begin, config, label_reward
from helpers.tiny import build_nemo, write_manifest
from omegaconf import OmegaConf, open_dict

from nemo_llm_feedback.cli.jobs.run_choice import run_folder
from nemo_llm_feedback.core.config import GuardConfig, ObjectiveConfig, RunConfig
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.types import Audio, Context, Hypothesis, RewardOutput
from nemo_llm_feedback.data.staging import stage
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.llm import TextScore
from nemo_llm_feedback.rewards.asking import ScoreCache
from nemo_llm_feedback.training.callbacks.early_stopping import HeldOutEarlyStopping
from nemo_llm_feedback.training.callbacks.guards import HeldOutMetrics, as_good, violations
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator, _Transcripts, judged_gains
from nemo_llm_feedback.training.callbacks.lr_search import HeldOutLoss
from nemo_llm_feedback.training.group_math import Groups
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.objectives import dpo
from nemo_llm_feedback.training.supervision import pseudo_labelled_batch
from nemo_llm_feedback.training.weights import kept_name, load_kept, save_kept, snapshot

NAN = math.nan
FINE = HeldOutMetrics(1, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, NAN)


def measured(step: int, *gains: float) -> HeldOutMetrics:
    """A measurement with these gains of its utterances; of one value alone it is the mean of utterances unknown."""
    judged = [gain for gain in gains if gain == gain]
    mean = sum(judged) / len(judged) if judged else NAN
    return HeldOutMetrics(**{**vars(FINE), "step": step, "gain": mean, "gains": gains if len(gains) > 1 else ()})


def stopping(model: Any, gains: Sequence[float | tuple[float, ...]], **guards: Any) -> HeldOutEarlyStopping:
    """Early stopping whose measurements find these gains, means or those of each utterance, in order."""
    setup: Any = SimpleNamespace(
        config=RunConfig(guards=GuardConfig(**guards)),
        held_out_rows=tuple,
        staged=SimpleNamespace(held_out=()),
        guard_rows=(),
        start=snapshot(model),
    )
    found = HeldOutEarlyStopping(setup)
    script = iter([gain if isinstance(gain, tuple) else (gain,) for gain in gains])
    evaluator: Any = SimpleNamespace(
        rewarded=True,
        start_wer=None,
        measure=lambda model, step: measured(step, *next(script)),
    )
    found._evaluator = evaluator
    return found


def measure(callback: HeldOutEarlyStopping, model: Any, steps: range) -> list[bool]:
    """Measures at each step with weights of that value; whether each asked the trainer to stop."""
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[], callbacks=[], global_step=0, should_stop=False)
    stops = []
    for step in steps:
        torch.nn.init.constant_(model.weight, step)
        trainer.global_step = step
        callback._measure(trainer, model, step)
        stops.append(trainer.should_stop)
    return stops


def test_the_best_measurement_is_kept_and_patience_stops_the_run() -> None:
    model = torch.nn.Linear(1, 1)
    callback = stopping(model, [1.0, 3.0, 2.0, NAN, 3.0], patience=3)
    assert measure(callback, model, range(1, 6)) == [False, False, False, False, True]
    assert "has not risen for 3 measurements" in callback.reason
    assert (callback.kept_step, callback.kept_gain) == (2, 3.0)
    callback.finish(SimpleNamespace(global_step=5, is_global_zero=True), model)  # type: ignore[arg-type]
    assert float(model.weight) == 2, "not the last weights, and not the start's"
    patient = stopping(model, [1.0] * 9, patience=0)
    assert not any(measure(patient, model, range(1, 10)))


def test_of_gains_that_chance_may_turn_around_the_latest_weights_are_kept() -> None:
    model = torch.nn.Linear(1, 1)
    script = [(2.0, 1.0, 3.0), (9.0, 3.0, 6.0), (3.0, 6.0, 7.0), (6.0, 0.0, 3.0)]
    callback = stopping(model, script, patience=3)
    assert not any(measure(callback, model, range(1, 5)))
    assert (callback.kept_step, callback.kept_gain) == (3, pytest.approx(16 / 3))
    callback.finish(SimpleNamespace(global_step=4, is_global_zero=True), model)  # type: ignore[arg-type]
    assert float(model.weight) == 3, "step 4 lies below step 2 by 3 in every utterance, step 3 in one of three"
    strict = stopping(model, script, standard_errors=0.0)
    measure(strict, model, range(1, 5))
    assert strict.kept_step == 2


def test_weights_that_are_kept_for_being_as_good_do_not_start_patience_anew() -> None:
    callback = stopping(torch.nn.Linear(1, 1), [(9.0, 3.0), (3.0, 6.0), (3.0, 6.0)], patience=2)
    assert measure(callback, torch.nn.Linear(1, 1), range(1, 4)) == [False, False, True]
    assert callback.kept_step == 3


def test_before_the_first_gain_patience_counts_what_is_worse_than_the_start_beyond_chance() -> None:
    """On a machine with other rounding the quickstart stopped at step 60 of 96 and gave the base back."""
    noisy, worse = (4.0, -9.0, 2.0), (-3.0, -2.0, -4.0)
    callback = stopping(torch.nn.Linear(1, 1), [noisy, noisy, worse, noisy, worse, worse], patience=2)
    assert measure(callback, torch.nn.Linear(1, 1), range(1, 7)) == [False] * 5 + [True]
    assert callback.kept_step == 0
    late = stopping(torch.nn.Linear(1, 1), [noisy, noisy, (3.0, 3.0, 3.0), noisy, noisy], patience=2)
    assert measure(late, torch.nn.Linear(1, 1), range(1, 6)) == [False] * 4 + [True]
    assert late.kept_step == 3, "behind a gain every measurement without a rise counts"


@pytest.mark.parametrize(
    ("gains", "errors", "good"),
    [
        ((4.0, 4.0, 1.0), 1.0, True),  # drops 0, 0, 3: mean 1, standard deviation √3, standard error 1
        ((4.0, 4.0, 1.0), 0.99, False),
        ((4.0, NAN, 1.0), 1.001, True),  # drops 0, 3: mean 1.5, standard error 1.5
        ((4.0, NAN, NAN), 9.0, False),  # one drop has no spread
        ((NAN, NAN, NAN), 9.0, False),
    ],
)
def test_as_good_is_within_standard_errors_of_the_paired_difference(
    gains: tuple[float, ...], errors: float, good: bool
) -> None:
    assert as_good(gains, (4.0, 4.0, 4.0), standard_errors=errors) is good


def test_a_resumed_run_compares_with_the_utterances_of_the_best_measurement() -> None:
    model = torch.nn.Linear(1, 1)
    first = stopping(model, [(9.0, 3.0, 6.0), (6.0, 0.0, 3.0)])
    measure(first, model, range(1, 3))
    resumed = stopping(model, [(3.0, 6.0, 7.0)])
    resumed.load_state_dict(first.state_dict())
    measure(resumed, model, range(3, 4))
    assert (first.kept_step, resumed.kept_step) == (1, 3)


def test_a_rise_starts_patience_anew() -> None:
    model = torch.nn.Linear(1, 1)
    callback = stopping(model, [1.0, 0.0, 2.0, 0.0, 0.0], patience=2)
    assert measure(callback, model, range(1, 6)) == [False, False, False, False, True]


def test_no_gain_gives_the_start_back() -> None:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 7)
    callback = stopping(model, [-1.0, NAN, 0.0], patience=0)
    measure(callback, model, range(1, 4))
    callback.finish(SimpleNamespace(global_step=3, is_global_zero=True), model)  # type: ignore[arg-type]
    assert (float(model.weight), callback.kept_step) == (7, 0)


def test_a_resumed_run_remembers_the_best_gain_its_weights_and_its_patience() -> None:
    model = torch.nn.Linear(1, 1)
    first = stopping(model, [2.0, 1.0], patience=2)
    assert measure(first, model, range(1, 3)) == [False, False]
    resumed = stopping(model, [1.5], patience=2)
    resumed.load_state_dict(first.state_dict())
    assert measure(resumed, model, range(3, 4)) == [True], "the second measurement in a row without a rise"
    assert [found.gain for found in resumed.history] == [2.0, 1.0, 1.5]
    assert (resumed.kept_step, resumed.kept_gain) == (1, 2.0)
    resumed.finish(SimpleNamespace(global_step=3, is_global_zero=True), model)  # type: ignore[arg-type]
    assert float(model.weight) == 1


def test_the_best_weights_are_one_file_beside_the_checkpoints_that_have_them(tmp_path: Path) -> None:
    """They were in every checkpoint. One that is older needs those that were the best up to it."""
    model = torch.nn.Linear(1, 1)
    folder = tmp_path / "checkpoints"
    callback = stopping(model, [1.0, 0.5, 2.0, 3.0, 4.0], standard_errors=0.0)
    callback._folder = folder
    states = {}
    for step in range(1, 6):
        measure(callback, model, range(step, step + 1))
        if step == 4:
            continue  # no checkpoint is written
        states[step] = callback.state_dict()
        (folder / f"a--global_step={step}.0000-epoch=0.ckpt").touch()
        if step == 3:  # of the checkpoints before it one is still there
            (folder / "a--global_step=1.0000-epoch=0.ckpt").unlink()
    assert all(state["best"] is None for state in states.values())
    assert [state["best_file"] for state in states.values()] == [kept_name(step) for step in (1, 1, 3, 5)]
    assert {path.name for path in folder.glob("*.pt")} == {kept_name(step) for step in (1, 3, 5)}
    for step, value in ((2, 1), (3, 3), (5, 5)):
        resumed = stopping(model, [], standard_errors=0.0)
        resumed._limits = GuardConfig(every=0)
        resumed.load_state_dict(states[step])
        saver = SimpleNamespace(dirpath=str(folder), _last_global_step_saved=0)
        places = {"checkpoint_callbacks": [saver], "ckpt_path": folder / "a.ckpt"}
        resumed.on_train_start(SimpleNamespace(global_step=step, **places), model)  # type: ignore[arg-type]
        assert float(resumed._best["weight"]) == value  # type: ignore[index]
        assert saver._last_global_step_saved == step  # the middle of an accumulated step is not saved over it
        assert resumed.state_dict()["best_file"]
        places["checkpoint_callbacks"].append(SimpleNamespace(dirpath=str(tmp_path / "archive")))
        resumed.on_train_start(SimpleNamespace(global_step=step, **places), model)  # type: ignore[arg-type]
        assert float(resumed.state_dict()["best"]["weight"]) == value  # with two folders each checkpoint has them
    (folder / "a--global_step=2.0000-epoch=0.ckpt").unlink()
    save_kept(folder, 7, snapshot(model))
    assert {path.name for path in folder.glob("*.pt")} == {kept_name(step) for step in (3, 5, 7)}
    (folder / "mine.ckpt").touch()  # nobody knows of which step it is
    save_kept(folder, 8, snapshot(model))
    assert len(list(folder.glob("*.pt"))) == 4
    assert not list(folder.glob(".*"))
    with pytest.raises(TrainingError, match=r"names its best weights, kept-step=1\.pt, and neither"):
        load_kept(kept_name(1), folder, tmp_path)


@pytest.mark.parametrize("violated", [False, True])
def test_a_run_that_had_stopped_stays_so_when_it_is_given_again(violated: bool) -> None:
    """Killed between its last checkpoint and its result, it trained on, behind a violated guard, too."""
    model = torch.nn.Linear(1, 1)
    callback = stopping(model, [1.0], standard_errors=0.0)
    measure(callback, model, range(1, 2))
    callback.reason, callback._violated = "why", violated
    resumed = stopping(model, [], standard_errors=0.0)
    resumed._limits = GuardConfig(every=0)
    resumed.load_state_dict(callback.state_dict())
    trainer = SimpleNamespace(global_step=1, should_stop=False, checkpoint_callbacks=[], ckpt_path=None)
    resumed.on_train_start(trainer, model)  # type: ignore[arg-type]
    assert trainer.should_stop
    assert (resumed.reason, resumed._violated) == ("why", violated)


def test_best_weights_stay_for_a_checkpoint_that_is_of_the_step_after_its_name(tmp_path: Path) -> None:
    """NeMo names a checkpoint by the step that it logged, which is the one before the step that was taken."""
    weights = snapshot(torch.nn.Linear(1, 1))
    save_kept(tmp_path, 3, weights)
    (tmp_path / "a--global_step=2.0000-epoch=0.ckpt").touch()
    save_kept(tmp_path, 5, weights)
    assert load_kept(kept_name(3), tmp_path).keys() == weights.keys()


def test_a_resumed_run_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "n" / "checkpoints"
    checkpoints.mkdir(parents=True)
    names = ["a--global_step=2.ckpt", "a--global_step=1.ckpt"]  # in the order in which they were written
    for age, name in enumerate(names):
        (checkpoints / name).write_text(name)
        os.utime(checkpoints / name, (age, age))
    manager = {"exp_dir": str(tmp_path), "name": "n", "resume_if_exists": True}
    with run_folder(OmegaConf.create({"exp_manager": manager}), {}) as chosen:
        assert chosen.resume_from_checkpoint == str(checkpoints / names[1])


def test_a_resumed_run_goes_on_with_the_hypotheses_that_it_had(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    settings = config(manifest, feedback={"refresh_every": 100})
    states = []
    for name in ("first", "resumed"):
        model = restore(nemo_file("ctc_bpe"), map_location="cpu")
        model.setup_feedback(settings, work_dir=tmp_path / name, reward=label_reward)
        model._resumed = states[0].to_plain() if states else None
        states.append(begin(model))
        if name == "first":
            with torch.no_grad():
                for part in model.encoded_pool():
                    states[0].nbest(*part, refresh=0)
    first, resumed = states
    assert len(first.cache) == 2
    rows = list(first.cache._rows)
    assert resumed.cache.get(rows).texts == first.cache.get(rows).texts
    # An LLM that would judge otherwise by now is not asked for them again.
    resumed.maker.reward = None
    with torch.no_grad():
        for part in model.encoded_pool():
            assert resumed.nbest(*part, refresh=0).rewards["ctc"].abs().nansum() > 0


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 10 + ["a latte"], seconds=0.2)
    (tmp_path / "s").mkdir()
    # The pool twice, as it is listed to be seen oftener than other rows.
    paths = {"manifest_filepath": [str(manifest), str(manifest)]}
    staged = stage(paths, tmp_path / "s", use_text=True, on_bad_audio="error", held_out=24, held_out_share=0.4)
    held = {row.audio for row in staged.held_out}
    assert len(held) == 4
    assert not held & {row.audio for row in staged.rows}
    assert len(staged.rows) == 2 * (10 - 4 + 1)
    written = "".join(Path(path).read_text(encoding="utf-8") for path in staged.manifest_filepath)
    assert not any(Path(audio).name in written for audio in held)


# ------------------------------------------------------------------------------------------------ gain and its guards


@pytest.mark.parametrize(
    ("rewards", "gains"),
    [
        ([[3.0, 1.0], [0.0, 5.0]], (2, -5, 0)),  # two changed, the third did not
        ([[3.0, 1.0], [NAN, 5.0]], (2, NAN, 0)),
        ([[NAN, 1.0], [0.0, NAN]], (NAN, NAN, NAN)),
    ],
)
def test_the_gain_is_new_minus_old_over_what_can_be_judged(rewards: Any, gains: tuple[float, ...]) -> None:
    evaluator = HeldOutEvaluator.__new__(HeldOutEvaluator)
    evaluator._normalize, evaluator._look_aheads = str.strip, [None]
    reward = lambda groups: RewardOutput(torch.tensor(rewards), {})  # noqa: E731
    evaluator._feedback = SimpleNamespace(maker=SimpleNamespace(reward=reward))  # type: ignore[assignment]
    names = ("a", "b", "c")
    evaluator.audio = [Audio(torch.zeros(3, 1), torch.ones(3), names, (Context(),) * 3)]
    scores = [-1.0, -2.0, -3.0]
    evaluator._teacher = _Transcripts(["tea", "latte", "mocha"], [], scores, [], scores)
    found = judged_gains(evaluator._gains(_Transcripts(["a tea", "late", "mocha"], [], scores, [], scores)))
    assert found == pytest.approx(gains, nan_ok=True)


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("length_ratio", 1.5, 1.51),
        ("length_ratio", 1 / 1.5, 0.66),
        ("empty_rise", 0.2, 0.21),
        ("repetition_rise", 0.1, 0.11),
        ("style_change", 0.05, 0.051),
        ("kl", 4.0, 4.01),
    ],
)
def test_a_guard_trips_beyond_its_limit_and_not_at_it(field: str, inside: float, outside: float) -> None:
    limits = GuardConfig()
    assert violations(HeldOutMetrics(**{**vars(FINE), field: inside}), limits) == []
    assert len(violations(HeldOutMetrics(**{**vars(FINE), field: outside}), limits)) == 1


def test_the_guard_sets_wer_stops_a_run_only_where_nothing_can_mend_it() -> None:
    worse = HeldOutMetrics(**{**vars(FINE), "wer_rise": 0.03})
    assert violations(worse, GuardConfig()) == [], "interpolation is still to come"
    assert len(violations(worse, GuardConfig(interpolation=1.0))) == 1
    assert violations(HeldOutMetrics(**{**vars(FINE), "wer_rise": 0.02}), GuardConfig(interpolation=1.0)) == []


def test_one_utterance_that_cannot_be_scored_does_not_make_the_held_out_loss_nan(
    nemo_file: Any, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    settings = config(manifest, proposals={"samples": 0})  # NaN has no samples
    model.setup_feedback(settings, work_dir=tmp_path / "w", reward=label_reward)
    feedback = begin(model)
    audio = [part.audio for part in model.encoded_pool()]
    broken = Audio(audio[0].signal.clone(), audio[0].signal_len, audio[0].utterances, audio[0].contexts)
    broken.signal[0] = NAN
    sound = HeldOutLoss(model, feedback, [broken.select([1]), *audio[1:]])(model)
    assert HeldOutLoss(model, feedback, [broken, *audio[1:]])(model) == pytest.approx(sound, rel=0.05)
    assert math.isnan(HeldOutLoss(model, feedback, [broken.select([0])])(model))


def test_the_trial_of_a_rate_does_not_go_by_a_gain_that_ends_at_the_clip(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    losses = {}
    for name in ("distill", "grpo", "gspo"):
        torch.manual_seed(0)
        model = restore(nemo_file("ctc_bpe"), map_location="cpu")
        model.setup_feedback(config(manifest, objective={"name": name}), work_dir=tmp_path / name, reward=label_reward)
        feedback = begin(model)
        losses[name] = HeldOutLoss(model, feedback, [part.audio for part in model.encoded_pool()])(model)
    assert losses["grpo"] == losses["gspo"] == losses["distill"] > 0


# ------------------------------------------------------------------------------------------- steps that are not finite


def test_a_step_that_is_not_finite_moves_nothing_names_its_utterances_and_a_finite_one_starts_the_count_anew(
    tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    # NeMo's own switch cleared the gradients before anything saw them, and the guard counted no such step.
    base = build_nemo("ctc_bpe", tmp_path / "base.nemo", tokenizer_dir=tokenizer_dir, skip_nan_grad=True)
    model = restore(base, map_location="cpu")
    model.setup_feedback(config(manifest), work_dir=tmp_path / "w", reward=label_reward)
    feedback = begin(model)
    model.log = lambda *args, **kwargs: None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    (batch,) = model.pool_batches()

    def step(*, poison: bool) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        model.training_step(batch, 0)["loss"].backward()
        if poison:
            next(p for p in model.decoder.parameters()).grad.view(-1)[0] = NAN
        model.on_after_backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        return snapshot(model)

    logging.getLogger("nemo_logger").setLevel(logging.WARNING)
    logging.getLogger("nemo_logger").addHandler(caplog.handler)
    try:
        before = step(poison=False)
        after = step(poison=True)
        assert model.nonfinite_steps == 1
    finally:
        logging.getLogger("nemo_logger").removeHandler(caplog.handler)
        logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    assert all(torch.equal(value, before[name]) for name, value in after.items()), "Adam's momentum moved them"
    assert len(feedback.reader.seen) == 2
    assert all(caplog.text.count(name) == 1 for name in feedback.reader.seen)
    moved = step(poison=False)
    assert model.nonfinite_steps == 0
    assert any(not torch.equal(value, after[name]) for name, value in moved.items())


# -------------------------------------------------------------------------------------------------------- other parts


def test_a_score_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    cache = ScoreCache(str(tmp_path / "scores.sqlite"))
    cache.put_many({"a": TextScore(-1.5, 2), "b": TextScore(-math.inf, 2), "c": TextScore(NAN, 2)})
    assert ScoreCache(str(tmp_path / "scores.sqlite")).get_many(["a", "b", "c"]) == {"a": TextScore(-1.5, 2)}


@pytest.mark.parametrize(("least", "kept"), [(0.0, 2), (0.7, 1), (1.0, 0)])
def test_augmented_self_training_learns_confident_labels_only(least: float, kept: int) -> None:
    audio = Audio(torch.zeros(2, 10), torch.tensor([10, 10]), ("a", "b"), (Context(), Context()))
    members = (Hypothesis("x", (1,), "beam"), Hypothesis("y", (2,), "beam"))
    ref_logp = {"ctc": torch.log(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))}
    nbest = NBestBatch(audio.utterances, audio.contexts, (members, members), ref_logp, {"ctc": torch.zeros(2, 2)})
    settings = ObjectiveConfig(name="self_training", min_confidence=least)
    batch, metrics = pseudo_labelled_batch(settings, audio, nbest, head="ctc")
    assert metrics["kept_fraction"] == kept / 2
    assert (0 if batch is None else len(batch[1])) == kept
    if batch is not None:
        assert batch[2][0].tolist() == [2]


def test_the_export_keeps_no_section_of_ours(nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    sections = ("feedback", "objective", "proposals", "reward", "llm", "context")
    with open_dict(model.cfg):
        for name in sections:
            model.cfg[name] = {"kept": "a secret menu"}
    model.save_to(str(tmp_path / "out.nemo"))
    with tarfile.open(tmp_path / "out.nemo") as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("model_config.yaml"))
        text = archive.extractfile(member).read().decode()  # type: ignore[union-attr]
    assert not set(OmegaConf.create(text)) & set(sections)
    assert "a secret menu" not in text
    assert model.cfg.context.kept == "a secret menu", "the model in memory keeps what it had"


def test_dpo_reads_references_of_any_depth() -> None:
    """Texts of ordinary length have log p of −100 nats and less."""
    logp = torch.tensor([[-90.0, -130.0]])
    groups = Groups(logp, torch.tensor([[1.0, 0.0]]), torch.tensor([[-100.0, -120.0]]), torch.ones(1, 2).bool())
    found = dpo(groups, beta=0.1, rejected="probable", reference_free=False, min_spread=0.0)
    assert float(found.metrics["margin"]) == pytest.approx(20.0)
    assert float(found.loss) == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-5)


def test_members_remember_the_log_p_of_their_first_use() -> None:
    members = (Hypothesis("x", (1,), "beam"), Hypothesis("y", (2,), "beam"))
    ones = {"ctc": torch.ones(1, 2)}
    first = NBestBatch(("a",), (Context(),), (members,), ones, ones).with_old_logp(
        {"ctc": torch.tensor([[-1.0, -2.0]])}
    )
    again = first.with_old_logp({"ctc": torch.tensor([[-5.0, -6.0]])})
    assert again.old_logp["ctc"].tolist() == [[-1.0, -2.0]]
