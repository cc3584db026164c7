"""What is restored, what is refused and why, and how a .nemo is written."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run, weights
from helpers.tiny import build_nemo, write_manifest
from omegaconf import OmegaConf

from nemo_llm_feedback.asr.checkpoints import SUPPORTED, atomic_path, supported_class
from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import CheckpointError
from nemo_llm_feedback.training.models import CLASSES, restore

MODELS = "nemo.collections.asr.models."


def _fake(path: Path, config: dict[str, Any]) -> Path:
    data = OmegaConf.to_yaml(OmegaConf.create(config)).encode()
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("./model_config.yaml")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target": MODELS + "aed_multitask_models.EncDecMultiTaskModel"}, "attention encoder-decoder"),
        ({"target": MODELS + "rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt"}, "prompt"),
        ({"target": MODELS + "asr_eou_models.EncDecRNNTBPEEOUModel"}, "end-of-utterance"),
        ({"target": MODELS + "multitalker_asr_models.EncDecMultiTalkerRNNTBPEModel"}, "speaker"),
        ({"target": "evil.EncDecCTCModelBPE"}, "Supported are exactly"),
        ({"target": MODELS + "rnnt_models.EncDecRNNTModel", "loss": {"loss_name": "multiblank_rnnt"}}, "multi-blank"),
        ({"target": MODELS + "rnnt_models.EncDecRNNTModel", "joint": {"_target_": "x.HATJoint"}}, "HAT"),
        ({}, "no target class"),
    ],
)
def test_unsupported_classes_are_refused_with_the_reason(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = _fake(tmp_path / "m.nemo", config)
    with pytest.raises(CheckpointError, match=words):
        restore(path)


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.nemo").write_text("text")
    with tarfile.open(tmp_path / "b.nemo", "w"):
        pass
    for name in ("a.nemo", "b.nemo"):
        with pytest.raises(CheckpointError, match=r"not a \.nemo"):
            restore(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such file"):
        restore(tmp_path / "absent.nemo")


@pytest.mark.parametrize("kind", ["ctc_char", "ctc_bpe", "rnnt_char", "tdt_bpe", "hybrid_char", "hybrid_tdt_bpe"])
def test_restore_picks_the_class_of_the_exact_target(kind: str, nemo_file: Any) -> None:
    name = supported_class(read_config(nemo_file(kind)), origin="x")
    model = restore(nemo_file(kind), map_location="cpu")
    assert type(model) is CLASSES[name]
    assert set(CLASSES) == set(SUPPORTED)


def test_saving_needs_no_source_and_names_do_not_grow(nemo_file: Any, tmp_path: Path) -> None:
    source = tmp_path / "source.nemo"
    source.write_bytes(nemo_file("ctc_bpe").read_bytes())
    model = restore(source, map_location="cpu")
    source.unlink()
    names = []
    for k in range(3):
        model.save_to(str(tmp_path / f"{k}.nemo"))
        model = restore(tmp_path / f"{k}.nemo", map_location="cpu")
        with tarfile.open(tmp_path / f"{k}.nemo") as archive:
            names.append(sorted(len(Path(m.name).name) for m in archive.getmembers()))
    assert names[0] == names[1] == names[2]


def test_a_failed_save_leaves_the_old_file(nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.nemo"
    model = restore(nemo_file("ctc_char"), map_location="cpu")
    model.save_to(str(target))
    before = target.read_bytes()

    def full_disk(filename: str, source_dir: str) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model._save_restore_connector), "_make_nemo_file_from_folder", staticmethod(full_disk))
    with pytest.raises(OSError, match="no space"):
        model.save_to(str(target))
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.nemo"]

    def write_half() -> None:
        with atomic_path(target) as temporary:
            Path(temporary).write_text("x")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    "encoder",
    [
        {"encoder__att_context_size": [4, 2], "encoder__att_context_style": "regular"},
        {
            "encoder__att_context_size": [[4, 1], [4, 0]],
            "encoder__att_context_style": "chunked_limited",
            "encoder__conv_context_size": "causal",
            "encoder__causal_downsampling": True,
            "encoder__conv_norm_type": "layer_norm",
        },
        {"encoder__self_attention_model": "rel_pos_local_attn", "encoder__att_context_size": [4, 4]},
    ],
    ids=["limited", "cache_aware", "local_attention"],
)
def test_context_settings_of_the_encoder_survive_adaptation(
    encoder: dict[str, Any], tokenizer_dir: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    base = build_nemo("ctc_bpe", tmp_path / "base.nemo", tokenizer_dir=tokenizer_dir, **encoder)
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    result = run(base, manifest, tiny_llm, tmp_path / "run", "trainer.max_steps=1")
    before, after = read_config(base).encoder, read_config(result.nemo).encoder
    assert before == after
    a, b = restore(base, map_location="cpu").encoder, restore(result.nemo, map_location="cpu").encoder
    assert (a.att_context_size, a.att_context_style, a.self_attention_model) == (
        b.att_context_size,
        b.att_context_style,
        b.self_attention_model,
    )


def _check_cards(nemo: Path, base: Path, tmp_path: Path) -> None:
    """A `.nemo` exported again: what it says of itself, and with a labelled set the table against its base."""
    labelled = write_manifest(tmp_path / "dev.json", ["a latte", "a mocha"])
    assert main(["export", str(nemo), "--output", str(tmp_path / "c.nemo")]) == 0
    assert "Language model (frozen, in training only): `" in (card := (tmp_path / "c.md").read_text())
    assert str(tmp_path.parent) not in card  # no folder of this machine
    with_table = ["--output", str(tmp_path / "d.nemo"), "--manifest", str(labelled)]
    assert main(["export", str(nemo), *with_table]) == 1  # against what?
    assert main(["export", str(nemo), *with_table, "--base", str(base)]) == 0
    rows = [line for line in (tmp_path / "d.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| system", "| ---", "| before", "| after"]
    assert "[" in rows[2]


def test_export_turns_a_training_checkpoint_into_a_plain_nemo(
    nemo_file: Any, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None] * 3)
    often = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    result = run(nemo_file("rnnt_bpe"), manifest, tiny_llm, tmp_path / "run", "trainer.max_steps=1", often)
    (last,) = (result.log_dir / "checkpoints").glob("*-last.ckpt")
    assert main(["export", str(last), "--output", str(tmp_path / "out.nemo")]) == 0
    assert main(["export", str(last), "--base", str(nemo_file("rnnt_bpe")), "--output", str(tmp_path / "b.nemo")]) == 0
    wanted = weights(result.nemo)
    for name in ("out.nemo", "b.nemo"):
        got = weights(tmp_path / name)
        assert list(got) == list(wanted)
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
        card = (tmp_path / name).with_suffix(".md").read_text()
        assert "Optimizer steps: `1`" in card
        assert "nothing was measured" in card
    _check_cards(result.nemo, nemo_file("rnnt_bpe"), tmp_path)
    capsys.readouterr()
    assert main(["export", str(last), "--base", str(nemo_file("ctc_bpe"))]) == 1
    assert "does not fit" in capsys.readouterr().err
