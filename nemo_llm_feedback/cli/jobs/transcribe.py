"""The transcribe job: transcribes audio files or a manifest, with or without rescoring by an LLM."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import soundfile
import torch
from nemo.collections.asr.parts.utils.timestamp_utils import process_timestamp_outputs
from omegaconf import open_dict

from nemo_llm_feedback.asr.checkpoints import restored
from nemo_llm_feedback.asr.encoded_rows import map_rows
from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.cli.jobs.hypotheses import relocated
from nemo_llm_feedback.cli.jobs.tuning import Weights, by_spread
from nemo_llm_feedback.core.config import FeedbackConfig, RunConfig
from nemo_llm_feedback.core.config.rescoring import DEFAULT_NBEST, parse_rescoring_config
from nemo_llm_feedback.core.console import progress, quiet, show
from nemo_llm_feedback.core.errors import ConfigError, ManifestError, RewardError, list_faults
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import Audio, Context, ExternalText
from nemo_llm_feedback.data import manifests
from nemo_llm_feedback.data.audio import AUDIO_TYPES, CONVERTED_TYPES, audio_files, unreadable
from nemo_llm_feedback.data.manifests import Row, read_manifest, spread
from nemo_llm_feedback.evaluation.metrics import score_corpus
from nemo_llm_feedback.hypotheses.scored_nbest import measured_trust, scored_nbest
from nemo_llm_feedback.hypotheses.trust import Trust, trust_text
from nemo_llm_feedback.rescoring import Rescorer, RescoringMixin, attach, utterance_contexts
from nemo_llm_feedback.training.models import locate
from nemo_llm_feedback.training.setup import warn_of_external

_WRITTEN = ("nbest", "word", "segment")  # lists in a line that are of one model


@dataclasses.dataclass(frozen=True)
class Transcripts:
    """Transcripts of rows.

    Attributes:
        rows: all rows asked for, in order.
        hypotheses: one NeMo ``Hypothesis`` per row, None where it failed.
        failures: ``origin: reason`` of the rows without transcript.
        audio_seconds: length of the audio of the rows that have one.
        seconds: wall time for loading, encoding, decoding and rescoring.
        weights: α and β of the reward, and where they come from; empty without a reward that has any.
    """

    rows: tuple[Row, ...]
    hypotheses: tuple[Any, ...]
    failures: tuple[str, ...]
    audio_seconds: float
    seconds: float
    weights: str = ""

    @property
    def worked(self) -> list[tuple[Row, Any]]:
        """The rows that have a transcript, each with its hypothesis."""
        return [(row, hyp) for row, hyp in zip(self.rows, self.hypotheses, strict=True) if hyp is not None]

    @property
    def rtfx(self) -> float:
        """Seconds of audio per second of wall time."""
        return self.audio_seconds / self.seconds if self.seconds else 0.0


def find_rows(
    audio: str | Path | Sequence[str | Path], *, manifest: str | Path | None, audio_types: Sequence[str] = AUDIO_TYPES
) -> list[Row]:
    """The rows of a manifest, or of audio files and folders (searched with their sub-folders).

    Args:
        audio: files and folders, or a NeMo manifest (``.json``, ``.jsonl``).
        manifest: a NeMo manifest instead.
        audio_types: suffixes of the files that are taken from folders.

    Returns:
        Rows; one whose file cannot be read has the duration 0 and fails alone.

    Raises:
        ManifestError: the manifest has faults, a path does not exist, or a folder has no audio in it.
    """
    names = [str(name) for name in ([audio] if isinstance(audio, (str, Path)) else audio)]
    if manifest is None and len(names) == 1 and names[0].endswith((".json", ".jsonl")):
        manifest = names.pop()
    if bool(names) == bool(manifest):
        raise ManifestError("give either audio files or folders, or --manifest MANIFEST.")
    if manifest:
        return read_manifest(manifest)
    suffixes = {f".{kind.lower().lstrip('.')}" for kind in audio_types}
    files: dict[Path, None] = {}
    faults = []
    for name in names:
        try:
            files |= dict.fromkeys(audio_files(name, suffixes))
        except ManifestError as error:
            faults.append(str(error))
    if faults:
        raise ManifestError(" ".join(faults))
    folders = [path for path in (Path(name).expanduser() for name in names) if path.is_dir()]
    others = [p for folder in folders for p in folder.rglob("*") if _converted(p) and p not in files]
    if others:
        show(f"left out: {len(others)} file(s) such as {others[0]}, which `nemo-llm-feedback prepare` converts.")
    return [_row_of(path) for path in files]


def _converted(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in CONVERTED_TYPES


@quiet()
def transcribe(
    model: str | Path,
    audio: str | Path | Sequence[str | Path] = (),
    *,
    manifest: str | Path | None = None,
    rescoring: Mapping[str, Any] | None = None,
    timestamps: bool = False,
    audio_types: Sequence[str] = AUDIO_TYPES,
    head: str = "auto",
    batch_size: int = 16,
    device: str = "cpu",
) -> Transcripts:
    """Transcribes audio, with LLM rescoring if asked for; the command ``transcribe``.

    A file that fails does not lose the others.

    Args:
        model: ``.nemo`` file or pretrained name.
        audio: files and folders, or a NeMo manifest (``.json``, ``.jsonl``).
        manifest: a NeMo manifest in place of ``audio``.
        rescoring: settings as in ``conf/rescoring.yaml``, e.g. ``{"llm": {"model": …}, "context": {…}}``; None = the
            checkpoint's decoding. Without ``reward.alpha`` it is measured on the rows, as ``adapt`` does.
        timestamps: word and segment times, in seconds.
        audio_types: suffixes of the files that are taken from folders.
        head: head of a hybrid, ``transducer`` or ``ctc``; ``auto`` = the checkpoint's.
        batch_size: utterances per batch.
        device: ``cpu`` or ``cuda:0`` ….

    Raises:
        FeedbackError: nothing can be transcribed this way.
    """
    rows = find_rows(audio, manifest=manifest, audio_types=audio_types)
    shared: Any = {"timestamps": timestamps, "head": head, "batch_size": batch_size, "device": device}
    return transcribe_rows(model, rows, rescoring=rescoring, **shared)


@quiet()
def transcribe_rows(
    model: str | Path,
    rows: Sequence[Row],
    *,
    rescoring: Mapping[str, Any] | None = None,
    timestamps: bool = False,
    head: str = "auto",
    batch_size: int = 16,
    device: str = "cpu",
) -> Transcripts:
    """:func:`transcribe` of rows that are read already.

    Args:
        model, rescoring, timestamps, head, batch_size, device: as there.
        rows: see :func:`find_rows`.

    Raises:
        FeedbackError: nothing can be transcribed this way.
    """
    settings = None if rescoring is None else parse_rescoring_config(rescoring)
    rescorer = None if settings is None else Rescorer.from_settings(settings)
    recogniser = _load(model, head=head, device=device)
    weights = ""
    if rescorer is not None:
        vocabulary = heads_of(recogniser, which=head)[0].vocabulary
        warn_of_external(rows, vocabulary, rescorer.proposals, rescorer.settings.normalizer)
        weights = _set_weights(rescorer, recogniser, rows, head=head, batch_size=batch_size)
        attach(recogniser, rescorer)
    _set_decoding(recogniser, head=head, timestamps=timestamps)
    failures: dict[int, str] = {}
    start = time.perf_counter()
    work = functools.partial(_decode, recogniser, timestamps)
    with progress("transcribing", len(rows)) as on_batch:
        hypotheses = map_rows(recogniser, rows, work, batch_size=batch_size, on_batch=on_batch, failures=failures)
    seconds = time.perf_counter() - start
    worked = [row.duration for i, row in enumerate(rows) if i not in failures]
    listed = tuple(f"{rows[i].origin}: {failures[i]}" for i in sorted(failures))
    return Transcripts(tuple(rows), tuple(hypotheses), listed, sum(worked), seconds, weights)


def transcripts_text(transcripts: Transcripts, *, nbest: int = 0) -> str:
    """A line per file with its transcript, and below it the best ``nbest`` hypotheses with their score parts."""
    lines = []
    for row, hyp in transcripts.worked:
        lines.append(f"{row.data.get('audio_filepath', row.audio)}\t{hyp.text}")
        for member in hyp.n_best[:nbest] if nbest else ():
            parts = " ".join(f"{name}={value:.2f}" for name, value in member.parts.items())
            lines.append(f"    {member.score:9.2f}  {member.text}  ({parts})")
    return "\n".join(lines)


def summary(transcripts: Transcripts, *, written: str = "") -> str:
    """Totals, WER where every transcribed row has a reference, and failures.

    Args:
        transcripts: what :func:`transcribe` gave.
        written: the place where they were written, for the first line.
    """
    rows, texts = [row for row, _ in transcripts.worked], [hyp.text for _, hyp in transcripts.worked]
    lines = [
        f"{len(rows)} of {len(transcripts.rows)} utterances, {transcripts.audio_seconds / 60:.1f} min of audio in "
        f"{transcripts.seconds:.1f} s: RTFx {transcripts.rtfx:.1f}{written}"
    ]
    if rows and all(row.text for row in rows):
        normalize = get_normalizer(FeedbackConfig.normalizer)
        scores = score_corpus([row.text for row in rows], texts, normalize=normalize)
        lines.append(f"WER {scores.value('wer'):.1f} %, CER {scores.value('cer'):.1f} %")
    if transcripts.weights:
        lines.append(f"weights: {transcripts.weights}")
    if transcripts.failures:
        lines.append(list_faults(f"{len(transcripts.failures)} failed:", transcripts.failures))
    return "\n".join(lines)


def write_manifest(path: str | Path, transcripts: Transcripts, *, nbest: int = 0) -> None:
    """Writes a NeMo manifest: the rows as they were, ``pred_text``, and where asked for ``nbest`` and times.

    What another model's run left in the rows under these keys is not kept.

    Args:
        path: the JSON Lines file.
        transcripts: rows that failed are left out.
        nbest: members of the ``nbest`` list, each with ``text``, ``score`` and its parts.
    """
    folder = Path(os.path.realpath(os.path.expanduser(path))).parent
    manifests.write_manifest(path, [_line(row, hyp, folder=folder, nbest=nbest) for row, hyp in transcripts.worked])


def nbest_texts(transcripts: Transcripts, *, source: str, nbest: int) -> dict[str, list[ExternalText]]:
    """Utterance → its best hypotheses with their log p, for other models' manifests; empty texts are left out."""
    return {
        row.utterance: [ExternalText(m.text, source, float(m.score)) for m in hyp.n_best[:nbest] if m.text.strip()]
        for row, hyp in transcripts.worked
    }


def _row_of(path: Path) -> Row:
    try:
        duration = float(soundfile.info(str(path)).duration)
    except (soundfile.SoundFileError, RuntimeError):
        duration = 0.0
    data = {"audio_filepath": str(path), "duration": round(duration, 4)}
    return Row(str(path.absolute()), duration, 0.0, "", Context(), str(path), data)


def _load(name: str | Path, *, head: str, device: str) -> Any:
    model = restored(locate(name), map_location=torch.device(device))
    if head != "auto" and not hasattr(model, "cur_decoder"):
        raise ConfigError(f"--head is for hybrid models; {type(model).__name__} has one decoder.")
    return model


def _set_decoding(model: Any, *, head: str, timestamps: bool) -> None:
    kind = getattr(model, "cur_decoder", None) if head == "auto" else {"transducer": "rnnt"}.get(head, head)
    if timestamps or head != "auto":
        cfg = copy.deepcopy(model.cfg.aux_ctc.decoding if kind == "ctc" else model.cfg.decoding)
        with open_dict(cfg):
            cfg.compute_timestamps = timestamps
        model.change_decoding_strategy(cfg, verbose=False, **({} if kind is None else {"decoder_type": kind}))


def _set_weights(rescorer: Rescorer, model: Any, rows: Sequence[Row], *, head: str, batch_size: int) -> str:
    """Gives the reward the weights that ``adapt`` would take from these rows; says which, and where they come from."""
    settings = rescorer.settings
    reward: Any = rescorer.reward
    if settings.reward is None or not settings.reward.weighed:
        return ""
    weights, about = Weights(*settings.reward.weights, "settings"), ""
    trusts = settings.reward.trusts_by_pool and any(row.external for row in rows)
    few = spread(rows, FeedbackConfig.pool_utterances) if settings.reward.scaled_by_pool or trusts else []
    broken = unreadable(few)
    few = [row for i, row in enumerate(few) if i not in broken]
    if not few:
        return weights.sentence
    shared: Any = {"heads": head, "normalizer": settings.normalizer, "memory_budget_mb": settings.memory_budget_mb}
    proposals = dataclasses.replace(rescorer.proposals, beam=settings.nbest or DEFAULT_NBEST)
    config = RunConfig(feedback=FeedbackConfig(**shared), proposals=proposals, context=settings.context)
    nbest = scored_nbest(model, few, config=config, reward=reward, batch_size=batch_size)
    if trusts and (trusted := measured_trust(model, few, nbest, config=config, batch_size=batch_size)):
        rescorer.trust = Trust({source: of.trust for source, of in trusted.items()}, settings.reward.asr_weight)
        about = f"; {trust_text(trusted)}"
    if settings.reward.scaled_by_pool:
        try:
            weights = by_spread(nbest, settings.reward)
        except RewardError:
            return f"{weights}, as the groups of these rows have no spread to measure them by{about}"
        rescorer.reward = reward.with_weights(alpha=weights.alpha, beta=weights.beta)
    return weights.sentence + about


def _decode(model: Any, timestamps: bool, audio: Audio, encoded: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
    """The best hypothesis of every row; [B, D, T] encoder output, [B] frames."""
    rescoring = isinstance(model, RescoringMixin)
    about = (audio.utterances, audio.contexts, audio.external)
    with utterance_contexts(model, *about) if rescoring else nullcontext():
        found = _hypotheses(model, encoded, lengths)
    best = [hyps[0] if isinstance(hyps, list) else hyps for hyps in found]
    if timestamps:
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
    given = relocated(row, folder)
    kept = {key: value for key, value in given.items() if not (key in _WRITTEN and isinstance(value, list))}
    line = kept | {"pred_text": hyp.text}
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
