"""The average of several runs' weights: `export` with more than one checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run, weights
from helpers.tiny import build_nemo, build_streaming, write_manifest

from nemo_llm_feedback.asr import encoded_rows
from nemo_llm_feedback.asr.heads import CTCHead
from nemo_llm_feedback.asr.nemo_file import read_config
from nemo_llm_feedback.cli.jobs.export import _as_learned, _Run, export
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import CheckpointError, ConfigError
from nemo_llm_feedback.training.models import restore


def _moved(source: Path, target: Path, seed: int, **facts: Any) -> Path:
    """A checkpoint with noise on its weights, saved with what a run would say of itself."""
    model = restore(source, map_location="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value += 0.1 * torch.randn(value.shape, generator=generator)
    model._adaptation_facts = {"base": source.name, "steps": 10, "before": {"dev": {"wer": 2.0}}, **facts}
    model.save_to(str(target))
    return target


@pytest.mark.parametrize("kind", ["ctc_bpe", "hybrid_tdt_char"])
def test_the_average_has_the_mean_of_the_weights(kind: str, nemo_file: Any, tmp_path: Path) -> None:
    from nemo.collections.asr.models import ASRModel

    runs = [_moved(nemo_file(kind), tmp_path / f"{seed}.nemo", seed, context_sha256=str(seed)) for seed in range(3)]
    assert main(["export", *map(str, runs), "--output", str(tmp_path / "mean.nemo")]) == 0
    each, mean = [weights(path) for path in runs], weights(tmp_path / "mean.nemo")
    assert list(mean) == list(each[0])
    for name, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([own[name] for own in each]).mean(dim=0))
        else:
            assert torch.equal(value, each[0][name])
    facts = read_config(tmp_path / "mean.nemo").adaptation
    assert dict(facts) == {"base": nemo_file(kind).name, "steps": 10, "averaged": 3}  # one run's numbers are not its
    assert "Number of runs whose weights are averaged: `3`" in (tmp_path / "mean.md").read_text()
    assert type(ASRModel.restore_from(str(tmp_path / "mean.nemo"), map_location="cpu")).__module__.startswith("nemo.")


def test_runs_that_do_not_belong_together_are_refused(nemo_file: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    one = _moved(nemo_file("ctc_char"), tmp_path / "one.nemo", 1)
    other_base = _moved(nemo_file("ctc_char"), tmp_path / "two.nemo", 2, base="another.nemo")
    bpe = _moved(nemo_file("ctc_bpe"), tmp_path / "three.nemo", 3, base="ctc_char.nemo")
    wide = build_nemo("ctc_char", tmp_path / "wide.nemo", tokenizer_dir=tokenizer_dir, encoder__d_model=32)
    out = tmp_path / "out.nemo"
    for other, words in (
        (other_base, "another base"),
        (bpe, "not the same class and output symbols"),
        (wide, "other names or shapes"),
    ):
        with pytest.raises(CheckpointError, match=words):
            export([one, other], output=out)
    with pytest.raises(CheckpointError, match=r"absent\.nemo: no such file"):
        export([one, tmp_path / "absent.nemo"], output=out)
    with pytest.raises(CheckpointError, match="--output"):
        export([one, one])
    assert not out.exists()


def test_gains_of_other_weights_are_left_out_and_shares_multiply(nemo_file: Any, tmp_path: Path) -> None:
    base = nemo_file("ctc_char")
    one = _moved(base, tmp_path / "one.nemo", 1, gain=1.5, general_wer_rise=0.1, look_ahead=None)
    export(one, output=tmp_path / "same.nemo")
    assert read_config(tmp_path / "same.nemo").adaptation.gain == 1.5
    export(one, base=base, output=tmp_path / "half.nemo", interpolation=0.5)
    export(tmp_path / "half.nemo", base=base, output=tmp_path / "less.nemo", interpolation=0.5)
    wanted = {"base": base.name, "steps": 10, "look_ahead": None, "interpolation": 0.25}
    assert dict(read_config(tmp_path / "less.nemo").adaptation) == wanted
    card = (tmp_path / "less.md").read_text()
    assert "(the rest is its base's): `0.25`" in card
    assert "Reward gained" not in card


@pytest.mark.parametrize("several", [True, False])
def test_a_share_of_the_base_moves_the_weights_back(several: bool, nemo_file: Any, tmp_path: Path) -> None:
    base = nemo_file("hybrid_rnnt_bpe")
    runs = [_moved(base, tmp_path / f"{seed}.nemo", seed) for seed in range(2 if several else 1)]
    out = tmp_path / "out.nemo"
    flags = ["--interpolation", "0.75", "--output", str(out)]
    assert main(["export", *map(str, runs), *flags, "--base", str(base)]) == 0
    each, start, got = [weights(path) for path in runs], weights(base), weights(out)
    for name, value in got.items():
        if value.is_floating_point():
            mean = torch.stack([own[name] for own in each]).mean(dim=0)
            torch.testing.assert_close(value, 0.75 * mean + 0.25 * start[name])
    wanted = {"base": base.name, "steps": 10, "interpolation": 0.75}
    assert dict(read_config(out).adaptation) == wanted | ({"averaged": 2} if several else {})
    assert "Share of the run's weights (the rest is its base's): `0.75`" in out.with_suffix(".md").read_text()


def test_the_base_of_a_share_may_be_a_pretrained_name(
    nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo.collections.asr.models import ASRModel

    base = nemo_file("ctc_char")
    run_file = _moved(base, tmp_path / "one.nemo", 1)
    monkeypatch.setattr(ASRModel, "from_pretrained", lambda name, return_model_file: str(base))
    export(run_file, output=tmp_path / "out.nemo", base="nvidia/a_pretrained_one", interpolation=0.5)
    assert read_config(tmp_path / "out.nemo").adaptation.interpolation == 0.5


def test_a_share_of_the_base_needs_the_right_base(nemo_file: Any, tmp_path: Path) -> None:
    run_file, out = _moved(nemo_file("ctc_char"), tmp_path / "one.nemo", 1), tmp_path / "out.nemo"
    nameless = _moved(nemo_file("ctc_char"), tmp_path / "two.nemo", 1, base=None)
    with pytest.raises(CheckpointError, match=r"is mixed with its base: add --base"):
        export(run_file, output=out, interpolation=0.5)
    with pytest.raises(CheckpointError, match=r"started from ctc_char\.nemo, not from .*: give that file"):
        export(run_file, output=out, base=nemo_file("ctc_bpe"), interpolation=0.5)
    with pytest.raises(CheckpointError, match="not the same class and output symbols"):
        export(nameless, output=out, base=nemo_file("ctc_bpe"), interpolation=0.5)
    with pytest.raises(CheckpointError, match="--output"):
        export(run_file, base=nemo_file("ctc_char"), interpolation=0.5)
    for share in (0.0, 1.1):
        with pytest.raises(ConfigError, match="above 0, at most 1"):
            export(run_file, output=out, base=nemo_file("ctc_char"), interpolation=share)
    assert not out.exists()


def test_checkpoints_of_runs_with_lora_are_averaged_as_merged(nemo_file: Any, tiny_llm: Path, tmp_path: Path) -> None:
    base, manifest = nemo_file("ctc_bpe"), write_manifest(tmp_path / "m.json", [None] * 3)
    more = ("parameters.lora_rank=2", "guards.every=0", "trainer.max_steps=1", "model.optim.lr=1e-2")
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    results = [run(base, manifest, tiny_llm, tmp_path / str(s), *more, every, f"seed={s}") for s in (1, 2)]
    files = [next(result.log_dir.rglob("*-last.ckpt")) for result in results]
    export(files, output=tmp_path / "mean.nemo")
    each, mean = [weights(result.nemo) for result in results], weights(tmp_path / "mean.nemo")
    assert any(not torch.equal(each[0][name], each[1][name]) for name in mean)
    for name, value in mean.items():
        torch.testing.assert_close(value, torch.stack([own[name].float() for own in each]).mean(dim=0).to(value.dtype))
    export(files[0], output=tmp_path / "half.nemo", interpolation=0.5)  # a .ckpt names its base
    start, half = weights(base), weights(tmp_path / "half.nemo")
    for name, value in half.items():
        torch.testing.assert_close(value, ((each[0][name].float() + start[name].float()) / 2).to(value.dtype))


def test_the_base_is_never_written_over(nemo_file: Any, tmp_path: Path) -> None:
    base = nemo_file("ctc_bpe")
    before = base.read_bytes()
    with pytest.raises(CheckpointError, match="which would be lost"):
        export([base], base=base, interpolation=0.5, output=base)
    assert base.read_bytes() == before
    runs = [tmp_path / "a.nemo", tmp_path / "b.nemo"]
    for copy in runs:
        shutil.copy(base, copy)
    with pytest.raises(CheckpointError, match="is the base, which would be lost"):
        export(runs[0], base=base, output=base)
    with pytest.raises(CheckpointError, match="is one of the checkpoints, which would be lost"):
        export(runs, output=runs[0])
    assert runs[0].read_bytes() == before


def test_the_card_measures_the_head_and_the_context_that_learned(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that the head that learned was measured, and had the transducer's numbers in the default context."""
    base = build_streaming(tmp_path / "base.nemo", "hybrid_bpe", tokenizer_dir=tokenizer_dir)
    one = _moved(base, tmp_path / "one.nemo", 1, decoder_type="ctc", look_ahead=[4, 0])
    seen: list[tuple[str, list[int]]] = []
    greedy = CTCHead.greedy

    def watched(head: Any, *args: Any, **settings: Any) -> Any:
        seen.append((head.name, list(models[-1].encoder.att_context_size)))
        return greedy(head, *args, **settings)

    models: list[Any] = []
    encode = encoded_rows.encode
    monkeypatch.setattr(encoded_rows, "encode", lambda model, *audio: (models.append(model), encode(model, *audio))[1])
    monkeypatch.setattr(CTCHead, "greedy", watched)
    manifest = write_manifest(tmp_path / "dev.json", ["a latte"])
    export(one, base=base, manifest=manifest, output=tmp_path / "out.nemo")
    assert seen == [("ctc", [4, 0])] * 2
    assert len({id(model) for model in models}) == 2  # the base, too
    with pytest.raises(ConfigError, match="would be written over"):
        export(one, base=base, manifest=manifest, output=manifest)
    fixed = restore(one, map_location="cpu")
    fixed.encoder.att_context_size_all = [[4, 0]]  # as of a file that was fixed to the one that learned
    fixed.encoder.att_context_size = [4, 0]
    assert _as_learned(_Run(str(one), fixed, None, {"look_ahead": [4, 0]})).feedback.look_ahead == (4, 0)
    odd = _moved(base, tmp_path / "odd.nemo", 1, look_ahead=[9, 9])
    with pytest.raises(CheckpointError, match=r"the attention context \[9, 9\], which its encoder does not have"):
        export(odd, output=tmp_path / "out.nemo")


def test_an_output_with_dots_in_its_name_keeps_them_in_its_card(nemo_file: Any, tmp_path: Path) -> None:
    """The card of ``parakeet-tdt-0.6b-v2-menu`` was ``parakeet-tdt-0.md``, which another run's would overwrite."""
    one = _moved(nemo_file("ctc_char"), tmp_path / "run-0.5.nemo", 1)
    for name, card in {"parakeet-tdt-0.6b-v2-menu": "parakeet-tdt-0.6b-v2-menu", "tdt-0.6b.nemo": "tdt-0.6b"}.items():
        assert export(one, output=tmp_path / name) == tmp_path / name
        assert (tmp_path / f"{card}.md").read_text().count(f"# {card.replace('_', '')}\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("run-0.5.nemo", "parakeet-tdt-0.6b-v2-menu", "parakeet-tdt-0.6b-v2-menu.md", "tdt-0.6b.nemo", "tdt-0.6b.md")
    }
    assert weights(tmp_path / "parakeet-tdt-0.6b-v2-menu").keys() == weights(one).keys()


_LORA = "encoder.layers.0.self_attn.linear_q.lora_A.default.weight"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "has no state_dict"),
        ({"state_dict": [1, 2]}, "has no state_dict"),
        ({"state_dict": {}}, "has no state_dict"),
        ({"state_dict": {"a": "b"}}, "has no state_dict of tensors"),
        ({"state_dict": {5: torch.zeros(1)}}, "has no state_dict of tensors"),
        ({"state_dict": {"a": torch.zeros(())}}, "does not fit"),
        ({"nemo_llm_feedback": {"base": "here"}, "state_dict": {"a": torch.zeros(1)}}, "does not fit"),
        ({"lora": True, "nemo_llm_feedback": None}, "lacks the rank and alpha"),
        ({"lora": True, "nemo_llm_feedback": {"lora": None}}, "lacks the rank and alpha"),
        ({"lora": True, "nemo_llm_feedback": {"lora": {"rank": 2}}}, "lacks the rank and alpha"),
        (
            {"lora": True, "nemo_llm_feedback": {"lora": {"rank": 2, "alpha": float("inf")}}},
            "lacks the rank and alpha",
        ),
        ({"lora": True, "nemo_llm_feedback": {"lora": {"rank": 2, "alpha": 0}}}, "lacks the rank and alpha"),
        ({"lora": True, "nemo_llm_feedback": {"lora": {"rank": 10**12, "alpha": 2}}}, "lacks the rank and alpha"),
        ({"lora": True, "nemo_llm_feedback": {"lora": {"rank": 2, "alpha": 2, "x": 1}}}, "does not fit"),
    ],
)
def test_a_checkpoint_of_odd_content_is_a_typed_error(
    content: Any, words: str, nemo_file: Any, tmp_path: Path
) -> None:
    base, path = nemo_file("ctc_char"), tmp_path / "odd.ckpt"
    if isinstance(content, dict):
        content = {"state_dict": restore(base, map_location="cpu").state_dict(), **content}
        if content.pop("lora", False):
            content["state_dict"] |= {_LORA: torch.zeros(2, 16)}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        export(path, base=base, output=tmp_path / "out.nemo")
    assert not (tmp_path / "out.nemo").exists()


@pytest.mark.parametrize("section", [None, [], "x", 5, {}, {"base": None}, {"base": 5}, {"base": ["a"]}, {"base": {}}])
def test_an_odd_section_of_ours_in_a_foreign_checkpoint_is_as_good_as_none(
    section: Any, nemo_file: Any, tmp_path: Path
) -> None:
    base, path = nemo_file("ctc_char"), tmp_path / "odd.ckpt"
    content = {"state_dict": restore(base, map_location="cpu").state_dict(), "global_step": "many"}
    torch.save({**content, "nemo_llm_feedback": section, "lora": {"rank": "a"}}, path)
    with pytest.raises(CheckpointError, match="add --base"):
        export(path, output=tmp_path / "out.nemo")
    export(path, base=base, output=tmp_path / "out.nemo")
    assert dict(read_config(tmp_path / "out.nemo").adaptation)["steps"] == 0


@pytest.mark.parametrize("name", ["nvidia/parakeet-tdt-0.6b-v2", "absent.nemo", "a\0b", "x" * 5000, "/dev/zero"])
def test_a_base_that_a_checkpoint_names_is_never_fetched(
    name: str, nemo_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo.collections.asr.models import ASRModel

    fetched: list[str] = []
    monkeypatch.setattr(ASRModel, "from_pretrained", lambda *args, **kwargs: fetched.append(str(args)))
    weights_ = restore(nemo_file("ctc_char"), map_location="cpu").state_dict()
    torch.save({"state_dict": weights_, "nemo_llm_feedback": {"base": name}}, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match="add --base"):
        export(tmp_path / "odd.ckpt")
    assert not fetched
