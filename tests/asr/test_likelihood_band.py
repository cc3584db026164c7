"""The banded transducer lattice against the exact one: within its tolerance, within its own bound, and cheaper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.oracles import TinyDecoder, TinyJoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nemo_llm_feedback.asr.likelihood import Band, BandReport, JointCells, transducer_log_prob
from nemo_llm_feedback.asr.likelihood.band import _upper_bounds
from nemo_llm_feedback.asr.likelihood.joint import arc_scores
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.trie import PrefixTrie

LABELS, WIDTH, ENCODER = 12, 4, 6
FAMILIES: list[Sequence[int] | None] = [None, (0, 1), (0, 1, 2, 3, 4)]

Model = tuple[nn.Module, nn.Module]


def make_model(durations: Sequence[int] | None, *, seed: int = 0, scale: float = 1.0) -> Model:
    torch.manual_seed(seed)
    joint = TinyJoint(ENCODER, WIDTH, num_classes=LABELS, num_extra_outputs=len(durations or ()))
    with torch.no_grad():
        joint.joint_net[-1].weight *= scale
    return TinyDecoder(LABELS, WIDTH).double().eval(), joint.double().eval()


def random_frames(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_prob(
    encoded: Tensor,
    lengths: Tensor,
    trie: PrefixTrie,
    model: Model,
    durations: Sequence[int] | None,
    band: Band | None = None,
) -> Tensor:
    return transducer_log_prob(encoded, lengths, trie, *model, durations=durations or (), band=band)


def gradient(total: Tensor, encoded: Tensor, model: Model) -> Tensor:
    """Of the encoder output and all weights, as one vector."""
    inputs = [encoded, *(param for module in model for param in module.parameters())]
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), max_size=5)), min_size=1, max_size=8),
    st.lists(st.integers(0, 10), min_size=3, max_size=3),
    st.sampled_from(FAMILIES),
    st.sampled_from([1e-6, 1e-3, 0.1]),
    st.sampled_from([1.0, 20.0]),
    st.integers(0, 10**6),
)
def test_never_further_from_the_exact_value_than_it_reports(
    hyps: list[tuple[int, list[int]]],
    sizes: list[int],
    durations: Sequence[int] | None,
    tolerance: float,
    scale: float,
    seed: int,
) -> None:
    lengths, model = torch.tensor(sizes), make_model(durations, seed=seed, scale=scale)
    encoded = random_frames(3, 10, ENCODER, seed=seed).requires_grad_()
    trie = PrefixTrie.build([labels for _, labels in hyps], [row for row, _ in hyps])
    reports: list[BandReport] = []
    exact = log_prob(encoded, lengths, trie, model, durations)
    banded = log_prob(encoded, lengths, trie, model, durations, Band(tolerance, reports.append))
    (report,) = reports
    possible = exact.isfinite()
    assert torch.equal(banded.isfinite(), possible)
    assert report.lost.shape == exact.shape
    assert (report.lost[~possible] == 0).all()
    short = (exact - banded)[possible]
    assert (short >= -1e-9).all()
    assert (short <= report.lost[possible] + 1e-9).all()
    assert (report.lost <= tolerance).all()
    assert report.evaluated <= report.cells == int((lengths[trie.utterance]).sum())


@pytest.mark.parametrize("durations", FAMILIES)
def test_bounds_of_all_arcs_are_above_the_arcs(durations: Sequence[int] | None) -> None:
    decoder, joint = make_model(durations, scale=5.0)
    trie = PrefixTrie.build([[0, 1, 2], [0, 3], [], [5, 5], [7]], [0, 0, 0, 1, 1])
    with torch.no_grad():
        frames, lengths = random_frames(2, 7, ENCODER), torch.tensor([7, 5])
        cells = JointCells(frames, lengths, trie, decoder, joint, memory_budget_mb=1)
        exact, bound = arc_scores(cells), _upper_bounds(cells)
    assert isinstance(joint.joint_net[-1], nn.Linear)
    valid = cells.all_cells()
    for of, above in zip(exact[:2], bound[:2], strict=True):
        assert (above[valid] >= of[valid] - 1e-12).all()
    assert (bound.blank[valid] > exact.blank[valid]).all()  # labels of no hypothesis have some probability
    torch.testing.assert_close(bound.durations[:, valid], exact.durations[:, valid])


@pytest.mark.parametrize("durations", FAMILIES)
def test_gradient_is_the_exact_one_up_to_the_mass_left_out(durations: Sequence[int] | None) -> None:
    model, lengths = make_model(durations, scale=20.0), torch.tensor([40, 25])
    encoded = random_frames(2, 40, ENCODER).requires_grad_()
    trie = PrefixTrie.build([[0, 1, 2, 0, 1], [0, 1, 2, 2], [3, 3]], [0, 0, 1])
    weight = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
    exact = gradient(log_prob(encoded, lengths, trie, model, durations) @ weight, encoded, model)
    for tolerance, error in ((1e-3, 1e-2), (1e-9, 1e-7)):
        banded = log_prob(encoded, lengths, trie, model, durations, Band(tolerance))
        found = gradient(banded @ weight, encoded, model)
        assert (found - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("durations", FAMILIES)
def test_only_the_cells_that_are_reported_pass_through_the_whole_joint(durations: Sequence[int] | None) -> None:
    decoder, joint = make_model(durations, scale=20.0)
    with torch.no_grad():
        joint.joint_net[-1].bias[4:LABELS] -= (
            60.0  # the probable labels are those of the hypotheses, as in real groups
        )
    lengths, trie = torch.tensor([60, 40]), PrefixTrie.build([[0, 1, 2, 0, 1], [0, 1, 2, 2], [1] * 4], [0, 0, 1])
    evaluate, cells = joint.joint_after_projection, [0]

    def count_cells(f: Tensor, g: Tensor) -> Tensor:
        logits = evaluate(f, g)
        if logits.shape[-1] == joint.num_classes_with_blank:
            cells[0] += logits.shape[:-1].numel()
        return logits

    joint.joint_after_projection = count_cells
    reports: list[BandReport] = []
    with torch.no_grad():
        log_prob(
            random_frames(2, 60, ENCODER), lengths, trie, (decoder, joint), durations, Band(report=reports.append)
        )
    assert cells[0] == reports[0].evaluated
    assert 0 < reports[0].evaluated < reports[0].cells


@pytest.mark.parametrize("durations", FAMILIES)
def test_broken_and_empty_rows_stay_where_they_are(durations: Sequence[int] | None) -> None:
    model, clean = make_model(durations, scale=10.0), random_frames(3, 8, ENCODER)
    dirty = clean.clone()
    dirty[1, 2, 1] = math.nan
    dirty.requires_grad_()
    trie, lengths = PrefixTrie.build([[0], [1], [0, 1], [2]], [0, 1, 2, 2]), torch.tensor([5, 8, 0])
    found = log_prob(dirty, lengths, trie, model, durations, Band())
    expected = log_prob(clean, lengths, trie, model, durations)
    assert found.isnan().tolist() == [False, True, False, False]
    assert found[2:].tolist() == [-math.inf, -math.inf]
    assert abs(float(found[0] - expected[0])) <= 1e-3
    (grad,) = torch.autograd.grad(found[0], dirty)
    assert grad.isfinite().all()
    assert grad[1:].abs().sum() == 0


def test_double_backward_raises() -> None:
    encoded = random_frames(1, 6, ENCODER).requires_grad_()
    trie = PrefixTrie.build([[0, 1]], [0])
    total = log_prob(encoded, torch.tensor([6]), trie, make_model(None), None, Band())
    (grad,) = torch.autograd.grad(total.sum(), encoded, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_faults_are_named() -> None:
    with pytest.raises(ConfigError, match="must be > 0"):
        Band(tolerance=0.0)
    trie, lengths = PrefixTrie.build([[0, 1]], [0]), torch.tensor([6])
    decoder, joint = make_model(None)
    joint.train()
    with pytest.raises(ConfigError, match="eval mode"):
        log_prob(random_frames(1, 6, ENCODER), lengths, trie, (decoder, joint), None, Band())
    joint.eval().joint_net.append(nn.Identity())
    with pytest.raises(ConfigError, match="Linear"):
        log_prob(random_frames(1, 6, ENCODER), lengths, trie, (decoder, joint), None, Band())


def test_the_band_is_on_by_default_where_the_joint_is_large_and_off_where_it_is_asked_for(nemo_file: Any) -> None:
    from nemo_llm_feedback.asr.heads import band_of
    from nemo_llm_feedback.training.models import restore

    small, other = restore(nemo_file("tdt_bpe"), map_location="cpu"), restore(nemo_file("ctc_bpe"), map_location="cpu")
    large = SimpleNamespace(joint=SimpleNamespace(joint_net=[torch.nn.Tanh(), torch.nn.Linear(640, 1030)]))
    assert band_of(small, None) is None
    assert band_of(other, None) is None
    found = band_of(large, None)
    assert found is not None
    assert found.tolerance == 1e-3
    assert band_of(large, 0.0) is None
    asked = band_of(small, 0.01)
    assert asked is not None
    assert asked.tolerance == 0.01
