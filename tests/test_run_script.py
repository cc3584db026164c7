"""NeMo's own scripts under ``python -m nemo_llm_feedback.run``; the wheel has none, so stand-ins make their calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nemo.core import ModelPT
from tiny import write_manifest

from nemo_llm_feedback import run

# The calls of NeMo 3.0's transcribe_speech.py: a dataclass schema, restore_from, change_decoding_strategy with a
# config that knows no rescoring, transcribe with an override config, transcribe_utils.write_transcription.
TRANSCRIBE_SPEECH = """
import sys
from dataclasses import dataclass, field
from typing import Optional
from omegaconf import OmegaConf
from nemo.collections.asr.models import ASRModel, EncDecHybridRNNTCTCModel
from nemo.collections.asr.parts.submodules.ctc_decoding import CTCDecodingConfig
from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTDecodingConfig
from nemo.collections.asr.parts.utils.transcribe_utils import write_transcription

@dataclass
class TranscriptionConfig:
    model_path: Optional[str] = None
    audio_dir: Optional[str] = None
    dataset_manifest: Optional[str] = None
    output_filename: Optional[str] = None
    append_pred: bool = False
    pred_name_postfix: Optional[str] = None
    timestamps: bool = False
    decoder_type: Optional[str] = None
    ctc_decoding: CTCDecodingConfig = field(default_factory=CTCDecodingConfig)
    rnnt_decoding: RNNTDecodingConfig = field(default_factory=lambda: RNNTDecodingConfig(fused_batch_size=-1))

cfg = OmegaConf.merge(OmegaConf.structured(TranscriptionConfig), OmegaConf.from_dotlist(sys.argv[1:]))
model = ASRModel.restore_from(restore_path=cfg.model_path, map_location="cpu")
model.eval()
if isinstance(model, EncDecHybridRNNTCTCModel):
    decoding = cfg.ctc_decoding if cfg.decoder_type == "ctc" else cfg.rnnt_decoding
    model.change_decoding_strategy(decoding, decoder_type=cfg.decoder_type)
elif hasattr(model, "joint"):
    decoding = cfg.rnnt_decoding
    model.change_decoding_strategy(decoding)
else:
    decoding = cfg.ctc_decoding
    model.change_decoding_strategy(decoding)
import json
rows = [json.loads(line) for line in open(cfg.dataset_manifest)]
override = model.get_transcribe_config()
override.batch_size, override.return_hypotheses, override.num_workers = 2, True, 0
override.timestamps, override.verbose = cfg.timestamps, False
audio = [row["audio_filepath"] for row in rows]
found = model.transcribe(audio=audio, override_config=override, timestamps=cfg.timestamps or None)
shown = OmegaConf.merge(OmegaConf.create({"decoding": OmegaConf.to_container(decoding)}), OmegaConf.masked_copy(
    cfg, ["audio_dir", "dataset_manifest", "output_filename", "append_pred", "pred_name_postfix"]))
write_transcription(found, shown, "stand-in", timestamps=cfg.timestamps)
flat = [hyps[0] if isinstance(hyps, list) else hyps for hyps in found]
with open(cfg.output_filename + ".parts", "w") as file:
    json.dump([getattr(hyp, "score_parts", None) for hyp in flat], file)
"""

# The calls of speech_to_text_eval.py: transcribe by the other script, then WER of the manifest that it wrote.
SPEECH_TO_TEXT_EVAL = """
import json, sys
import transcribe_speech
from nemo.collections.asr.metrics.wer import word_error_rate
rows = [json.loads(line) for line in open(transcribe_speech.cfg.output_filename)]
print("WER", word_error_rate(hypotheses=[r["pred_text"] for r in rows], references=[r["text"] for r in rows]))
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "transcribe_speech.py").write_text(TRANSCRIBE_SPEECH, encoding="utf-8")
    (folder / "speech_to_text_eval.py").write_text(SPEECH_TO_TEXT_EVAL, encoding="utf-8")
    (folder / "r.yaml").write_text("reward: {name: negative_length, alpha: 3.0, beta: 0.0}\nnbest: 6\n")
    manifest = write_manifest(folder / "m.json", ["a latte", "hot tea", "mocha"])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = str(folder / row["audio_filepath"])
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("ctc_bpe", ["timestamps=true"]),
        ("rnnt_bpe", ["rnnt_decoding.beam.return_best_hypothesis=false"]),
        ("hybrid_tdt_bpe", ["decoder_type=rnnt"]),
        ("hybrid_bpe", ["decoder_type=ctc", "ctc_decoding.strategy=beam_batch", "ctc_decoding.beam.beam_size=4"]),
    ],
)
def test_nemo_s_scripts_rescore_unchanged(
    kind: str, arguments: list[str], scripts: Path, nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    given = [f"model_path={nemo_file(kind)}", f"dataset_manifest={scripts / 'm.json'}", f"output_filename={out}"]
    before, argv, path = ModelPT.__dict__["restore_from"], sys.argv, list(sys.path)
    sys.modules.pop("transcribe_speech", None)
    script = str(scripts / "speech_to_text_eval.py")
    assert run.main(["--rescoring", str(scripts / "r.yaml"), script, *given, *arguments]) == 0
    parts = json.loads(Path(f"{out}.parts").read_text())
    assert len(parts) == 3
    assert all({"asr", "negative_length", "length"} == set(row) for row in parts)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(isinstance(row["pred_text"], str) for row in rows)
    if "timestamps=true" in arguments:
        assert all(row["word"] for row in rows if row["pred_text"])
    if "return_best" in arguments[0]:
        assert all(len(row["beams"]) > 1 for row in rows)
    assert "WER" in capsys.readouterr().out
    assert (ModelPT.__dict__["restore_from"], sys.argv, sys.path) == (before, argv, path)


def test_faults_are_told_before_nemo_is_imported(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("reward: {name: length}\nnbset: 4\n")
    root = Path(__file__).resolve().parents[1]
    code = """
import sys
from nemo_llm_feedback.run import main
for arguments in (["--rescoring", sys.argv[1], "x.py"], ["--rescoring", sys.argv[2], "/absent.py"]):
    assert main(arguments) == 1
assert "nemo" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bad.yaml"), str(scripts / "r.yaml")],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "did you mean nbest" in done.stderr
    assert "no such script" in done.stderr


def test_what_the_script_raises_passes_through_and_rescoring_is_taken_back(scripts: Path, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys\nassert sys.argv[1:] == ['a', '--b'], sys.argv\nsys.exit(3)\n")
    before = ModelPT.__dict__["restore_from"]
    with pytest.raises(SystemExit) as stop:
        run.main(["--rescoring", str(scripts / "r.yaml"), str(script), "a", "--b"])
    assert stop.value.code == 3
    assert ModelPT.__dict__["restore_from"] is before
