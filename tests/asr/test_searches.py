"""NeMo's searches: copied off the device at once, and captured where the weights stay.

No GPU is at hand: the searches run on the CPU with a stand-in for their graphs. Like a graph it keeps what NeMo
computes when it captures, so that a search that outlives its weights or its list is seen.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured
from helpers.fits import config, fit, label_reward
from helpers.rescored import encoded
from helpers.tiny import write_manifest

from nemo_llm_feedback.asr import heads, searches
from nemo_llm_feedback.asr.heads import Labels, heads_of
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.config import ProposalConfig
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.hypotheses.boosting import Boosting
from nemo_llm_feedback.hypotheses.proposals import Proposer
from nemo_llm_feedback.training.models import restore

KINDS = ["ctc_bpe", "rnnt_bpe", "tdt_bpe"]
LISTS = [("soy latte",), ("mocha", "tea"), ("large",)]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Searches run captured; counts captures and replays."""
    count: Counter[str] = Counter()
    capture, replay = captured.capture, captured.Replay.replay

    def counted(name: str, function: Any) -> Any:
        return lambda one: count.update([name]) or function(one)

    monkeypatch.setattr(captured, "capture", counted("captures", capture))
    monkeypatch.setattr(captured.Replay, "replay", counted("replays", replay))
    captured.stand_in(monkeypatch.setattr)
    return count


def _found(head: Any, x: torch.Tensor, lengths: torch.Tensor, boosting: Any) -> list[Any]:
    """What all the searches find."""
    plain = head.greedy(x, lengths, max_symbols=3), head.beam(x, lengths, size=4, max_symbols=3)
    boosted = [(boosting.of([LISTS[k]] * 3, x.device), 4.0) for k in (0, 1)] + [(boosting.of(LISTS, x.device), 4.0)]
    return [*plain, *(head.beam(x, lengths, size=4, max_symbols=3, boosting=b) for b in boosted)]


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_beams_labels_are_those_of_nemos_list(
    kind: str, boosted: bool, nemo_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (head,) = heads_of(restore(nemo_file(kind), map_location="cpu").eval())
    x, lengths = encoded(rows=3, frames=14)
    lengths[2] = 9
    boosting = (Boosting(head.vocabulary, ProposalConfig()).of(LISTS, x.device), 4.0) if boosted else None
    theirs: list[list[list[Labels]]] = []
    ours = heads.beam_labels

    def both(hyps: Any, *, by_length: bool, **options: Any) -> list[list[Labels]]:
        found = ours(hyps, by_length=by_length, **options)
        theirs.append(searches.nbest_labels(hyps.to_nbest_hyps_list(score_norm=by_length)))
        return found

    monkeypatch.setattr(heads, "beam_labels", both)
    found = head.beam(x, lengths, size=6, max_symbols=3, boosting=boosting)
    assert found == theirs[0]
    assert max(map(len, found)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_captured_searches_find_the_same_and_never_outlive_the_weights(
    kind: str, nemo_file: Any, captures: Counter[str]
) -> None:
    model = restore(nemo_file(kind), map_location="cpu")
    (head,) = heads_of(model)
    boosting = Boosting(head.vocabulary, ProposalConfig())
    x, lengths = encoded(rows=3, frames=14)
    lengths[2] = 9
    with evaluation_mode(model):
        before = _found(head, x, lengths, boosting)
        assert not captures
        with head.cuda_graphs():
            with head.cuda_graphs():
                assert _found(head, x, lengths, boosting) == before
            made = dict(captures)
            assert head.beam(x[:2], lengths[:2], size=4, max_symbols=3) == before[1][:2]
            assert captures["captures"] == made["captures"]  # a context inside keeps what the outer one has
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        after = _found(head, x, lengths, boosting)
        assert after != before
        with head.cuda_graphs():
            assert _found(head, x, lengths, boosting) == after


@pytest.mark.parametrize("kind", KINDS)
def test_the_setting_captures_once_for_all_batches_with_one_list(
    kind: str, nemo_file: Any, captures: Counter[str]
) -> None:
    model = restore(nemo_file(kind), map_location="cpu")
    (head,) = heads_of(model)
    x, lengths = encoded(rows=3, frames=14)
    contexts = [Context(terms=LISTS[0])] * 3
    made = {}
    for graphs in (False, True):
        proposer = Proposer(head, ProposalConfig(beam=4, boosted=4, cuda_graphs=graphs, max_symbols=3))
        with evaluation_mode(model), torch.no_grad(), proposer.same_weights():
            made[graphs] = [proposer.propose(x, lengths, contexts) for _ in range(3)]
        assert bool(captures) is graphs
    assert made[True] == made[False]
    searched = 2 if kind == "ctc_bpe" else 3  # beam, boosted beam, and a transducer's greedy search
    assert captures == {"captures": searched, "replays": 3 * searched}


@pytest.mark.parametrize("kind", ["ctc_bpe", "tdt_bpe"])
def test_the_searches_of_a_step_are_captured_anew_for_its_weights(
    kind: str, nemo_file: Any, tmp_path: Path, captures: Counter[str]
) -> None:
    manifest, learned = write_manifest(tmp_path / "m.json", [None] * 4), []
    for graphs in (False, True):
        model = restore(nemo_file(kind), map_location="cpu")
        proposals = {"beam": 4, "boosted": 2, "samples": 0, "boosting_weights": [], "cuda_graphs": graphs}
        context = {"description": "an order", "terms": ["mocha"]}
        model.setup_feedback(config(manifest, lr=0.1, proposals=proposals, context=context), reward=label_reward)
        before = dict(captures)
        fit(model, steps=3)
        assert bool(captures) is graphs
        learned.append(model.state_dict())
    searched = 2 if kind == "ctc_bpe" else 3
    assert captures["captures"] - before.get("captures", 0) == 3 * searched  # the pool's, which step 1 takes, and two
    for name, value in learned[0].items():
        assert torch.equal(value, learned[1][name]), name


@pytest.mark.parametrize("kind", ["rnnt_bpe", "tdt_bpe"])
def test_under_autocast_beams_add_up_their_scores_in_full_precision(
    kind: str, nemo_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NeMo's beams take the dtype of their inputs for sums: in bfloat16 −40 nats swallow all that is below 0.1."""
    (head,) = heads_of(restore(nemo_file(kind), map_location="cpu").eval())
    x, lengths = encoded(rows=3, frames=14)
    seen: list[torch.dtype] = []
    read = heads.beam_labels
    monkeypatch.setattr(heads, "beam_labels", lambda hyps, **how: seen.append(hyps.scores.dtype) or read(hyps, **how))
    expected = head.beam(x, lengths, size=4, max_symbols=3), head.greedy(x, lengths, max_symbols=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.beam(x, lengths, size=4, max_symbols=3), head.greedy(x, lengths, max_symbols=3)
    assert found == expected
    assert seen == [torch.float32] * 2
