"""The transcribe job: audio files or a manifest through a checkpoint, with or without rescoring."""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import torch
from nemo.collections.asr.models import ASRModel
from nemo.collections.asr.parts.utils.timestamp_utils import process_timestamp_outputs
from omegaconf import open_dict

from nemo_llm_feedback.asr.checkpoints import read_config, supported_class
from nemo_llm_feedback.asr.encoded_rows import map_rows
from nemo_llm_feedback.core.config.rescoring import RescoringConfig
from nemo_llm_feedback.core.errors import ConfigError, ManifestError
from nemo_llm_feedback.core.types import Audio, Context
from nemo_llm_feedback.data.manifests import Row, read_manifest
from nemo_llm_feedback.rescoring import Rescorer, RescoringMixin, attach, utterance_contexts
from nemo_llm_feedback.training.models import locate

AUDIO_TYPES = ("wav", "flac", "ogg", "opus", "mp3")


@dataclass(frozen=True)
class Transcripts:
    """What came of a run.

    Attributes:
        rows: all rows asked for, in order.
        hypotheses: one NeMo ``Hypothesis`` a row, None where it failed.
        failures: ``origin: reason`` of the rows without transcript.
        audio_seconds: of the rows that have one.
        seconds: of wall time for loading, encoding, decoding and rescoring.
    """

    rows: tuple[Row, ...]
    hypotheses: tuple[Any, ...]
    failures: tuple[str, ...]
    audio_seconds: float
    seconds: float

    @property
    def rtfx(self) -> float:
        """Seconds of audio a second of wall time."""
        return self.audio_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class TranscribeOptions:
    """How to transcribe.

    Attributes:
        batch_size: utterances a batch.
        decoder_type: of a hybrid, ``rnnt`` or ``ctc``; None = the checkpoint's.
        timestamps: word and segment times.
        device: of the recogniser.
        rescoring: settings of the rescoring, or None for the checkpoint's own decoding.
        on_done: receives the number of rows done.
    """

    batch_size: int = 16
    decoder_type: str | None = None
    timestamps: bool = False
    device: str = "cpu"
    rescoring: RescoringConfig | None = None
    on_done: Callable[[int], None] = field(default=lambda done: None, repr=False)


def find_rows(audio: Sequence[str], *, manifest: str | None, audio_types: Sequence[str] = AUDIO_TYPES) -> list[Row]:
    """The rows of a manifest, or of audio files and folders (searched with their sub-folders).

    Args:
        audio: files and folders.
        manifest: a NeMo manifest instead.
        audio_types: suffixes of the files that are taken from folders.

    Returns:
        Rows; one whose file cannot be read has the duration 0 and fails alone.

    Raises:
        ManifestError: the manifest has faults, a path does not exist, or a folder has no audio in it.
    """
    if bool(audio) == bool(manifest):
        raise ManifestError("give either audio files or folders, or --dataset-manifest MANIFEST.")
    if manifest:
        return read_manifest(manifest)
    suffixes = {f".{kind.lower().lstrip('.')}" for kind in audio_types}
    files: list[Path] = []
    faults = []
    for name in audio:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            files += found
            faults += [] if found else [f"{name}: no audio in this folder (looked for {', '.join(sorted(suffixes))})."]
        elif path.is_file():
            files.append(path)
        else:
            faults.append(f"{name}: no such file or folder.")
    if faults:
        raise ManifestError(" ".join(faults))
    return [_row_of(path) for path in dict.fromkeys(files)]


def transcribe(model_name: str, rows: Sequence[Row], options: TranscribeOptions) -> Transcripts:
    """Transcribes rows; one that fails does not lose the others.

    Args:
        model_name: a ``.nemo`` or a pretrained name.
        rows: of :func:`find_rows`.
        options: how.

    Raises:
        CheckpointError, ConfigError, LLMError, RewardError: nothing can be transcribed this way.
    """
    model = _load(model_name, options)
    failures: dict[int, str] = {}
    start = time.perf_counter()
    hypotheses = map_rows(
        model,
        rows,
        functools.partial(_decode, model, options),
        batch_size=options.batch_size,
        on_batch=options.on_done,
        failures=failures,
    )
    seconds = time.perf_counter() - start
    worked = [row.duration for i, row in enumerate(rows) if i not in failures]
    listed = tuple(f"{rows[i].origin}: {failures[i]}" for i in sorted(failures))
    return Transcripts(tuple(rows), tuple(hypotheses), listed, sum(worked), seconds)


def write_manifest(path: str | Path, transcripts: Transcripts, *, nbest: int = 0) -> None:
    """Writes a NeMo manifest: the rows as they were, ``pred_text``, and where asked for ``nbest`` and times.

    Args:
        path: of the JSON Lines file.
        transcripts: rows that failed are left out.
        nbest: members of the ``nbest`` list, each with ``text``, ``score`` and its parts.
    """
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, hyp in zip(transcripts.rows, transcripts.hypotheses, strict=True):
        if hyp is not None:
            lines.append(json.dumps(_line(row, hyp, folder=file.parent, nbest=nbest), ensure_ascii=False))
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _row_of(path: Path) -> Row:
    try:
        duration = float(soundfile.info(str(path)).duration)
    except (soundfile.SoundFileError, RuntimeError):
        duration = 0.0
    data = {"audio_filepath": str(path), "duration": round(duration, 4)}
    return Row(str(path.absolute()), duration, 0.0, "", Context(), str(path), data)


def _load(name: str, options: TranscribeOptions) -> Any:
    path = locate(name)
    supported_class(read_config(path), origin=path)
    rescorer = None if options.rescoring is None else Rescorer.from_settings(options.rescoring)
    model = ASRModel.restore_from(str(path), map_location=torch.device(options.device))
    if options.decoder_type is not None and not hasattr(model, "cur_decoder"):
        raise ConfigError(f"--decoder-type is for hybrid models; {type(model).__name__} has one decoder.")
    if rescorer is not None:
        attach(model, rescorer)
    kind = options.decoder_type or getattr(model, "cur_decoder", None)
    if options.timestamps or options.decoder_type is not None:
        cfg = copy.deepcopy(model.cfg.aux_ctc.decoding if kind == "ctc" else model.cfg.decoding)
        with open_dict(cfg):
            cfg.compute_timestamps = options.timestamps
        head = {} if kind is None else {"decoder_type": kind}
        model.change_decoding_strategy(cfg, verbose=False, **head)
    return model


def _decode(
    model: Any, options: TranscribeOptions, audio: Audio, encoded: torch.Tensor, lengths: torch.Tensor
) -> list[Any]:
    """The best hypothesis of every row; [B, D, T] encoder output, [B] frames."""
    if isinstance(model, RescoringMixin):
        with utterance_contexts(model, audio.utterances, audio.contexts):
            found = _hypotheses(model, encoded, lengths)
    else:
        found = _hypotheses(model, encoded, lengths)
    best = [hyps[0] if isinstance(hyps, list) else hyps for hyps in found]
    if options.timestamps:
        stride = model.cfg.preprocessor.window_stride
        best = process_timestamp_outputs(best, model.encoder.subsampling_factor, stride)
    return list(best)


def _hypotheses(model: Any, encoded: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
    """What the model's current decoding object, hooked or not, makes of encoded audio."""
    hybrid = hasattr(model, "cur_decoder")
    if hasattr(model, "joint") and not (hybrid and model.cur_decoder == "ctc"):
        return list(model.decoding.rnnt_decoder_predictions_tensor(encoded, lengths, return_hypotheses=True))
    decoder, decoding = (model.ctc_decoder, model.ctc_decoding) if hybrid else (model.decoder, model.decoding)
    log_probs = decoder(encoder_output=encoded)
    return list(decoding.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=lengths, return_hypotheses=True))


def _line(row: Row, hyp: Any, *, folder: Path, nbest: int) -> dict[str, Any]:
    line = dict(row.data)
    name = "audio_filepath" if "audio_filepath" in line else "audio_filename"
    if not Path(line[name]).is_absolute() and not (folder / line[name]).exists():
        line[name] = row.audio  # relative to the other manifest, which this one is not beside
    line["pred_text"] = hyp.text
    for key in ("word", "segment"):
        if isinstance(hyp.timestamp, dict) and key in hyp.timestamp:
            line[key] = [{k: _plain(v) for k, v in item.items()} for item in hyp.timestamp[key]]
    if nbest:
        line["nbest"] = [
            {"text": m.text, "score": _plain(m.score), **{k: _plain(v) for k, v in m.parts.items()}}
            for m in hyp.n_best[:nbest]
        ]
    return line


def _plain(value: Any) -> Any:
    """A JSON value: NumPy's numbers as Python's, rounded; what cannot be judged (NaN) as null."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return round(value, 4) if value == value and abs(value) != float("inf") else None
    return value
