"""``score`` and ``calibrate``: what they say of tiny models, their statistics by hand, and the LLM that waits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import write_manifest
from helpers.tiny_llm import make_tiny_llm

from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import ConfigError, LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import load_llm, open_llm

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
    for utterance in report["utterances"]:
        assert utterance["greedy"] == utterance["members"][0]["text"]
        rewards = [member["reward"] for member in utterance["members"]]
        assert utterance["chosen"] == utterance["members"][rewards.index(max(rewards))]["text"]
        for member in [*utterance["members"], *([utterance["reference"]] if utterance.get("reference") else [])]:
            assert member["reward"] == pytest.approx(member["llm"] + member["asr"] + 2 * member["length"], abs=1e-3)
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
    from nemo_llm_feedback.data.audio import audio_batches
    from nemo_llm_feedback.data.manifests import read_manifest
    from nemo_llm_feedback.evaluation.transcribe import transcribe_rows
    from nemo_llm_feedback.training.models import restore

    model = restore(nemo_file("ctc_bpe"), map_location="cpu").eval()
    rows = read_manifest(manifest)
    report, _ = scored
    assert [u["greedy"] for u in report["utterances"]] == transcribe_rows(model, rows)
    ((_, audio),) = audio_batches(rows[:1], sample_rate=16000, batch_size=1, device=torch.device("cpu"))
    (head,) = heads_of(model)
    labels = head.vocabulary.text_to_ids(TEXTS[0])
    with torch.no_grad():
        encoded, lengths = encode(model, audio.signal, audio.signal_len)
        logp = head.log_prob(encoded, lengths, PrefixTrie.build([labels], [0]))
    assert report["utterances"][0]["reference"]["asr"] == pytest.approx(float(logp[0]), abs=1e-3)


def test_a_second_run_takes_all_from_the_cache_and_loads_no_llm(scored, flags, tmp_path, monkeypatch, capsys):
    from nemo_llm_feedback.llm import scorer

    monkeypatch.setattr(scorer, "load_model", lambda *_: pytest.fail("the LLM was loaded"))
    report, cache = scored
    out = tmp_path / "again.json"
    command = ["score", *flags, "--cache", str(cache), "--show", "1", "--members", "2", "--json", str(out)]
    assert main(command) == 0
    again = json.loads(out.read_text())
    assert again["utterances"] == report["utterances"]
    text = capsys.readouterr().out
    assert "not loaded: every score was in the cache" in text
    assert "cache hit rate 100.0 %" in text
    assert text.count(" members)") == 1
    assert "> best-rewarded, = the recogniser's own, ref the row's text" in text
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


def test_faults_are_told_before_any_work(flags, manifest, tmp_path, capsys):
    assert main(["score", str(tmp_path / "no.nemo"), *flags[1:]]) == 1
    assert "no.nemo" in capsys.readouterr().err
    assert main(["score", flags[0], "--manifest", str(manifest), "--description", "x"]) == 1
    assert "llm.model is missing" in capsys.readouterr().err
    assert main(["score", *flags, "reward.alhpa=1"]) == 1
    assert "reward.alpha" in capsys.readouterr().err
    assert main(["calibrate", *flags, "llm.quantization=none"]) == 1
    assert "nf4 or int8" in capsys.readouterr().err


def test_rows_are_spread_over_the_manifest():
    from nemo_llm_feedback.cli.jobs.nbest_probe import spread

    rows: Any = list(range(10))
    assert spread(rows, 0) == spread(rows, 10) == spread(rows, 99) == rows
    assert spread(rows, 1) == [5]
    assert spread(rows, 5) == [1, 3, 5, 7, 9]


# ---------------------------------------------------------------- rank agreement


def test_rank_agreement_by_hand():
    from nemo_llm_feedback.evaluation.rank_agreement import best_member, rank_agreement

    nan = math.nan
    found = rank_agreement(
        [[3.0, 2.0, 1.0], [1.0, 2.0, nan], [1.0, 1.0], [5.0], [3.0, 1.0, 2.0]],
        [[-1.0, -2.0, -3.0], [-1.0, -2.0, 9.0], [0.0, 1.0], [0.0], [0.0, -1.0, -1.0]],
    )
    assert (found.groups, found.skipped) == (3, 2)
    # Three against (1, tied 2.5, tied 2.5): ρ = √3/2; τ-b = 2/√(3·2).
    assert found.spearman == pytest.approx((1 - 1 + math.sqrt(3) / 2) / 3)
    assert found.kendall == pytest.approx((1 - 1 + 2 / math.sqrt(6)) / 3)
    nothing = rank_agreement([[1.0]], [[1.0]])
    assert math.isnan(nothing.spearman)
    assert nothing.groups == 0
    assert best_member([1.0, nan, 3.0, 3.0], otherwise=0) == 2
    assert best_member([nan, nan], otherwise=1) == 1


# ---------------------------------------------------------------- calibrate


def test_calibrate_compares_on_the_same_groups(flags, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["calibrate", *flags, "--json", str(out)]) == 0
    assert "choice changes" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["groups"] == 4
    assert 0 < found["mean_difference"] <= found["max_difference"]
    assert 0 < found["noise"] < 1
    assert 0.5 < found["ranks"]["spearman"] <= 1
    assert ":nf4:" in found["quantised"]
    assert ":none:" in found["full"]


def test_calibration_by_hand():
    from nemo_llm_feedback.cli.jobs.calibrate import advice, calibration_text, compare_scores
    from nemo_llm_feedback.core.types import Hypothesis, HypothesisGroup
    from nemo_llm_feedback.hypotheses.groups import ScoredGroup

    groups = [
        ScoredGroup(HypothesisGroup(name, (Hypothesis("a", ()), Hypothesis("b", ()))), {}, {}) for name in ("u", "v")
    ]
    found = compare_scores(
        groups,
        llm=([[-1.0, -2.0], [-5.0, math.nan]], [[-1.5, -3.5], [-4.0, -1.0]]),
        rewards=([[0.0, 1.0], [1.0, 0.0]], [[2.0, 1.5], [1.0, 0.0]]),
        names=("q", "f"),
    )
    assert (found.groups, found.members) == (2, 3)
    assert found.max_difference == 1.5
    assert found.mean_difference == pytest.approx((0.5 + 1.5 + 1.0) / 3)
    assert found.centred_difference == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert found.noise == pytest.approx(0.5)  # √(0.5/3) over √(2/3)
    assert found.ranks.spearman == pytest.approx(1.0)
    assert [(f.utterance, f.quantised, f.full, f.margin) for f in found.flips] == [("u", "b", "a", 0.5)]
    assert "1 of 2 (50.0 %)" in calibration_text(found)
    assert "blurs" in advice(found)


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


def test_a_run_keeps_its_scores_in_its_folder(tmp_path):
    from nemo_llm_feedback.core.config import RewardConfig, RunConfig
    from nemo_llm_feedback.rewards import open_cache
    from nemo_llm_feedback.training.setup import _with_cache

    assert _with_cache(RunConfig(), tmp_path).reward.cache == str(tmp_path / "llm_scores.sqlite")
    named = RunConfig(reward=RewardConfig(cache=":memory:"))
    assert _with_cache(named, tmp_path) == named
    memory = open_cache(":memory:")
    memory.put_many({"a": (-1.0, 1)})
    assert memory.get_many(["a"]) == {"a": (-1.0, 1)}
    assert open_cache(":memory:").get_many(["a"]) == {}
    assert not Path(":memory:").exists()


def test_calibrate_needs_an_llm_reward(flags):
    from nemo_llm_feedback.cli.jobs.calibrate import calibrate
    from nemo_llm_feedback.cli.options import JudgeOptions, ProbeOptions

    options = ProbeOptions(flags[0], manifest=flags[2], judge=JudgeOptions(overrides=("reward.name=length",)))
    with pytest.raises(ConfigError, match="reward=llm"):
        calibrate(options)


def test_training_from_a_cache_does_not_load_the_llm(nemo_file, tiny_llm, manifest, tmp_path, monkeypatch):
    """The second of two equal runs finds every score of the first: neither survey nor steps ask the LLM."""
    from nemo_llm_feedback.cli.jobs.adapt import adapt
    from nemo_llm_feedback.core.config.compose import compose_config
    from nemo_llm_feedback.core.run_folder import STEPS_FILE, read_steps
    from nemo_llm_feedback.llm import scorer

    loads = []
    load = scorer.load_model
    monkeypatch.setattr(scorer, "load_model", lambda *args: loads.append(1) or load(*args))

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
