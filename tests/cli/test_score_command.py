"""``score``: what it says of tiny models, the weights it uses and picks, statistics by hand, the LLM that waits."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import write_manifest
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.cli.jobs.quantization import compare_scores, comparison_text
from nemo_llm_feedback.cli.jobs.score import _formula
from nemo_llm_feedback.cli.jobs.tuning import Weights, choose, tune_by_labels, tuned_text
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.config import LLMConfig, RewardConfig
from nemo_llm_feedback.core.errors import LLMError, ManifestError, RewardError
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Context, Hypothesis, pad_groups
from nemo_llm_feedback.evaluation.metrics import score_corpus
from nemo_llm_feedback.evaluation.rank_agreement import best_members, rank_agreement
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.reward_scale import component_deviations, component_spread, from_spread
from nemo_llm_feedback.llm import load_llm, open_llm

NAN = math.nan
TEXTS = ["a latte with soy", "one large mocha", None, "tea is hot"]
SMALL = ["proposals.beam=3", "proposals.boosted=3", "proposals.term_swap=1", "proposals.max_symbols=3"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows, three with text, entities and short audio that holds the texts."""
    folder = tmp_path_factory.mktemp("data")
    return write_manifest(folder / "dev.json", TEXTS, entities=[["latte"], ["mocha"], [], ["tea"]])


@pytest.fixture(scope="module")
def flags(nemo_file: Any, tiny_llm: Path, manifest: Path) -> list[str]:
    """Checkpoint and flags that the commands share."""
    return [
        *(str(nemo_file("ctc_bpe")), "--manifest", str(manifest), "--llm", str(tiny_llm)),
        *("--description", "an order at a coffee shop", "--set", "context.terms=[latte,mocha]", *SMALL),
    ]


@pytest.fixture(scope="module")
def scored(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The JSON of ``score`` and the cache that it filled."""
    folder = tmp_path_factory.mktemp("score")
    assert main(["score", *flags, "--cache", f"{folder}/", "--json", str(folder / "out.json")]) == 0
    return json.loads((folder / "out.json").read_text()), folder


# ---------------------------------------------------------------- score


def test_every_component_is_there_and_adds_up(scored):
    report, _ = scored
    assert report["rows"] == report["total_rows"] == len(report["utterances"]) == 4
    alpha, beta = report["weights"]["alpha"], report["weights"]["beta"]
    for utterance in report["utterances"]:
        assert utterance["greedy"] == utterance["members"][0]["text"]
        rewards = [member["reward"] for member in utterance["members"]]
        assert utterance["chosen"] == utterance["members"][rewards.index(max(rewards))]["text"]
        for member in [*utterance["members"], *([utterance["reference"]] if utterance.get("reference") else [])]:
            whole = alpha * member["llm"] + member["asr"] + beta * member["length"]
            assert member["reward"] == pytest.approx(whole, abs=1e-3)
            assert member["length"] == len(member["text"].split())
            assert member["asr"] <= 0 > member["llm"]
    assert 0 < report["signal_fraction"] <= 1
    assert set(report["spread"]) == {"reward", "llm", "asr", "length"}
    assert "reference" not in report["utterances"][2]
    assert "word_errors" not in report["utterances"][2]["members"][0]


def test_rows_with_text_judge_the_reward(scored):
    report, _ = scored
    labelled = [u for u in report["utterances"] if "reference" in u]
    assert [u["reference"]["text"] for u in labelled] == [t for t in TEXTS if t]
    assert set(report["systems"]) == {"greedy", "best-rewarded", "oracle"}
    fewest = sum(min(m["word_errors"] for m in u["members"]) for u in labelled)
    words = sum(len(text.split()) for text in TEXTS if text)
    assert report["systems"]["oracle"]["wer"] == pytest.approx(100 * fewest / words)
    assert report["systems"]["oracle"]["wer"] <= report["systems"]["greedy"]["wer"]
    for name, found in report["prefers_reference"].items():
        wins = [u["reference"][name] > max(m[name] for m in u["members"]) for u in labelled]  # all members are wrong
        assert found == {"preferred": sum(wins), "rows": 3}
    assert set(report["rank_agreement"]) == {"wer", "ewer"}
    used = report["rank_agreement"]["wer"]
    assert used["groups"] + used["skipped"] == 3


def test_acoustic_scores_are_those_of_the_checkpoint(scored, nemo_file, manifest):
    from nemo_llm_feedback.asr.heads import heads_of
    from nemo_llm_feedback.asr.reference import encode
    from nemo_llm_feedback.core.trie import PrefixTrie
    from nemo_llm_feedback.data.audio import load_audio
    from nemo_llm_feedback.data.manifests import read_manifest
    from nemo_llm_feedback.evaluation.transcribe import transcribe_rows
    from nemo_llm_feedback.training.models import restore

    model = restore(nemo_file("ctc_bpe"), map_location="cpu").eval()
    rows = read_manifest(manifest)
    report, _ = scored
    assert [u["greedy"] for u in report["utterances"]] == transcribe_rows(model, rows)
    audio = load_audio(rows[:1], sample_rate=16000, device=torch.device("cpu"))
    (head,) = heads_of(model)
    labels = head.vocabulary.text_to_ids(TEXTS[0])
    with torch.no_grad():
        encoded, lengths = encode(model, audio.signal, audio.signal_len)
        logp = head.log_prob(encoded, lengths, PrefixTrie.build([labels], [0]))
    assert report["utterances"][0]["reference"]["asr"] == pytest.approx(float(logp[0]), abs=1e-3)


def test_a_second_run_takes_all_from_the_cache_and_loads_no_llm(scored, flags, tmp_path, monkeypatch, capsys):
    from nemo_llm_feedback.llm import loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the LLM was loaded"))
    report, cache = scored
    out = tmp_path / "again.json"
    command = ["score", *flags, "--cache", str(cache), "--show", "1", "--members", "2", "--json", str(out)]
    assert main(command) == 0
    again = json.loads(out.read_text())
    assert again["utterances"] == report["utterances"]
    text = capsys.readouterr().out
    assert "not loaded: every score was in the cache" in text
    assert "cache hit rate 100.0 %" in text
    assert text.count(" hypotheses)") == 1
    assert re.search(r"^reward = [\d.]+·llm \+ [\d.]+·length \+ asr; > the choice \(highest reward\), = greedy", text)
    assert re.search(r"^\S+@0\.000\+[\d.]+  \([23] of \d+ hypotheses\)$", text, flags=re.M), text
    assert " errors " in text
    assert "groups with signal" in text
    for name in ("reward", "llm", "asr", "length"):
        assert f"{name:8} prefers the reference to every wrong member" in text


def test_rows_without_text_and_a_rule_without_llm(nemo_file, tmp_path, capsys):
    bare = write_manifest(tmp_path / "bare.json", [None, None, None])
    command = ["score", str(nemo_file("ctc_bpe")), "--manifest", str(bare), "--utterances", "2", "--set", *SMALL]
    assert main([*command, "reward.name=length"]) == 0
    text = capsys.readouterr().out
    assert "2 of 3 rows" in text
    assert "no LLM in this reward" in text
    assert "no row has text" in text
    assert " errors " not in text


def test_faults_are_told_before_any_work(flags, manifest, tmp_path, capsys):
    assert main(["score", str(tmp_path / "no.nemo"), *flags[1:]]) == 1
    assert "no.nemo" in capsys.readouterr().err
    assert main(["score", flags[0], "--manifest", str(manifest), "--description", "x"]) == 1
    assert "--llm is missing" in capsys.readouterr().err
    assert main(["score", *flags, "reward.alhpa=1"]) == 1
    assert "reward.alpha" in capsys.readouterr().err
    assert main(["score", *flags, "llm.quantization=none", "--compare-quantization", "none"]) == 1
    assert "nf4, int8 and none" in capsys.readouterr().err
    assert main(["score", *flags, "reward.name=length", "--compare-quantization", "none"]) == 1
    assert "reward=llm" in capsys.readouterr().err
    assert main(["score", *flags, "reward.name=length", "--tune"]) == 1
    assert "reward.name=length has none" in capsys.readouterr().err


def test_entities_that_cannot_be_read_are_told_before_a_model_is_loaded(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.cli.jobs import nbest_probe
    from nemo_llm_feedback.training.inputs import labelled_rows

    monkeypatch.setattr(nbest_probe, "restore", lambda *args, **settings: pytest.fail("a model is loaded"))
    path = write_manifest(tmp_path / "m.json", ["tea", "a latte"], entities=[None, {"start": 2, "end": 7}])
    given = ["--manifest", str(path), "--set", "reward.name=length"]
    assert main(["score", str(nemo_file("ctc_char")), *given, "--description", "x"]) == 1
    assert f"{path}:2: `entities`: entity (2, 7)" in capsys.readouterr().err
    with pytest.raises(ManifestError, match=r"m\.json:2: `entities`"):  # nor does `adapt` begin with such a set
        labelled_rows(str(path))


def test_rows_are_spread_over_the_manifest():
    from nemo_llm_feedback.data.manifests import spread

    rows: Any = list(range(10))
    assert spread(rows, 0) == spread(rows, 10) == spread(rows, 99) == rows
    assert spread(rows, 1) == [5]
    assert spread(rows, 5) == [1, 3, 5, 7, 9]


# ---------------------------------------------------------------- weights


def test_fault_11_score_uses_the_weights_that_adapt_takes_from_the_same_rows(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spread and the weights of ``score`` are those of the pool's measurement on the same rows."""
    from nemo_llm_feedback.asr.encoded_rows import encoded_rows
    from nemo_llm_feedback.asr.heads import heads_of
    from nemo_llm_feedback.asr.reference import encode
    from nemo_llm_feedback.cli.jobs.nbest_probe import NBestProbe
    from nemo_llm_feedback.core.config.compose import compose_config
    from nemo_llm_feedback.hypotheses.maker import NBestMaker
    from nemo_llm_feedback.hypotheses.proposals import Proposer
    from nemo_llm_feedback.hypotheses.trust import Trust
    from nemo_llm_feedback.training.pool import EncodedAudio, measure_pool

    texts = [[text] for text in ("one tea", "a mocha", "soy milk", "to go")]
    manifest = write_manifest(tmp_path / "pool.json", [None] * 4, hypotheses=texts)
    overrides = (*SMALL, "proposals.boosting_weights=[]", "context.terms=[latte,mocha]")
    cfg = compose_config([*overrides, f"llm.model={tiny_llm}", "context.description=an order"])
    probe = NBestProbe(nemo_file("ctc_bpe"), manifest, cfg)
    (head,) = heads_of(probe.model)

    class Encoded:
        """The model as its own reference."""

        heads = (head,)

        def encode(self, signal: torch.Tensor, signal_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return encode(probe.model, signal, signal_len)

    def build(config: Any) -> NBestMaker:
        reward: Any = probe.reward
        alpha, beta = config.reward.weights
        return NBestMaker(
            Proposer(head, config.proposals),
            Encoded(),
            normalize=get_normalizer("basic"),
            reward=reward.with_weights(alpha=alpha, beta=beta),
            trust=Trust.of(config.reward),
        )

    batches = encoded_rows(probe.model, probe.rows, run_context=probe.config.context.load())
    pool = [EncodedAudio(audio, encoded, lengths) for _, audio, encoded, lengths in batches]
    measured = measure_pool(pool, build, probe.config, head=head.name)

    out = tmp_path / "out.json"
    flags = ["--manifest", str(manifest), "--llm", str(tiny_llm), "--description", "an order", "--json", str(out)]
    assert main(["score", str(nemo_file("ctc_bpe")), *flags, "--set", *overrides]) == 0
    found = json.loads(out.read_text())
    assert found["weights"] == {"alpha": measured.alpha, "beta": measured.beta, "origin": "spread", "grid": []}
    assert measured.alpha != 1.0
    assert measured.trust == {"external": 0.0}
    assert found["trusted"] == {"external": {"heard": 0.0, "trust": 0.0, "utterances": 4}}
    del found["spread"]["reward"]
    assert found["spread"] == pytest.approx(measured.spread, rel=1e-6)
    assert f"reward.alpha={measured.alpha:g} reward.beta={measured.beta:g}, by the spread" in capsys.readouterr().out


def test_weights_that_are_set_are_used(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["score", *flags, "--alpha", "0.5", "--beta", "3", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["weights"] == {
        "alpha": 0.5,
        "beta": 3.0,
        "origin": "settings",
        "grid": [],
    }
    assert "reward.alpha=0.5 reward.beta=3, as set" in capsys.readouterr().out


def nbest_of(*rows: tuple[list[str], list[float], list[float]]) -> NBestBatch:
    """Groups of (texts, LLM, ASR) scores; the first member of each is greedy."""
    lengths = [[float(len(text.split())) for text in texts] for texts, _, _ in rows]
    asr = pad_groups([asr for _, _, asr in rows])
    return NBestBatch(
        tuple(f"u{i}" for i in range(len(rows))),
        tuple(Context() for _ in rows),
        tuple(tuple(Hypothesis(text, ()) for text in texts) for texts, _, _ in rows),
        ref_logp={"ctc": asr.nan_to_num(nan=-math.inf)},
        rewards={"ctc": asr},
        parts={"llm": pad_groups([llm for _, llm, _ in rows]), "asr": asr, "length": pad_groups(lengths)},
    )


def scores_of(references: list[str], nbest: NBestBatch, entities: list[list[str]] | None = None) -> Any:
    """Index of a member per utterance → scores of these."""
    return lambda picks: score_corpus(
        references,
        [texts[n] for texts, n in zip(nbest.texts, picks, strict=True)],
        normalize=get_normalizer("basic"),
        entities=entities,
    )


@pytest.mark.parametrize(
    ("given", "sum_of_parts"),
    [({}, "2·llm + 4·length + asr"), ({"name": "entity", "asr_weight": 0.5}, "2·entity + 4·length + 0.5·asr")],
)
def test_the_formula_names_the_parts_that_are_weighed(given: dict[str, Any], sum_of_parts: str) -> None:
    weights, settings = Weights(2.0, 4.0, "settings"), RewardConfig(**given)
    assert _formula(weights, settings, trusted=False) == sum_of_parts
    trust = "trust" if settings.asr_weight == 1 else f"{settings.asr_weight:g}·trust"
    assert _formula(weights, settings, trusted=True) == f"{sum_of_parts} + {trust}"


def test_choice_follows_the_formula() -> None:
    group = nbest_of((["a b c", "a", "a b"], [-9.0, -4.0, NAN], [-1.0, -5.0, 0.0]))
    assert choose(group, alpha=0.0, beta=0.0) == [0]
    assert choose(group, alpha=1.0, beta=0.0) == [1]
    assert choose(group, alpha=1.0, beta=2.0) == [0]
    assert choose(group, alpha=0.0, beta=0.0, asr_weight=0.0) == [0]  # equal: the first
    assert choose(nbest_of((["a", "b"], [NAN, NAN], [0.0, 1.0])), alpha=1.0, beta=0.0) == [0]


def test_the_grid_finds_where_the_truth_wins() -> None:
    """The truth is the LLM's favourite by 4 nats and the recogniser's second by 6: it wins for α > 1.5."""
    right = ["a latte", "the tea", "one mocha"]
    nbest = nbest_of(*((["wrong words", text], [-9.0, -5.0], [-1.0, -7.0]) for text in right))
    grid = {"alphas": (0.0, 1.0, 2.0, 3.0), "betas": (0.0, 2.0)}
    found = tune_by_labels(nbest, scores_of(right, nbest), RewardConfig(), **grid)
    assert {(p.alpha, p.beta): p.wer for p in found.grid} == {
        (alpha, beta): (100.0 if alpha < 1.5 else 0.0) for alpha in grid["alphas"] for beta in grid["betas"]
    }
    assert (found.alpha, found.beta, found.origin) == (2.0, 0.0, "labels")  # the smallest of equals
    assert all(math.isnan(point.ewer) for point in found.grid)
    text = tuned_text(found)
    assert text.splitlines()[-1] == "reward.alpha=2 reward.beta=0"
    assert "edge of the grid" not in text
    assert "edge of the grid" in tuned_text(dataclasses.replace(found, alpha=3.0))


def test_of_equal_wer_the_lower_entity_wer_decides() -> None:
    """The larger α repairs the entity at the price of another word."""
    nbest = nbest_of((["get late", "got latte"], [-9.0, -5.0], [-1.0, -2.0]))
    scores = scores_of(["get latte"], nbest, [["latte"]])
    found = tune_by_labels(nbest, scores, RewardConfig(), alphas=(0.0, 1.0), betas=(0.0,))
    assert [(point.wer, point.ewer) for point in found.grid] == [(50.0, 100.0), (50.0, 0.0)]
    assert found.alpha == 1.0


def test_tune_with_labels_and_without(flags: list[str], manifest: Path, tmp_path: Path, capsys: Any) -> None:
    out, cache = tmp_path / "out.json", ["--cache", f"{tmp_path}/scores/"]
    assert main(["score", *flags, "--tune", *cache, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["tuned"]
    points = {(p["alpha"], p["beta"]): p["wer"] for p in found["grid"]}
    assert points[found["alpha"], found["beta"]] == min(points.values())
    assert found["origin"] == "labels"
    last = f"reward.alpha={found['alpha']:g} reward.beta={found['beta']:g}"
    assert capsys.readouterr().out.splitlines()[-1] == last

    bare = write_manifest(tmp_path / "bare.json", [None, None])
    unlabeled = [str(bare) if flag == str(manifest) else flag for flag in flags]
    assert main(["score", *unlabeled, "--tune", "--alpha", "1", *cache, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    found, spread = report["tuned"], report["spread"]
    assert (found["origin"], found["grid"], report["weights"]["alpha"]) == ("spread", [], 1.0)
    assert found["alpha"] == pytest.approx(RewardConfig.spread_factor * spread["asr"] / spread["llm"], rel=0.06)
    assert found["beta"] == pytest.approx(2 * found["alpha"], rel=0.06)
    assert "no row has text: the weights are" in capsys.readouterr().out


def test_without_labels_the_spread_sets_alpha() -> None:
    nbest = nbest_of(
        (["a", "b"], [-3.0, -5.0], [-1.0, -7.0]),  # standard deviations 1 and 3
        (["a", "b c", "d"], [-1.0, -7.0, NAN], [-2.0, -4.0, NAN]),  # 3 and 1
        (["a"], [-1.0], [-1.0]),
    )
    spread = component_spread(component_deviations(nbest))
    assert spread == pytest.approx({"llm": 2.0, "asr": 2.0, "length": (0 + statistics.pstdev([1, 2, 1])) / 2})
    assert from_spread({"llm": 4.0, "asr": 2.0}, RewardConfig(spread_factor=1.0)) == (0.5, 1.0)
    assert from_spread({"llm": 4.0, "asr": 2.0}, RewardConfig(spread_factor=3.0, asr_weight=0.5)) == (0.75, 1.5)
    assert from_spread({"llm": 4.0, "asr": 2.0}, RewardConfig(beta=7.0)) == (1.5, 7.0)
    for bad in ({"llm": 0.0, "asr": 1.0}, {"llm": NAN, "asr": 1.0}, {"llm": 1.0}):
        with pytest.raises(RewardError, match="spread"):
            from_spread(bad, RewardConfig())


# ---------------------------------------------------------------- rank agreement


def test_rank_agreement_by_hand() -> None:
    first = [[3.0, 2.0, 1.0], [1.0, 2.0, NAN], [1.0, 1.0], [5.0], [3.0, 1.0, 2.0]]
    second = [[-1.0, -2.0, -3.0], [-1.0, -2.0, 9.0], [0.0, 1.0], [0.0], [0.0, -1.0, -1.0]]
    found = rank_agreement(pad_groups(first), pad_groups(second))
    assert (found.groups, found.skipped) == (3, 2)
    # Three against (1, tied 2.5, tied 2.5): ρ = √3/2; τ-b = 2/√(3·2).
    assert found.spearman == pytest.approx((1 - 1 + math.sqrt(3) / 2) / 3)
    assert found.kendall == pytest.approx((1 - 1 + 2 / math.sqrt(6)) / 3)
    nothing = rank_agreement(torch.ones(1, 1), torch.ones(1, 1))
    assert math.isnan(nothing.spearman)
    assert nothing.groups == 0
    rewards = pad_groups([[1.0, NAN, 3.0, 3.0], [NAN, NAN]])
    assert best_members(rewards, otherwise=[0, 1]) == [2, 1]


# ---------------------------------------------------------------- quantisation


def test_quantisations_are_compared_on_the_same_groups(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    assert main(["score", *flags, "--compare-quantization", "none", "--json", str(out)]) == 0
    assert "choice changes" in capsys.readouterr().out
    report = json.loads(out.read_text())
    found = report["quantization"]
    assert found["members"] == sum(len(u["members"]) for u in report["utterances"])
    assert 0 < found["mean_difference"] <= found["max_difference"]
    assert 0.5 < found["ranks"]["spearman"] <= 1
    assert 0.5 < found["correlation"] <= 1
    assert ":nf4:" in found["run"]
    assert ":none:" in found["other"]


def judged(nbest: NBestBatch, llm: list[list[float]], *, rewards: list[list[float]]) -> NBestBatch:
    """The N-best with other scores of the LLM and other rewards."""
    parts = {**nbest.parts, "llm": torch.tensor(llm)}
    return dataclasses.replace(nbest, parts=parts, rewards={"ctc": torch.tensor(rewards)})


def test_the_comparison_of_quantisations_by_hand() -> None:
    nbest = nbest_of((["a", "b"], [0.0, 0.0], [0.0, 0.0]), (["a", "b"], [0.0, 0.0], [0.0, 0.0]))
    run = judged(nbest, [[-1.0, -2.0], [-5.0, NAN]], rewards=[[0.0, 1.0], [1.0, 0.0]])
    other = judged(nbest, [[-1.5, -3.5], [-4.0, -1.0]], rewards=[[2.0, 1.5], [1.0, 0.0]])
    found = compare_scores(run, other, part="llm", names=("q", "f"))
    assert found.members == 3
    assert found.max_difference == 1.5
    assert found.mean_difference == pytest.approx((0.5 + 1.5 + 1.0) / 3)
    assert found.correlation == pytest.approx(1.0)
    assert found.ranks.spearman == pytest.approx(1.0)
    assert found.changed == ("u0",)
    assert "1 of 2 (50.0 %)" in comparison_text(found, utterances=2)
    assert "order the hypotheses alike" in found.advice
    swapped = [judged(nbest.select([0]), values, rewards=values) for values in ([[-2.0, -1.0]], [[-1.0, -2.0]])]
    found = compare_scores(*swapped, part="llm", names=("q", "f"))
    assert (found.correlation, found.ranks.spearman) == (pytest.approx(-1.0), pytest.approx(-1.0))
    assert "use llm=int8 or llm=full" in found.advice


# ---------------------------------------------------------------- the LLM that waits


def test_an_llm_waits_for_the_first_text_that_must_be_scored(tmp_path):
    folder = make_tiny_llm(tmp_path, max_position_embeddings=64)
    config = LLMConfig(model=str(folder), quantization="none", device="cpu")
    waiting = open_llm(config)
    assert waiting.uses_context
    assert not waiting.loaded
    assert waiting.memory_bytes == 0
    assert waiting.identity == load_llm(config).identity
    (too_long,) = waiting.score([(Context("x"), ["word " * 80])])[0]
    assert math.isnan(too_long.logp)
    assert not waiting.loaded  # nothing that it could read
    (score,) = waiting.score([(Context("x"), ["a latte"])])[0]
    assert waiting.loaded
    assert waiting.memory_bytes > 0
    assert score.logp == load_llm(config).score([(Context("x"), ["a latte"])])[0][0].logp


def test_what_is_wrong_with_the_files_shows_at_once(tmp_path):
    folder = make_tiny_llm(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LLMError, match="tokenizer"):
        open_llm(LLMConfig(model=str(folder), device="cpu"))


def test_scores_in_memory_are_not_shared():
    from nemo_llm_feedback.rewards import open_cache

    memory = open_cache(":memory:")
    memory.put_many({"a": (-1.0, 1)})
    assert memory.get_many(["a"]) == {"a": (-1.0, 1)}
    assert open_cache(":memory:").get_many(["a"]) == {}
    assert not Path(":memory:").exists()


def test_training_from_a_cache_does_not_load_the_llm(nemo_file, tiny_llm, manifest, tmp_path, monkeypatch):
    """The second of two equal runs finds every score of the first: neither survey nor steps ask the LLM."""
    from nemo_llm_feedback.cli.jobs.adapt import adapt
    from nemo_llm_feedback.core.config.compose import compose_config
    from nemo_llm_feedback.core.run_folder import STEPS_FILE, read_steps
    from nemo_llm_feedback.llm import loading

    loads = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *args: loads.append(1) or load(*args))

    def run(name: str, *more: str) -> Any:
        settings = [
            *(f"init_from_nemo_model={nemo_file('ctc_char')}", f"model.train_ds.manifest_filepath={manifest}"),
            *(f"llm.model={tiny_llm}", "context.description=an order", "feedback.use_text=false", "guards.every=0"),
            "model.optim.lr=1e-4",
            *(f"exp_manager.exp_dir={tmp_path / name}", "trainer=cpu", "trainer.max_steps=2", *more, *SMALL),
            *("+trainer.enable_progress_bar=false", "model.train_ds.batch_size=2", "feedback.refresh_every=50"),
        ]
        return adapt(compose_config(settings))

    first = run("first")
    cache = first.log_dir / "llm_scores.sqlite"
    assert cache.is_file()
    assert loads == [1]
    second = run("second", f"reward.cache={cache}")
    assert loads == [1]
    assert not (second.log_dir / "llm_scores.sqlite").exists()
    rates = [line.get("feedback/cache_hit_rate") for line in read_steps(second.log_dir / STEPS_FILE)]
    assert 1.0 in rates
    assert set(rates) <= {None, 1.0}
