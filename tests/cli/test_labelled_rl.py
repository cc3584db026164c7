"""Labelled RL from one switch: ``reward=wer`` with every family and loader, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import begin, config
from helpers.runs import weights
from helpers.tiny import write_manifest

from nemo_llm_feedback.cli.api import adapt, score
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import ManifestError
from nemo_llm_feedback.training.models import restore

TEXTS = ["a latte with soy", "one mocha to go", "tea is hot"]
GROUPS = ["proposals.beam=4", "proposals.boosted=0", "proposals.term_swap=0", "proposals.max_symbols=3"]
QUICK = [
    *("trainer=cpu", "+trainer.enable_progress_bar=false", "model.train_ds.batch_size=3", "model.optim.lr=1e-2"),
    *("model.optim.sched=null", "feedback.pool_utterances=4", "guards.every=1", "guards.held_out=0.3"),
    *("guards.everyday=none", "reward=wer", *GROUPS),
]


def of_a_beam(nemo: Path, folder: Path) -> Path:
    """A manifest whose transcripts a tiny model has in its beam, but not as its best."""
    bare = write_manifest(folder / "bare.json", [None] * 14)
    found = score(nemo, bare, utterances=0, overrides=["reward=rules", "reward.asr_weight=0", *GROUPS])
    order = sorted(range(14), key=lambda i: int(Path(found.rows[i].audio).stem.rsplit("_", 1)[1]))
    texts = [next((text for text in reversed(found.nbest.texts[i]) if text), "tea") for i in order]
    return write_manifest(folder / "m.json", texts)


@pytest.mark.parametrize(
    ("kind", "objective"), [("ctc_bpe", "mwer"), ("rnnt_char", "gspo"), ("tdt_bpe", "grpo"), ("hybrid_bpe", "mwer")]
)
def test_every_family_learns_from_its_text_by_the_reward_without_an_llm(
    kind: str, objective: str, nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_llm_feedback.training.mixin import LLMFeedbackMixin

    def never(*args: Any) -> Any:
        raise AssertionError("no row is left to NeMo's loss")

    monkeypatch.setattr(LLMFeedbackMixin, "_labelled_step", never)
    manifest = of_a_beam(nemo_file(kind), tmp_path)
    more = [*QUICK, f"exp_manager.exp_dir={tmp_path / 'run'}", "trainer.log_every_n_steps=1"]
    result = adapt(nemo_file(kind), manifest, objective=objective, max_steps=2, overrides=more)
    base, after = weights(nemo_file(kind)), weights(result.nemo)
    steps = [json.loads(line) for line in (result.log_dir / "steps.jsonl").read_text().splitlines()]
    learned = [step for step in steps if "feedback/reward/wer" in step]
    assert learned, steps
    assert all(step["feedback/reward/wer"] <= 0 for step in learned)
    gains = [step["held_out/gain"] for step in steps if "held_out/gain" in step]
    assert gains, "the held-out rows, which have text, are judged"
    assert result.kept_step == 0 or any(not torch.equal(base[k], after[k]) for k in base)


@pytest.mark.parametrize("lhotse", [False, True])
def test_both_loaders_hand_the_text_to_the_reward_and_rows_may_be_for_something_else(
    lhotse: bool, nemo_file: Any, tmp_path: Path
) -> None:
    texts = ["a latte", "One mocha", "tea is hot", None]
    manifest = write_manifest(tmp_path / "m.json", texts, replay=[None, None, "supervised", "kl"])
    train_ds = config(manifest)["model"]["train_ds"] | {"batch_size": 4}
    train_ds |= {"use_lhotse": True, "use_bucketing": False} if lhotse else {}
    sections: dict[str, Any] = {"reward": {"name": "wer"}, "context": {}, "model": {"train_ds": train_ds}}
    settings = config(manifest, **sections)
    model = restore(nemo_file("ctc_bpe"), map_location="cpu")
    model.setup_feedback(settings, work_dir=tmp_path / "work")
    feedback = begin(model)
    parts = feedback.reader.split(next(iter(model._train_dl)))
    assert (len(parts.labelled[1]), len(parts.replay[1])) == (1, 1)
    assert sorted(parts.unlabeled.texts) == ["a latte", "one mocha"]
    model.feedback_loss(parts.unlabeled)
    nbest = feedback.cache.latest
    for name, rewards, members in zip(nbest.utterances, nbest.rewards["ctc"], nbest.texts, strict=True):
        spoken = "a latte" if "m_0" in name else "one mocha"
        assert rewards[members.index(spoken)] == 0 if spoken in members else float(rewards.max()) < 0


def test_rows_without_text_are_named_with_the_fix(nemo_file: Any, tmp_path: Path) -> None:
    for texts, count in (([None] * 3, 3), (["tea", None, "tea"], 1)):
        manifest = write_manifest(tmp_path / f"m{count}.json", texts)
        with pytest.raises(ManifestError, match=rf"{count} row\(s\) have no text.*replay.*kl") as error:
            adapt(nemo_file("ctc_bpe"), manifest, overrides=[*QUICK, f"exp_manager.exp_dir={tmp_path / 'run'}"])
        assert f"m{count}.json:" in str(error.value)
        with pytest.raises(ManifestError, match="needs the `text` of these rows"):
            score(nemo_file("ctc_bpe"), manifest, overrides=["reward=wer"])


def test_score_shows_word_errors_as_the_reward(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.json", TEXTS)
    more = ["proposals.beam=3", "proposals.boosted=0", "reward.settings.entity_weight=2", "context.terms=[latte]"]
    command = ["score", str(nemo_file("ctc_bpe")), "--manifest", str(manifest), "--set", "reward=wer", *more]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    for utterance in report["utterances"]:
        assert utterance["reference"]["reward"] == 0
        for member in utterance["members"]:
            assert member["reward"] == member["wer"] == member["entity_errors"] - member["word_errors"]
    assert "entity_errors" in capsys.readouterr().out
