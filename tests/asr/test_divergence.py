"""How far a policy is from its start: against enumeration, and what training with replay rows does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import begin, config, fit
from helpers.oracles import TinyDecoder, TinyJoint, joint_tables, transducer_paths
from helpers.ranks import judge
from helpers.tiny import write_manifest
from helpers.transducers import FAMILIES, LENGTHS, Model, make_model, random_frames
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_llm_feedback.asr.likelihood import JointCells, ctc_divergence, transducer_divergence
from nemo_llm_feedback.core.config import parse_run_config
from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.replay_kl import replay_kl

TEXTS = [[0, 1], [2, 2], [], [1]]  # of rows with 5, 3, 0 and 1 frames


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def test_ctc_is_the_sum_of_its_frames_and_knows_no_padding() -> None:
    policy = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 4, 5, dtype=torch.float64).log_softmax(-1)
    reference[1, 2:], lengths = math.nan, torch.tensor([4, 2, 0])
    log_probs = policy.log_softmax(-1)
    found = ctc_divergence(log_probs, reference, lengths)
    for b, frames in enumerate(lengths.tolist()):
        assert found[b].item() == pytest.approx(sum(_kl(reference[b, t], log_probs[b, t]) for t in range(frames)))
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert gradient.isfinite().all()
    assert not gradient[1, 2:].any()
    assert not gradient[2].any()
    assert gradient[0].any()


def test_ctc_is_zero_with_zero_gradient_at_the_start() -> None:
    policy = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    log_probs = policy.log_softmax(-1)
    found = ctc_divergence(log_probs, log_probs.detach(), torch.tensor([3, 3]))
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert found.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def _divergence(
    encoded: Tensor, policy: Model, frozen: Tensor, reference: Model, durations: Any, *, budget: float = 512
) -> Tensor:
    trie = PrefixTrie.build(TEXTS, range(4))
    cells = [
        JointCells(x, LENGTHS, trie, *model, memory_budget_mb=budget)
        for x, model in ((encoded, policy), (frozen, reference))
    ]
    return transducer_divergence(*cells, durations=durations or ())


def _enumerated(b: int, encoded: Tensor, policy: Model, frozen: Tensor, reference: Model, durations: Any) -> float:
    """Σ over all paths of p_ref(path | text) · Σ over its cells of the cell's KL."""
    frames, text, count = int(LENGTHS[b]), TEXTS[b], len(durations or ())
    tables = joint_tables(frozen[b, :frames], text, *reference, num_durations=count)
    own = joint_tables(encoded[b, :frames], text, *policy, num_durations=count)
    scores, sums = [], []
    for path in transducer_paths(frames, text, durations=durations):
        score = total = 0.0
        for t, u, token, index in path:
            score += float(tables[0][t, u, -1 if token is None else token])
            score += float(tables[1][t, u, index]) if count else 0.0
            total += sum(_kl(p[t, u], q[t, u]) for p, q in zip(tables, own, strict=True) if p.shape[-1])
        scores.append(score)
        sums.append(total)
    weights = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist() if scores else []
    return sum(w * s for w, s in zip(weights, sums, strict=True))


@pytest.mark.parametrize("durations", FAMILIES)
def test_transducers_equal_the_sum_over_all_paths_of_the_reference(
    durations: Sequence[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_llm_feedback.asr.likelihood.divergence._MIN_OCCUPANCY", 0.0)
    policy, reference = make_model(durations, seed=1), make_model(durations, seed=2)
    encoded, frozen = random_frames(4, 5, 6), random_frames(4, 5, 6, seed=7)
    encoded[1, 3:] = frozen[1, 3:] = math.nan  # padding
    found = _divergence(encoded, policy, frozen, reference, durations)
    for b in range(4):
        wanted = _enumerated(b, encoded, policy, frozen, reference, durations)
        assert found[b].item() == pytest.approx(wanted, rel=1e-9, abs=1e-12), b
    assert found[0] > 0.1


@pytest.mark.parametrize("durations", FAMILIES)
def test_what_is_left_out_is_little_and_the_gradient_is_right(durations: Sequence[int] | None) -> None:
    policy, reference = make_model(durations, seed=1, scale=3.0), make_model(durations, seed=2, scale=3.0)
    encoded, frozen = random_frames(4, 5, 6).requires_grad_(), random_frames(4, 5, 6, seed=7)
    found = _divergence(encoded, policy, frozen, reference, durations)
    wanted = [_enumerated(b, encoded, policy, frozen, reference, durations) for b in range(4)]
    assert found.tolist() == pytest.approx(wanted, abs=0.05)
    parameters = [encoded, *policy[0].parameters(), *policy[1].parameters()]
    gradients = torch.autograd.grad(found.sum(), parameters)
    step, at = 1e-6, 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        at = int(gradient.abs().argmax())
        with torch.no_grad():
            parameter.view(-1)[at] += step
            up = _divergence(encoded, policy, frozen, reference, durations).sum()
            parameter.view(-1)[at] -= 2 * step
            down = _divergence(encoded, policy, frozen, reference, durations).sum()
            parameter.view(-1)[at] += step
        assert float(up - down) / (2 * step) == pytest.approx(float(gradient.view(-1)[at]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("durations", FAMILIES)
def test_transducers_are_zero_with_zero_gradient_at_the_start(durations: Sequence[int] | None) -> None:
    model, encoded = make_model(durations), random_frames(4, 5, 6).requires_grad_()
    found = _divergence(encoded, model, encoded.detach(), model, durations)
    gradients = torch.autograd.grad(found.sum(), [encoded, *model[1].parameters()])
    assert found.abs().max() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients)


@pytest.mark.parametrize("durations", FAMILIES)
def test_transducer_kl_keeps_the_memory_budget_and_the_budget_changes_nothing(durations: Sequence[int] | None) -> None:
    policy, reference = make_model(durations, seed=1), make_model(durations, seed=2)
    inputs = [random_frames(4, 5, 6).requires_grad_(), *policy[0].parameters(), *policy[1].parameters()]
    frozen, sizes = random_frames(4, 5, 6, seed=7), []
    evaluate = policy[1].joint_after_projection

    def counted(f: Tensor, g: Tensor) -> Tensor:
        sizes.append(len(f))
        return evaluate(f, g)

    policy[1].joint_after_projection = counted
    found = []
    for budget, low, high in ((512, 5, 99), (8 * 4 * 8 * (5 + 4) / 2**20, 2, 4), (1e-9, 1, 1)):
        sizes.clear()
        value = _divergence(inputs[0], policy, frozen, reference, durations, budget=budget)
        found.append((value, torch.autograd.grad(value.sum(), inputs)))
        assert low <= max(sizes) <= high
    for value, gradients in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-12, atol=1e-14)
        for mine, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-13)


class _LargestTensor(TorchDispatchMode):
    """Notes the most entries that any tensor of floats has that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
        self.entries = max([self.entries, *made])
        return out


def test_transducer_kl_never_holds_the_outputs_of_all_cells() -> None:
    labels, frames, cells = 500, 40, 16
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append((TinyDecoder(labels, 4).eval(), TinyJoint(6, 4, num_classes=labels).eval()))
    trie, lengths = PrefixTrie.build([list(range(10))], [0]), torch.tensor([frames])
    encoded = [random_frames(1, frames, 6, seed=seed).float() for seed in (3, 4)]

    def largest(budget: float) -> int:
        with _LargestTensor() as seen:
            mine, frozen = (
                JointCells(x, lengths, trie, *model, memory_budget_mb=budget)
                for x, model in zip(encoded, models, strict=True)
            )
            transducer_divergence(mine, frozen).sum().backward()
        return seen.entries

    small = cells * 4 * 4 * (5 + labels + 1) / 2**20
    assert largest(512) > 200 * labels, "the case is too small to show anything"
    assert largest(small) <= cells * (labels + 1)


def test_transducer_kl_is_that_of_the_mode_of_its_forward_pass() -> None:
    """The joint is evaluated again in the backward, when the model may be in train mode: dropout must stay out."""
    policy, reference = make_model(None, seed=1), make_model(None, seed=2)
    policy[1].joint_net.insert(1, nn.Dropout(0.5))
    policy[1].eval()
    inputs = [random_frames(4, 5, 6).requires_grad_(), *policy[1].parameters()]
    found = []
    for training in (False, True):
        value = _divergence(inputs[0], policy, random_frames(4, 5, 6, seed=7), reference, None)
        policy[1].train(training)
        found.append(torch.autograd.grad(value.sum(), inputs))
        assert all(module.training is training for module in policy[1].modules())
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


# ---------------------------------------------------------------- in training


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("rnnt_char", "tdt_bpe", "hybrid_bpe")]


@pytest.mark.parametrize("kind", ["ctc_bpe", *_SLOW])
def test_replay_rows_hold_the_model_where_it_was(
    kind: str, nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest(tmp_path / "m.json", ["a latte", None, "one mocha", None], seconds=1.0)

    def drift(weight: float) -> list[float]:
        model = restore(nemo_file(kind), map_location="cpu")
        settings = config(manifest, lr=3e-3, feedback={"labelled": "replay", "replay_weight": weight})
        model.setup_feedback(settings, work_dir=tmp_path / f"{kind}_{weight}", reward=judge)
        seen: list[float] = []

        def spied(*args: Any) -> Any:
            loss = replay_kl(*args)
            seen.append(float(loss.metrics["replay_kl"].value))
            return loss

        monkeypatch.setattr("nemo_llm_feedback.training.mixin.replay_kl", spied)
        fit(model, steps=12)
        return seen

    free, held = drift(1e-6), drift(10.0)
    assert free[0] == pytest.approx(0.0, abs=1e-4)
    assert free[-1] > 0.05, "the feedback alone did not move the model on general speech"
    assert sum(held[6:]) < 0.5 * sum(free[6:])


def test_replay_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"labelled=replay with feedback.weight=0"):
        parse_run_config({"feedback": {"labelled": "replay", "weight": 0}, "reward": {"name": "length"}})
    with pytest.raises(ConfigError, match=r"feedback.labelled must be one of supervised, replay, reward, got 'kept'"):
        parse_run_config({"feedback": {"labelled": "kept"}, "reward": {"name": "length"}})


@pytest.mark.parametrize("lhotse", [False, True])
def test_a_row_can_say_what_its_text_is_for(lhotse: bool, nemo_file: Any, tmp_path: Path) -> None:
    use = ["kl", None, "supervised", None]
    manifest = write_manifest(tmp_path / "m.json", ["a latte", "one mocha", "tea", None], seconds=1.0, replay=use)
    train_ds = config(manifest)["model"]["train_ds"] | {"batch_size": 4}
    train_ds |= {"use_lhotse": True, "use_bucketing": False} if lhotse else {}
    sizes = {}
    for default in ("supervised", "replay"):
        model = restore(nemo_file("ctc_bpe"), map_location="cpu")
        settings = config(manifest, feedback={"labelled": default}, model={"train_ds": train_ds})
        model.setup_feedback(settings, work_dir=tmp_path / f"{default}_{lhotse}", reward=judge)
        parts = model.feedback_setup.reader.split(next(iter(model._train_dl)))
        sizes[default] = [len(four[1]) for four in parts[:2] if four is not None] + [len(parts.unlabeled.utterances)]
        fit(model, steps=2)
    assert sizes == {"supervised": [2, 1, 1], "replay": [1, 2, 1]}


def test_a_pool_without_weight_leaves_labelled_and_replay_rows(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None, None, "tea", "tea"], replay=[None, None, "kl", None])
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    sections: dict[str, Any] = {"feedback": {"weight": 0.0}, "objective": {"name": "self_training"}}
    model.setup_feedback(config(manifest, **sections), work_dir=tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, steps=1)  # the first batch has unlabeled rows only
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "running" not in k)
    model.setup_feedback(config(manifest, lr=1e-2, **sections), work_dir=tmp_path)
    fit(model, steps=2)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items() if "running" not in k)


@pytest.mark.parametrize("use_text", [True, False])
@pytest.mark.parametrize(
    ("kind", "lhotse"), [("ctc_bpe", False), ("ctc_bpe", True), ("rnnt_char", False), ("tdt_bpe", False)]
)
def test_a_replay_row_needs_no_text(
    kind: str, lhotse: bool, use_text: bool, nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None, None, "tea"], seconds=1.0, replay=["kl", None, "kl"])
    train_ds = config(manifest)["model"]["train_ds"] | {"batch_size": 3}
    train_ds |= {"use_lhotse": True, "use_bucketing": False} if lhotse else {}
    settings = config(manifest, feedback={"use_text": use_text}, model={"train_ds": train_ds})
    model = restore(nemo_file(kind), map_location="cpu")
    model.setup_feedback(settings, work_dir=tmp_path / "work", reward=judge)
    state = begin(model)
    assert [row.unlabeled for row in state.staged.rows] == [False, True, False]
    parts = state.reader.split(next(iter(model._train_dl)))
    assert parts.labelled is None
    assert len(parts.unlabeled.utterances) == 1
    assert sorted(parts.replay[3].tolist())[0] == 0  # no text; the other has one unless it is not read
    assert (max(parts.replay[3].tolist()) > 0) is use_text
    written: list[list[tuple[int, ...]]] = []
    greedy = state.reference.heads[0].greedy
    monkeypatch.setattr(
        state.reference.heads[0], "greedy", lambda *args, **more: written.append(greedy(*args, **more)) or written[-1]
    )
    loss = replay_kl(model, state, parts.replay)
    assert [len(texts) for texts in written] == [1 if use_text else 2]
    assert all(abs(float(term.value.detach())) < 1e-4 for term in loss.terms.values())  # nothing has moved yet
    fit(model, steps=2)


def test_replayed_audio_is_augmented_alike_for_both_models(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None, None], seconds=1.0, replay=["kl", None])
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    model.setup_feedback(config(manifest, feedback={"replay_augment": True}), work_dir=tmp_path / "work", reward=judge)
    state, seen = begin(model), []
    masks = model.spec_augmentation
    masks.register_forward_hook(lambda module, given, out: seen.append(out))
    batch = (
        torch.randn(1, 16000) * 0.1,
        torch.tensor([16000]),
        torch.zeros(1, 0, dtype=torch.long),
        torch.tensor([0]),
    )
    assert float(replay_kl(model, state, batch).metrics["replay_kl"].value) == pytest.approx(0.0, abs=1e-4)
    assert len(seen) == 1, "one draw of masks for the two"
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.1)
    assert float(replay_kl(model, state, batch).metrics["replay_kl"].value) > 1e-3


@pytest.mark.parametrize("key", ["augment", "replay_augment"])
def test_masks_that_the_checkpoint_lacks_are_refused_before_any_work(key: str, nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None, None], seconds=1.0, replay=["kl", None])
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    model.spec_augmentation = None
    with pytest.raises(ConfigError, match=rf"feedback.{key} needs a checkpoint with a spec_augment section"):
        model.setup_feedback(config(manifest, feedback={key: True}), work_dir=tmp_path / "work")


def test_a_faulty_use_of_text_is_told(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", ["tea", None], replay=["keep", "supervised"])
    with pytest.raises(ManifestError, match=r"2 fault\(s\)") as error:
        read_manifest(str(manifest))
    assert "`replay` must be kl or, for a row with text, supervised (got 'keep')" in str(error.value)


def test_the_old_name_of_a_rows_use_is_refused_with_the_new_one(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", ["tea", None], replay=[None, "anchor"])
    with pytest.raises(ManifestError, match='replay=anchor is now "replay": "kl"'):
        read_manifest(str(manifest))
