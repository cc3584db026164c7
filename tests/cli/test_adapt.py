"""The command end to end: every family, both loaders, resume, and a .nemo for machines without the plugin."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import MIXED, arguments, run, weights
from helpers.tiny import write_manifest

from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import ConfigError, DecodingError, ManifestError
from nemo_llm_feedback.data.manifests import read_manifest
from nemo_llm_feedback.training.callbacks import HeldOutEarlyStopping

KINDS = ("ctc_bpe", "rnnt_bpe", "tdt_bpe", "hybrid_bpe", "ctc_char", "rnnt_char")


@pytest.fixture(scope="module")
def adapted(nemo_file: Any, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``adapted(kind)`` gives (result of a run, base), of the families that the command must adapt."""

    @functools.cache
    def get(kind: str) -> Any:
        folder = tmp_path_factory.mktemp(kind)
        manifest = write_manifest(folder / "mixed.json", MIXED)
        dev = write_manifest(folder / "dev.json", ["a latte", "mocha"], entities=[["latte"], ["mocha"]])
        validation = [f"model.validation_ds.manifest_filepath={dev}", "trainer.val_check_interval=1"]
        result = run(nemo_file(kind), manifest, tiny_llm, folder, *(validation if kind != "ctc_char" else []))
        return result, nemo_file(kind)

    return get


@pytest.mark.parametrize(
    "kind", ["ctc_bpe", "ctc_char", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if "ctc" not in k)]
)
def test_the_export_has_the_stock_class_and_keys_and_new_weights(kind: str, adapted: Any) -> None:
    result, base = adapted(kind)
    before, after = weights(base), weights(result.nemo)
    assert list(before) == list(after)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())
    with tarfile.open(result.nemo) as archive:
        text = archive.extractfile("./model_config.yaml").read().decode()  # type: ignore[union-attr]
    assert "nemo_llm_feedback" not in "".join(line for line in text.splitlines() if "target" in line)
    assert "\nllm:" not in text
    assert (result.log_dir / "result.json").is_file()
    statistics = json.loads((result.log_dir / "pool_statistics.json").read_text())
    assert statistics["utterances"] >= 3
    assert set(statistics["spread"]) == {"llm", "asr", "length"}
    assert 0 < statistics["signal_fraction"] <= 1


def test_validation_reports_wer_and_entities(adapted: Any) -> None:
    result, _ = adapted("ctc_bpe")
    assert set(result.after) == {"dev"}
    assert result.after["dev"].column("entities").sum() == 2
    assert adapted("ctc_char")[0].after == {}
    lines = [json.loads(line) for line in (result.log_dir / "steps.jsonl").read_text().splitlines()]
    found = [line for line in lines if "val/dev/wer" in line]
    assert found
    assert all(0 <= line["val/dev/oracle_wer"] <= line["val/dev/wer"] for line in found)


@pytest.mark.slow
def test_exports_restore_where_the_plugin_cannot_be_imported(adapted: Any, tmp_path: Path) -> None:
    """One process for all: NeMo alone takes 15 s to import. Transcripts must be those of the adapted model here."""
    from nemo_llm_feedback.data.manifests import read_manifest
    from nemo_llm_feedback.evaluation.transcribe import transcribe_rows
    from nemo_llm_feedback.training.models import restore

    manifest = write_manifest(tmp_path / "m.json", [None, None])
    rows = read_manifest(manifest)
    wanted = {}
    for kind in KINDS:
        result, _ = adapted(kind)
        wanted[kind] = [str(result.nemo), transcribe_rows(restore(result.nemo, map_location="cpu"), rows)]
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    code = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nemo_llm_feedback":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from nemo.collections.asr.models import ASRModel
wanted = json.load(open(sys.argv[1]))
for kind, (path, texts) in wanted.items():
    model = ASRModel.restore_from(path, map_location="cpu")
    assert type(model).__module__.startswith("nemo."), type(model)
    got = model.transcribe(sys.argv[2:], batch_size=1, verbose=False)
    got = [getattr(hyp, "text", hyp) for hyp in got]
    assert got == texts, (kind, got, texts)
print("all equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "wanted.json"), *[row.audio for row in rows]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all equal" in done.stdout


@pytest.mark.slow
def test_two_steps_equal_one_and_one_resumed(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    # Unlabeled rows only, an epoch a step: the feedback pass draws no random number, supervised dropout would.
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    # SGD, since Adam would blow up the rounding noise of parameters whose gradient is 0 (the keys' bias).
    fixed = [
        "model.optim.name=sgd",
        "~model.optim.betas",
        "model.optim.lr=0.1",
        "model.train_ds.shuffle=false",
        "feedback.refresh_every=1",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    ]
    whole = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "whole", *fixed)
    resumable = [*fixed, "exp_manager.resume_if_exists=true"]
    run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "parts", *resumable, "trainer.max_steps=1")
    parts = run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "parts", *resumable)
    a, b = weights(whole.nemo), weights(parts.nemo)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    base = weights(nemo_file("ctc_bpe"))
    assert any(not torch.equal(a[key], base[key]) for key in a)


def _tar(manifest: Path, folder: Path) -> list[str]:
    """The rows of a manifest as NeMo's tarred data set of one shard."""
    folder.mkdir()
    lines = []
    with tarfile.open(folder / "audio_0.tar", "w") as archive:
        for line in map(json.loads, manifest.read_text().splitlines()):
            source = manifest.parent / line["audio_filepath"]
            archive.add(source, arcname=source.name)
            lines.append(json.dumps(line | {"audio_filepath": source.name, "shard_id": 0}))
    (folder / "manifest_0.json").write_text("\n".join(lines) + "\n")
    return [
        f"model.train_ds.tarred_audio_filepaths={folder / 'audio_0.tar'}",
        "model.train_ds.is_tarred=true",
        "+model.train_ds.shard_seed=0",
    ]


@pytest.mark.parametrize("loader", ["lhotse", pytest.param("lhotse_tarred", marks=pytest.mark.slow), "classic_tarred"])
@pytest.mark.parametrize("kind", ["ctc_bpe"])
def test_other_loaders_see_the_same_labelled_and_unlabeled_rows(
    loader: str, kind: str, nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    contexts = [None, ["chai"], None, "a complaint", None, None]
    manifest = write_manifest(tmp_path / "m.json", MIXED, context=contexts)
    more = ["model.train_ds.batch_size=6", "trainer.max_steps=1", "trainer.log_every_n_steps=1"]
    if loader.startswith("lhotse"):
        more += [
            "model.train_ds.use_lhotse=true",
            "+trainer.limit_train_batches=1",
            "+model.train_ds.use_bucketing=false",
        ]
    if loader.endswith("tarred"):
        more += _tar(manifest, tmp_path / "tar")
        manifest = tmp_path / "tar" / "manifest_0.json"
    from nemo_llm_feedback.training import mixin as feedback

    seen: list[Any] = []
    original = feedback.LLMFeedbackMixin.feedback_loss
    supervised: list[int] = []
    models: list[Any] = []
    step = feedback.LLMFeedbackMixin._labelled_step

    def watch(self: Any, audio: Any, batch_nb: int = 0) -> Any:
        seen.append(audio)
        models.append(self)
        return original(self, audio, batch_nb)

    def watch_supervised(self: Any, batch: Any, batch_nb: int) -> Any:
        supervised.extend(batch[3].tolist())
        return step(self, batch, batch_nb)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback.LLMFeedbackMixin, "feedback_loss", watch)
        patch.setattr(feedback.LLMFeedbackMixin, "_labelled_step", watch_supervised)
        result = run(nemo_file(kind), manifest, tiny_llm, tmp_path / "run", *more)
    assert result.nemo.is_file()
    assert len(seen) == 1
    # The LLM was loaded in 4 bit and scored, yet neither it nor the frozen reference is anywhere in the model.
    (model,) = models
    trained = {id(p) for group in model._optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    assert list(model.state_dict()) == list(weights(nemo_file(kind)))
    assert not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())
    assert model.feedback.scorer.memory_bytes > 0
    # Lhotse's tarred stream repeats for ever, so a batch of six may hold a row twice; all others hold each row once.
    assert len(seen[0].utterances) + len(supervised) == 6
    assert min(supervised) > 0
    if loader != "lhotse_tarred":
        assert len(set(seen[0].utterances)) == 4
    wanted = {"1": ("chai", "soy latte", "mocha")}
    for name, context in zip(seen[0].utterances, seen[0].contexts, strict=True):
        number = re.search(r"m_(\d)\.wav", name)[1]
        assert number in "1235"
        assert context.terms == wanted.get(number, ("soy latte", "mocha"))
        assert context.description == ("a complaint" if number == "3" else "an order at a coffee shop")


def test_all_labelled_without_the_flag_is_refused_and_with_it_text_is_never_read(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.json", ["a latte", "mocha"])
    with pytest.raises(ManifestError, match=r"feedback\.use_text=false"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "a")
    result = run(
        nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "b", "feedback.use_text=false", "trainer.max_steps=1"
    )
    staged = (result.log_dir / "manifests" / "0" / "m.json").read_text()
    assert "latte" not in staged


@pytest.mark.parametrize(
    "name", ["mwer", "grpo", "gspo", "dpo", "self_training", pytest.param("reinforce", marks=pytest.mark.slow)]
)
def test_every_objective_trains(name: str, nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    more = ["trainer.max_steps=2", f"objective={name}"]
    if name == "reinforce":
        more += ["proposals.beam=0", "proposals.boosted=0", "proposals.term_swap=0", "proposals.samples=4"]
        with pytest.raises(ConfigError, match=r"set feedback\.heads=transducer or"):
            run(nemo_file("hybrid_bpe"), manifest, tiny_llm, tmp_path / "both", *more)
        more += ["feedback.heads=transducer"]
    result = run(nemo_file("hybrid_bpe"), manifest, tiny_llm, tmp_path / "run", *more)
    base, after = weights(nemo_file("hybrid_bpe")), weights(result.nemo)
    assert any(not torch.equal(base[k], after[k]) for k in base)


@pytest.mark.parametrize(("kind", "heads"), [("tdt_char", "auto"), ("hybrid_tdt_bpe", "ctc")])
def test_exact_supervision_of_tdt_on_the_cpu(
    kind: str, heads: str, nemo_file: Any, tiny_llm: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "m.json", ["a latte", None])
    more = ["objective=self_training", "trainer.max_steps=1", "model.train_ds.batch_size=2", f"feedback.heads={heads}"]
    result = run(nemo_file(kind), manifest, tiny_llm, tmp_path / "run", *more)
    base, after = weights(nemo_file(kind)), weights(result.nemo)
    assert not torch.equal(base["joint.pred.weight"], after["joint.pred.weight"])


def test_bad_input_is_refused_before_any_work(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None, None])
    good = arguments(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "run")
    (tmp_path / "broken.json").write_text("{\n")
    (tmp_path / "notnemo.nemo").write_text("text")
    (tmp_path / "empty_llm").mkdir()
    cases = {
        f"model.train_ds.manifest_filepath={tmp_path / 'broken.json'}": "not JSON",
        f"init_from_nemo_model={tmp_path / 'notnemo.nemo'}": "not a .nemo checkpoint",
        f"llm.model={tmp_path / 'empty_llm'}": "LLM",
        "feedback.heads=both": "has only ctc",
        "llm.device=cuda": "CUDA",
        "trainer=gpu": "there is none",
    }
    for override, words in cases.items():
        assert main(["adapt", *good, override]) == 1, override
        assert words in capsys.readouterr().err, override
    assert not list((tmp_path / "run").rglob("*.nemo"))


def test_a_refused_run_leaves_no_folder(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    """`runs` called it interrupted."""
    manifest = write_manifest(tmp_path / "m.json", ["a latte", "mocha"])
    runs = tmp_path / "runs"
    with pytest.raises(ManifestError, match=r"feedback\.use_text=false"):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, runs)
    with pytest.raises(ConfigError, match="has only ctc"):
        run(nemo_file("ctc_bpe"), write_manifest(tmp_path / "n.json", [None]), tiny_llm, runs, "feedback.heads=both")
    assert not [path for path in runs.rglob("*") if not path.is_dir()]
    assert not list(runs.rglob("version_*"))
    # A folder that was there before is not thrown away.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(ManifestError):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, runs, f"exp_manager.explicit_log_dir={tmp_path / 'mine'}")
    assert list((tmp_path / "mine").rglob("notes.txt"))


def test_a_fault_of_the_second_measurement_loses_no_checkpoint(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation audio that goes away in the last stretch raises behind all steps, and before the report."""
    dev = write_manifest(tmp_path / "dev.json", ["a latte", "tea"])
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    finish = HeldOutEarlyStopping.finish

    def finished(self: Any, *args: Any) -> None:
        finish(self, *args)
        for row in read_manifest(dev):
            Path(row.audio).unlink()

    monkeypatch.setattr(HeldOutEarlyStopping, "finish", finished)
    more = [f"model.validation_ds.manifest_filepath={dev}", "trainer.max_steps=1", "trainer.limit_val_batches=0"]
    with pytest.raises(DecodingError):
        run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "run", f"output={tmp_path / 'a.nemo'}", *more)
    assert len(weights(tmp_path / "a.nemo")) == len(weights(nemo_file("ctc_bpe")))


def test_before_and_after_are_transcribed_on_the_trainers_device(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning moves the model only for training: before it, and after it, the model was left on the CPU."""
    from nemo_llm_feedback.training import transcripts

    events: list[str] = []
    move, cpu, transcribe = torch.nn.Module.to, torch.nn.Module.cpu, transcripts.decode_rows

    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer if hasattr(self, "setup_feedback") else None
        if trainer is not None and args == (trainer.strategy.root_device,):
            events.append("placed")
        return move(self, *args, **kwargs)

    def transcribed(*args: Any, **kwargs: Any) -> Any:
        events.append("transcribed")
        return transcribe(*args, **kwargs)

    def taken_back(self: Any) -> Any:
        events.append("cpu")
        return cpu(self)

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(torch.nn.Module, "cpu", taken_back)
    monkeypatch.setattr(transcripts, "decode_rows", transcribed)
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    run(nemo_file("ctc_bpe"), manifest, tiny_llm, tmp_path / "run", "trainer.max_steps=1")
    # Lightning places it for training itself, and takes it back to the CPU at the end.
    assert events == ["placed", "transcribed", "placed", "cpu", "placed", "transcribed"]
