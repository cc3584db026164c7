"""Other recognisers' transcripts in training: handed on by every loader, logged by name, learned as a baseline."""

from __future__ import annotations

import logging as python_logging
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.fits import config, fit, label_reward
from helpers.tiny import write_manifest

from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.cli.jobs.start import plan_text
from nemo_llm_feedback.core.config import ObjectiveConfig
from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.types import Audio, Context, ExternalText, Hypothesis
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.training.losses import nbest_metrics, objective_loss
from nemo_llm_feedback.training.models import restore
from nemo_llm_feedback.training.supervision import pseudo_labelled_batch

GIVEN = [["one tea"], [{"text": "A mocha!", "source": "cloud", "score": -2.0}, "tea"], []]


def _prepared(nemo_file: Any, cfg: dict[str, Any], folder: Path, kind: str = "ctc_char") -> Any:
    model = restore(nemo_file(kind), map_location="cpu")
    model.set_trainer(pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False))
    model.setup_feedback(cfg, work_dir=folder, reward=label_reward)
    return model


@pytest.mark.parametrize("lhotse", [False, True])
@pytest.mark.parametrize("tarred", [False, True])
def test_every_loader_hands_on_what_other_recognisers_wrote(
    lhotse: bool, tarred: bool, nemo_file: Any, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {"hypotheses": GIVEN} | ({"shard_id": [0, 0, 0]} if tarred else {})
    manifest = write_manifest(tmp_path / "manifest_0.json", [None] * 3, **extra)
    cfg = config(manifest)
    cfg["model"]["train_ds"] |= {"use_lhotse": lhotse, "use_bucketing": False, "batch_size": 3}
    if tarred:
        with tarfile.open(tmp_path / "audio_0.tar", "w") as archive:
            for k in range(3):
                archive.add(tmp_path / "wav" / f"manifest_0_{k}.wav", arcname=f"manifest_0_{k}.wav")
        manifest.write_text(manifest.read_text().replace("wav/", ""))
        cfg["model"]["train_ds"] |= {"is_tarred": True, "tarred_audio_filepaths": str(tmp_path / "audio_0.tar")}
    model = _prepared(nemo_file, cfg, tmp_path / "run")
    audio = model.feedback_setup.reader.split(next(iter(model._train_dl))).unlabeled
    found = {
        Path(name.split("@")[0]).stem: external
        for name, external in zip(audio.utterances, audio.external, strict=True)
    }
    assert found == {
        "manifest_0_0": (ExternalText("one tea"),),
        "manifest_0_1": (ExternalText("A mocha!", "cloud", -2.0), ExternalText("tea")),
        "manifest_0_2": (),
    }


def _nbest() -> NBestBatch:
    """Two utterances: the cloud's text is the second most probable of the first, and none of the second."""
    members = (
        (Hypothesis("a", (1,), "greedy"), Hypothesis("b", (2,), "cloud"), Hypothesis("c", (3,), "beam", ("cloud",))),
        (Hypothesis("a", (1,), "greedy"), Hypothesis("b", (2,), "beam")),
    )
    pad = float("nan")
    logp = {"ctc": torch.tensor([[-1.0, -3.0, -2.0], [-1.0, -2.0, -float("inf")]])}
    rewards = {"ctc": torch.tensor([[1.0, 5.0, 2.0], [0.0, 1.0, pad]])}
    old = {"ctc": logp["ctc"].clone()}
    return NBestBatch(("x", "y"), (Context(), Context()), members, logp, rewards, old)


def test_self_training_on_a_source_learns_its_text_and_skips_rows_without_one() -> None:
    audio = Audio(torch.randn(2, 9), torch.tensor([9, 7]), ("x", "y"), (Context(), Context()))
    settings = ObjectiveConfig(name="self_training", label="cloud")
    batch, metrics = pseudo_labelled_batch(settings, audio, _nbest(), head="ctc")
    assert batch is not None
    assert batch[2].tolist() == [[3]], "of the cloud's texts the one that the frozen model prefers"
    assert metrics["kept_fraction"] == 0.5
    plain, _ = pseudo_labelled_batch(replace(settings, label="reference"), audio, _nbest(), head="ctc")
    assert plain is not None
    assert plain[2].tolist() == [[1], [1]]


def test_exact_self_training_on_a_source_gives_its_text_the_gradient() -> None:
    settings = ObjectiveConfig(name="self_training", label="cloud", augment=False)
    logp = torch.tensor([[-1.0, -3.0, -2.0], [-1.0, -2.0, -float("inf")]], requires_grad=True)
    loss = objective_loss(settings, logp, _nbest(), head="ctc")
    total = loss.terms["objective"].value
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    assert loss.terms["objective"].count == 1


def test_the_log_names_every_source_that_gave_the_best_member() -> None:
    nbest = _nbest()
    out = nbest_metrics(nbest, nbest.ref_logp["ctc"], head="ctc")
    assert out["best_from_cloud"] == 0.5
    assert out["best_from_beam"] == 0.5
    assert out["best_from_greedy"] == out["best_from_boosted"] == 0.0


@pytest.mark.parametrize("augment", [True, False])
def test_a_run_learns_another_systems_transcripts(augment: bool, nemo_file: Any, tmp_path: Path) -> None:
    """log p of the given text rises, and that of the text that plain self-training would learn does not."""
    manifest = write_manifest(
        tmp_path / "pool.json", [None] * 2, hypotheses=[[{"text": "Tea 1", "source": "cloud"}]] * 2
    )
    objective = {"name": "self_training", "label": "cloud", "augment": augment}
    cfg = config(manifest, lr=1e-2, objective=objective, proposals={"samples": 0})
    model = _prepared(nemo_file, cfg, tmp_path / "run")
    head = model.feedback_setup.heads[0]
    text = [head.vocabulary.text_to_ids("tea one")]
    signal, lengths, *_ = next(iter(model._train_dl))

    def logp() -> float:
        with torch.no_grad(), evaluation_mode(model):
            encoded = model._encode(Audio(signal, lengths, (), ()))
            return float(head.score(*encoded, [text, text]).sum())

    before = logp()
    fit(model, steps=8)
    assert logp() > before + 5


def test_a_label_that_no_row_has_is_named_with_those_that_there_are(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path / "pool.json", [None] * 2, hypotheses=[["tea"], [{"text": "a", "source": "cloud"}]]
    )
    objective = {"name": "self_training", "label": "clowd"}
    with pytest.raises(ConfigError, match=r"label=clowd.*cloud, external"):
        _prepared(nemo_file, config(manifest, objective=objective), tmp_path / "run")


def test_texts_in_another_script_are_counted_and_named_once(
    nemo_file: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_manifest(tmp_path / "pool.json", [None] * 3, hypotheses=[["чай", "tea"], ["чай"], ["tea"]])
    with caplog.at_level(python_logging.WARNING, logger="nemo_logger"):
        _prepared(nemo_file, config(manifest), tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "`hypotheses`" in record.getMessage()]
    assert len(said) == 1
    assert "2 of 4 texts" in said[0]
    assert said[0].count("чай") == 1


def test_a_fault_in_hypotheses_stops_the_run_before_any_work(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path / "pool.json", [None] * 2, hypotheses=[["tea"], [{"text": "a", "source": "beam"}]]
    )
    with pytest.raises(ManifestError, match=r"pool.json:2: .*'beam' is one of ours"):
        _prepared(nemo_file, config(manifest), tmp_path / "run")
    assert not (tmp_path / "run" / "manifests").exists()


def test_a_language_without_numbers_is_refused(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "pool.json", [None] * 2)
    with pytest.raises(ConfigError, match=r"proposals.language must be one of .*de.*got 'klingon'"):
        _prepared(nemo_file, config(manifest, proposals={"language": "klingon"}), tmp_path / "run")


def test_the_plan_names_the_sources_of_the_pool(nemo_file: Any, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "pool.json", [None] * 3, hypotheses=GIVEN)
    plan = plan_text(_prepared(nemo_file, config(manifest), tmp_path / "run"), source=Path("b.nemo"), log_dir=tmp_path)
    assert "8 of each of cloud, external" in plan
    off = config(manifest, proposals={"external": 0})
    assert "cloud" not in plan_text(_prepared(nemo_file, off, tmp_path / "off"), source=Path("b"), log_dir=tmp_path)
