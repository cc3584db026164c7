"""The mixin: stock where it must be stock, and learning where it must learn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fits import TEXTS, begin, config, fit, label_reward
from helpers.tiny import KINDS, stock_class, write_manifest
from nemo.collections.asr.modules.audio_preprocessing import SpectrogramAugmentation

from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.reference import encode, evaluation_mode
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.evaluation.transcribe import transcribe_rows
from nemo_llm_feedback.hypotheses.nbest import NBestCache
from nemo_llm_feedback.training.callbacks import entity_validation
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.transcripts import transcribed


class Preference:
    """Rewards the member that the model finds least likely; shuffled, the reward goes to its neighbour instead."""

    name = "preference"

    def __init__(self, *, shuffled: bool) -> None:
        self._shuffled = shuffled
        self.best: dict[str, tuple[int, ...]] = {}

    def __call__(self, groups: list[HypothesisGroup]) -> RewardOutput:
        rows = []
        for group in groups:
            worst = min(range(len(group)), key=lambda n: group.ref_logp[n])
            self.best[group.utterance] = group.hypotheses[worst].tokens
            row = [float(h.tokens == self.best[group.utterance]) * 5 for h in group.hypotheses]
            if self._shuffled:
                row = row[1:] + row[:1]
            rows.append(row)
        return RewardOutput(pad_groups(rows), {})


def test_the_weight_of_labelled_rows_holds_in_a_batch_of_them_alone(nemo_file: Any, tmp_path: Path) -> None:
    """It counted as 1 there, also where labels were to be ignored."""
    mixed = write_manifest(tmp_path / "mixed.json", [*TEXTS, None, None])
    losses = {}
    for weight in (1.0, 0.25, 0.0):
        model = restore(nemo_file("ctc_bpe"), map_location="cpu")
        feedback = {"supervised_weight": weight}
        model.setup_feedback(config(mixed, feedback=feedback), work_dir=tmp_path / str(weight), reward=label_reward)
        begin(model)
        (last, *_), nemos = model.decoder.parameters(), dict[str, Any](log={})
        model._labelled_step = lambda batch, number, given=nemos, p=last: given | {"loss": 0.0 * p.sum() + 2.0}
        losses[weight] = float(model.training_step(next(iter(model._train_dl)), 0)["loss"])
    assert losses == {1.0: 2.0, 0.25: 0.5, 0.0: 0.0}


def test_rectangles_and_masks_of_python_fit_short_audio_and_follow_torch(nemo_file: Any) -> None:
    """NeMo's SpecCutout (QuartzNet) raises on audio shorter than its rectangles, and no seed reaches its masks."""
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    model.spec_augmentation = SpectrogramAugmentation(rect_masks=5, rect_time=120, rect_freq=500)
    signal, lengths = torch.randn(2, 8000), torch.tensor([8000, 6000])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad(), evaluation_mode(model):
            found.append(encode(model, signal, lengths, augment=True)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert model.spec_augmentation.spec_cutout.rect_time == 120


@pytest.mark.parametrize("kind", ["ctc_bpe", "rnnt_char", "hybrid_bpe"])
def test_weight_zero_and_labelled_batches_are_bit_equal_to_stock(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "all.json", TEXTS)
    mixed = write_manifest(tmp_path / "mixed.json", [*TEXTS, None, None])
    stock_ds = {**config(manifest)["model"]["train_ds"]}
    stock = stock_class(kind).restore_from(str(nemo_file(kind)), map_location="cpu")
    fit(stock, steps=2, train_ds=stock_ds)
    runs = {"labelled": (mixed, {}), "weight 0": (mixed, {"weight": 0.0})}
    for name, (path, feedback) in runs.items():
        ours = restore(nemo_file(kind), map_location="cpu")
        # The first two batches of `mixed` are those of `all`: only labelled rows.
        ours.setup_feedback(config(path, feedback=feedback), work_dir=tmp_path / name, reward=label_reward)
        fit(ours, steps=2)
        for (key, a), (other, b) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
            assert key == other
            assert torch.equal(a, b), f"{name}: {key}"


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_gradient_reaches_every_adapted_part(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file(kind), map_location="cpu")
    keys = list(model.state_dict())
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model.setup_feedback(
        config(manifest, lr=1e-2, objective={"temperature": 0.2}), work_dir=tmp_path, reward=label_reward
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, steps=2)
    assert list(model.state_dict()) == keys
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    wanted = {"encoder", "decoder"} | ({"joint"} if "ctc" not in kind.split("_")[0] else set())
    wanted |= {"ctc_decoder"} if kind.startswith("hybrid") else set()
    assert moved == wanted
    # BatchNorm statistics and the train flags are as they were: the pass ran in eval mode and gave it back.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "running_" in k)
    assert model.encoder.training


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_constructed_preference_is_learned_and_its_shuffle_is_not(
    shuffled: bool, nemo_file: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # also seeds the sampler of the groups
    preference = Preference(shuffled=shuffled)
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    settings = config(manifest, lr=3e-3, feedback={"refresh_every": 100})
    settings["model"]["train_ds"]["batch_size"] = 4
    model.setup_feedback(settings, work_dir=tmp_path, reward=preference)
    fit(model, steps=60)
    nbest = model.feedback.cache.latest
    audio = next(model.feedback.reader.split(batch).unlabeled for batch in model._train_dl)
    assert nbest.utterances == audio.utterances
    with torch.no_grad(), evaluation_mode(model):
        encoded, lengths = encode(model, audio.signal, audio.signal_len)
        now = torch.softmax(model.feedback.heads[0].score(encoded, lengths, nbest.labels), dim=1)
    before, after = [], []
    for b, labels in enumerate(nbest.labels):
        n = labels.index(preference.best[nbest.utterances[b]])
        before.append(float(torch.softmax(nbest.old_logp["ctc"][b, : len(labels)], 0)[n]))
        after.append(float(now[b, n]))
    gain = sum(after) / len(after) - sum(before) / len(before)
    assert gain < 0.05 if shuffled else gain > 0.4, (before, after)


def test_unlabeled_rows_never_reach_nemos_step(nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", ["a latte", None, "", "thank you"])
    settings = config(manifest)
    settings["model"]["train_ds"]["batch_size"] = 4
    model.setup_feedback(settings, work_dir=tmp_path, reward=label_reward)
    seen: list[list[int]] = []
    stock_step = stock_class("ctc_bpe").training_step

    def spy(self: Any, batch: Any, batch_nb: int) -> Any:
        seen.append(batch[3].tolist())
        return stock_step(self, batch, batch_nb)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_class("ctc_bpe"), "training_step", spy)
        fit(model, steps=1)
    assert len(seen) == 1
    assert len(seen[0]) == 2
    assert min(seen[0]) > 0
    assert len(model.feedback.cache.latest) == 2


def test_greedy_is_a_member_and_members_differ_after_normalisation(nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file("rnnt_bpe"), map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model.setup_feedback(config(manifest), work_dir=tmp_path, reward=label_reward)
    fit(model, steps=1)
    nbest = model.feedback.cache.latest
    for texts, members in zip(nbest.texts, nbest.hypotheses, strict=True):
        assert len(set(texts)) == len(texts)
        assert any(h.source == "greedy" for h in members) or len(texts) == 1


def test_feedback_gradient_matches_finite_differences(nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file("hybrid_bpe"), map_location="cpu").double()
    model.preprocessor.float()
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    model.setup_feedback(config(manifest, feedback={"refresh_every": 100}), work_dir=tmp_path, reward=label_reward)
    processed = model.preprocessor.forward
    model.preprocessor.forward = lambda **kw: tuple(
        x.double() if x.is_floating_point() else x for x in processed(**kw)
    )
    model.feedback_setup.reference.preprocessor.forward = model.preprocessor.forward
    feedback = begin(model)
    audio = feedback.reader.split(next(iter(model._train_dl))).unlabeled
    assert audio is not None
    model.feedback_loss(audio).total().backward()
    torch.manual_seed(3)
    for name in (
        "encoder.layers.0.feed_forward1.linear1.weight",
        "joint.joint_net.2.weight",
        "decoder.prediction.embed.weight",
    ):
        parameter = model.get_parameter(name)
        direction = torch.randn_like(parameter)
        slope = float((parameter.grad * direction).sum())
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter += step * direction
                values.append(float(model.feedback_loss(audio).total()))
                parameter -= step * direction
        assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=2e-3, abs=1e-7), name
        assert abs(slope) > 1e-6, name


def test_hybrid_adapts_only_the_head_asked_for(nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file("hybrid_bpe"), map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    model.setup_feedback(config(manifest, lr=1e-2, feedback={"heads": "ctc"}), work_dir=tmp_path, reward=label_reward)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, steps=1)
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"encoder", "ctc_decoder"}
    assert [h.name for h in heads_of(model)] == ["transducer", "ctc"]


def test_what_is_measured_of_a_hybrid_is_the_head_that_learns(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve during training, and what stands before and after it, were of two heads."""
    model = restore(nemo_file("hybrid_bpe"), map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    rows = read_manifest(write_manifest(tmp_path / "dev.json", TEXTS[:2]))
    model.setup_feedback(config(manifest, feedback={"heads": "ctc"}), work_dir=tmp_path, reward=label_reward)
    settings = begin(model).config
    expected = [transcribe_rows(model, rows, head=head) for head in ("ctc", "transducer")]
    assert expected[0] != expected[1]

    scored: list[list[str]] = []
    score = entity_validation.score_rows
    monkeypatch.setattr(
        entity_validation,
        "score_rows",
        lambda rows, texts, **kw: scored.append(list(texts)) or score(rows, texts, **kw),
    )
    trainer: Any = SimpleNamespace(sanity_checking=False, global_step=1, loggers=[], callbacks=[])
    entity_validation.EntityValidation({"dev": rows}).on_validation_end(trainer, model)
    scores, pool = transcribed(model, {"dev": rows}, rows, settings, batch_size=2)
    assert [scored[0], list(scores["dev"].hypotheses), list(pool.texts)] == [expected[0]] * 3


def test_a_banded_loss_is_within_the_tolerance(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.asr.likelihood import transducer

    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    losses, calls = [], []
    banded = transducer.banded_scores
    monkeypatch.setattr(transducer, "banded_scores", lambda *args, **kw: calls.append(1) or banded(*args, **kw))
    for tolerance in (0.0, 1e-3):
        model = restore(nemo_file("tdt_bpe"), map_location="cpu")
        settings = config(manifest, feedback={"band_tolerance": tolerance}, objective={"mass_weight": 1.0})
        model.setup_feedback(settings, work_dir=tmp_path / str(tolerance), reward=label_reward)
        audio = begin(model).reader.split(next(iter(model._train_dl))).unlabeled
        losses.append(float(model.feedback_loss(audio).total()))
        assert bool(calls) == bool(tolerance)
    # The loss weighs log p's by shares that add up to one, each for the objective and the mass.
    assert losses[1] == pytest.approx(losses[0], abs=3e-3)
    assert calls


def test_a_large_joint_is_banded_by_default_and_the_log_gives_the_bound(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.asr import heads
    from nemo_llm_feedback.training import setup

    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    model = restore(nemo_file("rnnt_bpe"), map_location="cpu")
    last = model.joint.joint_net[-1]
    lines: list[str] = []
    monkeypatch.setattr(setup.logging, "info", lambda text, *args, **kw: lines.append(str(text)))
    for size, tolerance, banded in ((0, None, True), (1, None, False), (0, 0.0, False)):
        monkeypatch.setattr(heads, "BAND_SIZE", last.in_features * last.out_features + size)
        lines.clear()
        settings = config(manifest, feedback={"band_tolerance": tolerance})
        model.setup_feedback(settings, work_dir=tmp_path / f"{size}{tolerance}", reward=label_reward)
        assert any("loses at most 0.001 nat" in line for line in lines) == banded
        assert (model.feedback_setup.heads[0]._band is not None) == banded


def test_augmented_learning_masks_the_audio_and_keeps_the_hypotheses_of_the_clean_one(
    nemo_file: Any, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    members, losses, masked = [], [], []
    for augment in (False, True):
        torch.manual_seed(0)  # also seeds the sampler of the groups
        model = restore(nemo_file("ctc_bpe"), map_location="cpu")
        model.setup_feedback(
            config(manifest, feedback={"augment": augment}), work_dir=tmp_path / str(augment), reward=label_reward
        )
        feedback = begin(model)
        hook = lambda module, args, output: masked.append(augment)  # noqa: E731, B023
        model.spec_augmentation.register_forward_hook(hook)
        audio = feedback.reader.split(next(iter(model._train_dl))).unlabeled
        torch.manual_seed(0)
        loss = model.feedback_loss(audio).total()
        loss.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.encoder.parameters())
        losses.append(float(loss))
        members.append(feedback.cache.latest.texts)
    assert masked == [True]
    assert members[0] == members[1]
    assert losses[0] != losses[1]


def test_augmented_learning_encodes_the_clean_audio_only_to_propose(nemo_file: Any, tmp_path: Path) -> None:
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    model.setup_feedback(config(manifest, feedback={"augment": True}), work_dir=tmp_path, reward=label_reward)
    feedback = begin(model)
    audio = feedback.reader.split(next(iter(model._train_dl))).unlabeled
    encoded: list[Any] = []
    model.encoder.register_forward_hook(lambda module, args, output: encoded.append(output))
    model.feedback_loss(audio)
    assert len(encoded) == 1, "the pool's measurement has proposed these groups"
    feedback.cache._rows.clear()
    model.feedback_loss(audio)
    assert len(encoded) == 3


def test_ratios_compare_policies_and_not_masks_while_the_gradient_is_that_of_the_masked_audio(
    nemo_file: Any, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 2)
    gradients = {}
    for augment in (False, True):
        torch.manual_seed(0)
        model = restore(nemo_file("ctc_bpe"), map_location="cpu")
        sections: dict[str, Any] = {"feedback": {"augment": augment}, "objective": {"name": "gspo"}}
        model.setup_feedback(config(manifest, **sections), work_dir=tmp_path / str(augment), reward=label_reward)
        feedback = begin(model)
        audio = feedback.reader.split(next(iter(model._train_dl))).unlabeled
        loss = model.feedback_loss(audio)
        assert loss.metrics["ratio_mean"].value == pytest.approx(1.0, abs=1e-6)
        audio_again = model.feedback_loss(audio)  # other masks, the same policy
        assert audio_again.metrics["ratio_mean"].value == pytest.approx(1.0, abs=1e-4)
        loss.total().backward()
        gradients[augment] = torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None])
    assert gradients[True].abs().max() > 0
    assert not torch.allclose(gradients[False], gradients[True])


def test_pseudo_labels_that_nemo_learns_need_no_gradient_through_the_proposals_and_kept_ones_no_pass(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder ran once more in every step, and its activations stayed until NeMo's own pass was done."""
    from nemo_llm_feedback.training import mixin

    with_gradient: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        with_gradient.append(torch.is_grad_enabled())
        return encode(*args, **kwargs)

    monkeypatch.setattr(mixin, "encode", noted)
    manifest = write_manifest(tmp_path / "m.json", [None] * 4)
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    objective = {"name": "self_training", "augment": True}
    model.setup_feedback(config(manifest, objective=objective, feedback={"refresh_every": 100}))
    fit(model, steps=6)
    assert with_gradient == [False] * 2  # a batch each


def test_a_pool_that_all_ranks_hold_is_stored_once(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.training import state as module

    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    manifest = write_manifest(tmp_path / "m.json", [None] * 3, context=["an order", "an order", "a call"])
    model.setup_feedback(config(manifest), reward=label_reward)
    state = begin(model)
    with torch.no_grad():
        for part in model.encoded_pool():
            state.nbest(*part, refresh=0)
    monkeypatch.setattr(module, "gather", lambda value: [value, value])
    assert len(state.to_plain()["nbest"]) == 2  # each rank has proposed what it has met
    state.cache.filled = state.cache.refresh
    (kept,) = state.to_plain()["nbest"]
    assert len(kept["kept"]["utterances"]) == 3
    assert len(kept["kept"]["contexts"]) == 2  # each once: they may hold thousands of terms
    again = NBestCache()
    again.load_plain(kept)
    names = kept["kept"]["utterances"]
    assert again.get(names).contexts == state.cache.get(names).contexts
    assert len(state.to_plain()["random"]) == 2
