"""A run finds on its pool how far it trusts other recognisers, and makes its groups by that."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import run
from helpers.tiny import write_manifest

from nemo_llm_feedback.cli.jobs.start import others_line
from nemo_llm_feedback.core.config import RunConfig, parse_run_config
from nemo_llm_feedback.core.types import Context, Hypothesis
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.hypotheses.maker import judged
from nemo_llm_feedback.hypotheses.nbest import NBestBatch, NBestCache
from nemo_llm_feedback.hypotheses.trust import Trust
from nemo_llm_feedback.training.pool import EncodedAudio, measure_pool

ROWS = 24
GIVEN = {"llm": {"model": "a/b"}, "context": {"description": "x"}}


class _Maker:
    """Groups of ``ROWS`` utterances: two texts of our own, what ``cloud`` heard, and what ``liar`` wrote for the next
    utterance. On audio b a text about utterance b has log p −50, any other −80 to −90."""

    def __init__(self, config: RunConfig) -> None:
        self._trust = Trust.of(config.reward)
        self.proposer = SimpleNamespace(config=config.proposals, same_weights=nullcontext)

    def make(self, *batch: Any) -> NBestBatch:
        members, logp = [], []
        for b in range(ROWS):
            heard, wrong = (b + 1,) * 10, ((b + 1) % ROWS + 1,) * 10
            own = (Hypothesis("tea", (99,), "greedy"), Hypothesis("a tea", (98, 99), "beam"))
            members.append((*own, Hypothesis(f"c{b}", heard, "cloud"), Hypothesis(f"l{b}", wrong, "liar")))
            logp.append([-10.0, -14.0, _logp(b, heard), _logp(b, wrong)])
        names = tuple(f"u{b}" for b in range(ROWS))
        return self._judged(names, tuple(members), {"ctc": torch.tensor(logp)})

    def judged_anew(self, nbest: NBestBatch, texts: Any) -> NBestBatch:
        return self._judged(nbest.utterances, nbest.hypotheses, nbest.ref_logp)

    def _judged(self, names: Any, members: Any, ref: Any) -> NBestBatch:
        found = judged(names, (Context(),) * ROWS, members, ref, None, self._trust)
        scores = found.ref_logp["ctc"]
        return NBestBatch(**{**vars(found), "parts": {**found.parts, "llm": 3 * scores, "asr": scores}})

    def reference_scores(self, audio: Any, texts: Any) -> list[dict[tuple[int, ...], float]]:
        return [{text: _logp(b, text) for text in row} for b, row in enumerate(texts)]


def _logp(b: int, text: tuple[int, ...]) -> float:
    return -50.0 if text[0] == b + 1 else -80.0 - (7 * b + 5 * text[0]) % 11


def _pool(external: Any) -> list[EncodedAudio]:
    audio: Any = SimpleNamespace(utterances=("u",) * ROWS, contexts=(Context(),) * ROWS, external=external, texts=())
    return [EncodedAudio(audio, None, None)]  # type: ignore[arg-type]


def _measured(reward: dict[str, Any], external: Any) -> tuple[dict[str, Any], list[RunConfig]]:
    asked: list[RunConfig] = []

    def build(config: RunConfig) -> Any:
        asked.append(config)
        return _Maker(config)

    config = parse_run_config({**GIVEN, "reward": reward})
    return asdict(measure_pool(_pool(external), build, config, head="ctc")), asked


def test_the_pool_sets_alpha_and_the_trust_and_the_groups_follow() -> None:
    found, asked = _measured({}, (("a text",),) * ROWS)
    assert found["heard"] == {"cloud": 1.0, "liar": 0.0}
    assert found["trust"]["liar"] == 0.0
    # The gap of what was heard is 40 nats on 10 labels; nothing was made up, so all gaps are trusted: 80 nats on 10.
    assert found["trust"]["cloud"] == 8.0
    assert found["members"] == 3.0, "the nonsense is still in the groups"
    assert found["alpha"] == 1.0, "three times the recogniser's spread, by our own members alone"
    assert asked[-1].reward.trust == found["trust"]


@pytest.mark.parametrize("reward", [{"trust": {"cloud": 3.0}}, {"asr_weight": 0.0}, {"alpha": 1.0, "trust": {}}])
def test_trust_that_is_set_or_has_no_use_is_not_measured(reward: dict[str, Any]) -> None:
    found, asked = _measured(reward, (("a text",),) * ROWS)
    assert found["heard"] is None
    assert found["trust"] == reward.get("trust")
    assert asked[-1].reward.trust == reward.get("trust")


def test_a_pool_without_other_recognisers_has_no_trust_to_measure() -> None:
    found, _ = _measured({}, ())
    assert (found["heard"], found["trust"]) == (None, None)


def test_a_whole_run_writes_down_and_uses_what_it_found(
    nemo_file: Any,
    tiny_llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four utterances are too few for any trust: the transcripts are heard of in the log and are no members."""
    seen: list[NBestBatch] = []
    get = NBestCache.get

    def spied(*args: Any) -> NBestBatch:
        seen.append(get(*args))
        return seen[-1]

    monkeypatch.setattr(NBestCache, "get", spied)
    texts = [[{"text": text, "source": "cloud"}] for text in ("one tea", "a mocha", "soy milk", "to go")]
    manifest = write_manifest(tmp_path / "pool.json", [None] * 4, hypotheses=texts)
    result = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path, "trainer.max_steps=1")
    statistics = json.loads((result.log_dir / "pool_statistics.json").read_text())
    assert (statistics["heard"], statistics["trust"]) == ({"cloud": 0.0}, {"cloud": 0.0})
    assert seen, "no group was learned from"
    assert all(found.parts["trust"].nan_to_num().eq(0).all() for found in seen)
    assert not any(names == ("cloud",) for found in seen for row in found.sources for names in row)
    assert others_line(read_manifest(manifest), parse_run_config(GIVEN)) == "4 rows of cloud; reward.trust by the pool"
    given = run(
        nemo_file("ctc_bpe"),
        manifest,
        tiny_llm,
        tmp_path / "given",
        "reward.trust={cloud: 1e6}",
        "trainer.max_steps=1",
    )
    assert json.loads((given.log_dir / "pool_statistics.json").read_text())["heard"] is None
    assert any(names == ("cloud",) for row in seen[-1].sources for names in row)
