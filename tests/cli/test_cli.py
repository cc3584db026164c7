"""The command: light help, errors without traceback."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_llm_feedback.cli.commands import COMMANDS
from nemo_llm_feedback.cli.main import _adapt_words, _app, examples_text, main
from nemo_llm_feedback.cli.options import in_flags

HEAVY = ("torch", "nemo", "transformers", "hydra", "omegaconf", "lightning", "numpy", "pydantic")


@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["evaluate", "--help"], ["export", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from nemo_llm_feedback.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: nemo-llm-feedback" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scor"], 'Did you mean "score"?'),
        (["calibrate", "a.nemo"], "calibrate is now score --compare-quantization"),
        (["tune", "a.nemo"], "tune is now score --tune"),
        (["score", "a.nemo", "--manifest", "m.json", "--utterence", "3"], "Did you mean --utterances?"),
        (["score", "a.nemo", "--manifest", "m.json", "--head", "rnn"], 'Choose from: "auto", "ctc", "transducer"'),
        (["score", "a.nemo"], "--manifest requires an argument"),
        (["export", "a.nemo", "--base-share=0.5"], "--base-share is now --interpolation"),
        (["adapt", "--show-conf"], "Did you mean --show-config?"),
        (["adapt", "init_from_nemo_model=/absent.nemo", "llm.model=a/b", "context.description=x"], "no such file"),
        (["adapt", "llm.model=a/b", "context.description=x"], "exactly one of init_from_nemo_model"),
        (["adapt", "-m", "seed=1,2,3"], "runs=3 trains with three seeds"),
        (["adapt", "--cfg", "hydra"], "--cfg job, or --show-config"),
        (["adapt", "objectve=mwer"], "did you mean objective?"),
        (["adapt", "--objectve", "mwer"], "Did you mean --objective?"),
        (["adapt", "trainer.max_step=10"], "did you mean trainer.max_steps?"),
        (["adapt", "--seed", "-1", "llm.model=a/b", "context.description=x"], "--seed must be ≥ 0, got -1"),
        (["adapt", "--description", "x", "llm.model="], "llm.model is missing"),
        (["adapt", "--description", "x", "--llm", ""], "--llm is missing"),
        (["adapt", "--device", "tpu"], "give auto, cpu, cuda or cuda:N"),
        (["adapt", "--runs", "0", "llm.model=a/b", "--description", "x"], "--runs must be > 0"),
        (["score", "a.nemo", "--manifest", "m.json"], "--llm is missing"),
        (["score", "model_path=a.nemo", "dataset_manifest=m.json", "--llm", "x"], "--description"),
        (["score", "a.nemo", "--manifest", "m.json", "--llm", "x", "--terms-file", "/no"], "--terms-file /no cannot"),
        (
            ["score", "a.nemo", "--manifest", "m.json", "--llm", "x", "--alpha", "nan"],
            "--alpha must be a finite number",
        ),
        (["score", "a.nemo", "--manifest", "m.json", "--llm", "x", "--utterances", "-1"], "Must be >= 0"),
        (["transcribe", "model_path=a.nemo", "audio_dir=/absent", "batch_size=0"], "Must be > 0"),
        (["evaluate", "a.nemo", "--manifest", "m.json", "--samples", "9"], "--samples is now --resamples"),
        (["evaluate", "a.nemo", "--manifest", "m.json", "--oracle", "-1"], "Must be >= 0"),
        (["prepare", "/absent", "--out", "m.json", "--padding", "nan"], "--padding nan: not a number"),
        (["adapt", "objective.tau=1"], "unknown key objective.tau"),
        (["export", "/absent.ckpt"], "no such file"),
        (["export", __file__], "cannot be read as a Lightning checkpoint"),
        (["evaluate", "/absent.nemo", "--manifest", "/absent.json"], "no such file"),
    ],
)
def test_errors_name_the_fix_and_show_no_traceback(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(length: int, unbuffered: str) -> None:
    """`| head` left a traceback, or the status 120 of an error when the process ends."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*(sys.executable, "-m", "nemo_llm_feedback.cli.main"), "adapt", "--show-config", f"name={'x' * length}"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_flags_and_keys_compose_the_same_run() -> None:
    keys = [
        *("init_from_nemo_model=b.nemo", "model.train_ds.manifest_filepath=m.json", "context.terms_file=t.json"),
        *("llm.model=q", "context.description=an order", "objective=mwer", "trainer.max_steps=7", "output=o.nemo"),
        *("trainer=cpu", "llm.device=cpu", "feedback.heads=transducer", "proposals.samples=4", "seed=3", "runs=2"),
        *("reward.alpha=1.5", "llm.quantization=none", "resume=never", "model.optim.lr=1e-4"),
    ]
    flags = ["--base", "b.nemo", "--manifest", "m.json", "model.optim.lr=1e-4", "--terms-file", "t.json", "--llm", "q"]
    flags += ["--description", "an order", "--objective", "mwer", "--max-steps", "7", "--output", "o.nemo", "--device"]
    flags += ["cpu", "--head", "rnnt", "--samples", "4", "--seed", "3", "--runs", "2", "--alpha", "1.5"]
    flags += ["--quantization", "none", "--resume", "never"]
    nemos = ["model_path=b.nemo", "dataset_manifest=m.json", "output_filename=o.nemo", *keys[2:7], *keys[8:]]

    def shown(words: list[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["adapt", *words, "--cfg", "job"]) == 0
        return out.getvalue()

    assert shown(flags) == shown(keys) == shown(nemos)


def test_flags_win_over_keys_and_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--objective", "mwer", "--device", "cpu", "--description", "calls about ${product}, ~5 minutes"]
    words += [
        "objective=grpo",
        "trainer=gpu",
        "trainer.max_steps=7",
        "--max-steps",
        "9",
        "exp_manager.exp_dir='~/runs'",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["adapt", *words, "--show-config"]) == 0
    cfg = OmegaConf.create(out.getvalue())
    assert (cfg.objective.name, cfg.trainer.accelerator, cfg.trainer.max_steps) == ("mwer", "cpu", 9)
    assert cfg.context.description == "calls about ${product}, ~5 minutes"
    assert cfg.exp_manager.exp_dir == f"{tmp_path}/runs"


def test_terms_and_manifests_may_be_several_before_a_setting() -> None:
    words = [
        "--terms",
        "latte",
        "soy milk",
        "seed=3",
        "--manifest",
        "a.json",
        "b.json",
        "trainer=cpu",
        "--show-config",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["adapt", *words]) == 0
    cfg = yaml.safe_load(out.getvalue())
    assert cfg["context"]["terms"] == ["latte", "soy milk"]
    assert cfg["model"]["train_ds"]["manifest_filepath"] == ["a.json", "b.json"]
    assert (cfg["seed"], cfg["trainer"]["accelerator"]) == (3, "cpu")


def test_an_error_names_flags_in_the_place_of_keys() -> None:
    flags = {"llm.model": "--llm", "reward.alpha": "--alpha", "output": "--output"}
    said = "llm.model is missing: set reward.alpha=2, or reward.alphas; xllm.model, llm.model.x and the output stay."
    want = "--llm is missing: set --alpha 2, or reward.alphas; xllm.model, llm.model.x and the output stay."
    assert in_flags(said, flags) == want
    assert in_flags("unknown key reward.alpah; did you mean reward.alpha?", flags).endswith("reward.alpha?")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_has_two_examples_that_it_takes(command: Callable[..., int]) -> None:
    examples = examples_text(command).replace("\\\n", " ").splitlines()[1:]
    for example in examples:
        program, *given = shlex.split(example)
        assert (program, given[0]) == ("nemo-llm-feedback", command.__name__)
        words = [given[0], *_adapt_words(given[1:])] if given[0] == "adapt" else given
        called, _, _ = _app().parse_args(words, exit_on_error=False, print_error=False)
        assert called is command
    assert len(examples) == 2
    assert max(len(line) for line in examples_text(command).splitlines()) <= 80
