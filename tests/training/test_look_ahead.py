"""Streaming checkpoints with several look-aheads: all are learned and guarded, or the one that a setting names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import begin, config, fit, label_reward
from helpers.tiny import LOOK_AHEADS as CONTEXTS
from helpers.tiny import build_streaming, write_manifest

from nemo_llm_feedback.asr.checkpoints import read_config
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.cli.jobs.start import plan_text
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.training.callbacks import lr_search
from nemo_llm_feedback.training.callbacks.held_out import HeldOutEvaluator
from nemo_llm_feedback.training.models import restore


@pytest.fixture
def base(tokenizer_dir: Path, tmp_path: Path) -> Path:
    return build_streaming(tmp_path / "base.nemo", "ctc_bpe", tokenizer_dir=tokenizer_dir)


def prepared(base: Path, folder: Path, texts: Any = (None,) * 4, **feedback: Any) -> Any:
    model = restore(base, map_location="cpu")
    given = config(write_manifest(folder / "m.json", texts), feedback=feedback)
    model.setup_feedback(given, work_dir=folder / "run", reward=label_reward)
    return model


def seen_by(encoder: Any) -> list[tuple[bool, list[int]]]:
    """(gradient, context) of every pass of an encoder from now on."""
    seen: list[tuple[bool, list[int]]] = []
    honest = encoder._create_masks

    def watched(*args: Any, **settings: Any) -> Any:
        seen.append((torch.is_grad_enabled(), list(settings["att_context_size"])))
        return honest(*args, **settings)

    encoder._create_masks = watched
    return seen


def test_all_are_learned_and_the_encoder_is_left_as_it_was(base: Path, tmp_path: Path) -> None:
    model = prepared(base, tmp_path)
    seen = seen_by(model.encoder)
    fit(model, steps=8)
    learned = [context for gradient, context in seen if gradient]
    assert len(learned) == 8
    assert {tuple(context) for context in learned} == {tuple(context) for context in CONTEXTS}
    assert model.encoder.att_context_size == CONTEXTS[0]


def test_all_are_guarded(base: Path, tmp_path: Path) -> None:
    model = prepared(base, tmp_path)
    evaluator = HeldOutEvaluator(model, begin(model))
    seen = seen_by(model.encoder)
    metrics = evaluator.measure(model, step=0)
    assert [context for _, context in seen] == CONTEXTS
    assert (metrics.kl, metrics.changed) == (pytest.approx(0, abs=1e-5), 0)


@pytest.mark.parametrize("objective", ["distill", "gspo"])
def test_the_trial_of_rates_learns_and_is_measured_in_all(
    objective: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drew the first step's in every step, and was measured in the default one."""
    model = restore(base, map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", [None] * 16)
    lenient = dict.fromkeys(("max_kl", "max_length_ratio", "max_repetition_rise", "max_style_change"), 1000000.0)
    guards = {"every": 1, "held_out": 0.3, "max_empty_rise": 1.0, **lenient}
    rates = {"lr_candidates": (1e-6, 2e-6), "lr_trial_steps": 6}
    given = config(manifest, guards=guards, parameters=rates, objective={"name": objective})
    given["model"]["optim"]["lr"] = None
    model.setup_feedback(given, work_dir=tmp_path / "run", reward=label_reward)
    learned, measured, states = [], [], []
    seen, train, loss = seen_by(model.encoder), lr_search._train, lr_search.HeldOutLoss.__call__

    def trained(*args: Any) -> None:
        states.append(torch.get_rng_state())
        before = len(seen)
        train(*args)
        learned.append([tuple(context) for gradient, context in seen[before:] if gradient])

    def lost(self: Any, model: Any) -> float:
        before, value = len(seen), loss(self, model)
        measured.append({tuple(context) for _, context in seen[before:]})
        return value

    monkeypatch.setattr(lr_search, "_train", trained)
    monkeypatch.setattr(lr_search.HeldOutLoss, "__call__", lost)
    fit(model, steps=1)
    everything = {tuple(context) for context in CONTEXTS}
    assert measured == [everything] * 3
    assert learned[0] == learned[1]
    assert torch.equal(*states)  # dropout and masks are the same for all rates
    if objective == "distill":  # ratios compare log p within one refresh, which has one
        assert set(learned[0]) == everything


def test_ratios_of_groups_that_the_trial_proposes_are_of_the_look_ahead_that_learns(
    base: Path, tmp_path: Path
) -> None:
    """With ``llm.phase=cached`` the trial proposes them; the frozen model's log p is of its own look-ahead."""
    model = restore(base, map_location="cpu")
    given = config(write_manifest(tmp_path / "m.json", [None] * 4), objective={"name": "gspo"})
    model.setup_feedback(given, work_dir=tmp_path / "run", reward=label_reward)
    feedback = begin(model)
    assert model.look_ahead() != model.encoder.att_context_size
    batches = list(model.pool_batches())
    lr_search._propose(model, batches)
    with torch.no_grad(), evaluation_mode(model):
        for part in model.encoded_pool(batches):
            nbest = feedback.cache.get(part.audio.utterances)
            now = feedback.heads[0].score(part.encoded, part.lengths, nbest.labels)
            distance = (now - nbest.old_logp["ctc"])[nbest.mask].abs()
            assert distance.max() < 1e-3 < (now - nbest.ref_logp["ctc"])[nbest.mask].abs().max()


def test_the_plan_says_which_are_learned(base: Path, tmp_path: Path) -> None:
    for name, feedback, said in (
        ("all", {}, "look-aheads  [4, 1], [4, 0]: all are learned and guarded"),
        ("one", {"look_ahead": [4, 0]}, "look-aheads  [4, 0] alone is learned and guarded (feedback.look_ahead)"),
    ):
        (tmp_path / name).mkdir()
        model = prepared(base, tmp_path / name, **feedback)
        assert said in plan_text(model, source=base, log_dir=tmp_path)


def test_the_one_that_is_named_is_learned_and_guarded_and_the_export_has_all(base: Path, tmp_path: Path) -> None:
    model = prepared(base, tmp_path, look_ahead=[4, 0])
    seen = seen_by(model.encoder)
    fit(model, steps=3)
    HeldOutEvaluator(model, model.feedback).measure(model, step=3)
    assert {tuple(context) for _, context in seen} == {(4, 0)}
    model.save_to(tmp_path / "out.nemo")
    assert read_config(tmp_path / "out.nemo").encoder == read_config(base).encoder
    with pytest.raises(ConfigError, match=r"look_ahead=\[4, 2\], but the checkpoint has \[4, 1\], \[4, 0\]"):
        prepared(base, tmp_path, look_ahead=[4, 2])
