"""``nemo-llm-feedback transcribe``: transcribe audio, by an LLM's rescoring if asked for."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from nemo_llm_feedback.cli.commands import chosen_device, quiet_nemo
from nemo_llm_feedback.core.errors import ConfigError

HELP = "transcribe audio, with LLM rescoring if asked for"
_MOST_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("model", metavar="MODEL", help=".nemo file or pretrained name")
    parser.add_argument("audio", nargs="*", metavar="AUDIO", help="audio files and folders")
    parser.add_argument("--dataset-manifest", metavar="M", help="a NeMo manifest instead of AUDIO")
    parser.add_argument("--audio-type", help="comma-separated suffixes to take from folders (default: all known)")
    parser.add_argument("--output-filename", metavar="FILE", help="manifest to write; default: print the transcripts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--decoder-type", choices=("rnnt", "ctc"), help="head of a hybrid model")
    parser.add_argument("--timestamps", action="store_true", help="word and segment times, in seconds")
    parser.add_argument("--cuda", type=int, help="number of the GPU, −1 = CPU (default: GPU 0 if there is one)")
    parser.add_argument("--nbest", type=int, default=0, metavar="N", help="write N hypotheses with all score parts")
    rescoring = parser.add_argument_group(
        "rescoring", "score = log p(text|audio) + alpha·log p(text|context) + beta·words"
    )
    rescoring.add_argument("--rescore", action="store_true", help="choose among the N-best with an LLM")
    rescoring.add_argument("--rescoring", metavar="FILE", help="settings as YAML (conf/rescoring.yaml); flags win")
    rescoring.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of reward, llm and context as `adapt` took them, e.g. reward=entity reward.settings.weight=3",
    )
    rescoring.add_argument("--llm", help="folder or hub id of a causal LM")
    rescoring.add_argument("--quantization", choices=("nf4", "int8", "none"), help="of the LLM")
    rescoring.add_argument("--description", help='e.g. "an order at a coffee shop"')
    rescoring.add_argument("--terms-file", help="terms that may occur")
    rescoring.add_argument("--no-context", action="store_true", help="allow utterances without any context")
    rescoring.add_argument("--alpha", type=float, help="weight of the LLM")
    rescoring.add_argument("--beta", type=float, help="bonus a word, in nats")
    rescoring.add_argument("--beam-size", type=int, help="hypotheses of the first pass")
    rescoring.add_argument("--boosted", type=int, metavar="N", help="more hypotheses from a beam boosted on the terms")
    rescoring.add_argument("--boosting-weight", type=float, help="of that beam")
    rescoring.add_argument("--term-swap", type=int, metavar="N", help="more hypotheses with terms swapped in")


def run(options: argparse.Namespace) -> int:
    """Writes or prints the transcripts; 1 if a file failed."""
    from nemo_llm_feedback.core.config.rescoring import parse_rescoring_config

    if options.batch_size < 1 or options.nbest < 0:
        raise ConfigError("--batch-size must be at least 1 and --nbest at least 0.")
    tree = _settings(options)
    settings = parse_rescoring_config(tree) if tree is not None else None
    quiet_nemo()
    from tqdm import tqdm

    from nemo_llm_feedback.cli.jobs.transcribe import (
        AUDIO_TYPES,
        TranscribeOptions,
        find_rows,
        transcribe,
        write_manifest,
    )

    types = options.audio_type.split(",") if options.audio_type else AUDIO_TYPES
    rows = find_rows(options.audio, manifest=options.dataset_manifest, audio_types=types)
    with tqdm(total=len(rows), unit="utt", desc="transcribing", disable=None) as bar:
        found = transcribe(
            options.model,
            rows,
            TranscribeOptions(
                batch_size=options.batch_size,
                decoder_type=options.decoder_type,
                timestamps=options.timestamps,
                device=chosen_device(options.cuda),
                rescoring=settings,
                on_done=lambda done: bar.update(done - bar.n),
            ),
        )
    if options.output_filename:
        write_manifest(options.output_filename, found, nbest=options.nbest)
    else:
        _print(found, nbest=options.nbest)
    _report(found, output=options.output_filename)
    return 1 if found.failures else 0


def _settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """The rescoring settings that file and flags name; None = the checkpoint's own decoding.

    Raises:
        ConfigError: flags of the rescoring without ``--rescore``.
    """
    flags: dict[str, dict[str, Any]] = {
        "": {
            "nbest": options.beam_size,
            "boosted": options.boosted,
            "boosting_weight": options.boosting_weight,
            "term_swap": options.term_swap,
        },
        "reward": {"alpha": options.alpha, "beta": options.beta},
        "llm": {"model": options.llm, "quantization": options.quantization},
        "context": {
            "description": options.description,
            "terms_file": options.terms_file,
            "required": False if options.no_context else None,
        },
    }
    given = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in flags.items()}
    judged = options.rescore or options.rescoring is not None
    if not judged and (given["reward"] or given["llm"] or options.set):
        raise ConfigError("--alpha, --beta, --llm, --quantization and --set have no effect without --rescore; add it.")
    if not judged and not options.nbest and not any(given.values()):
        return None
    tree: dict[str, Any] = _start(options) if judged else {"reward": None}
    for section, keys in given.items():
        if section and keys:
            tree[section] = {**(tree.get(section) or {}), **keys}
    tree.update(given[""])
    if options.nbest and not tree.get("nbest"):
        from nemo_llm_feedback.rescoring.strategies import DEFAULT_NBEST

        tree["nbest"] = max(options.nbest, DEFAULT_NBEST)
    return tree


def _start(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of the file or of ``--set``, as plain mappings."""
    from omegaconf import OmegaConf

    from nemo_llm_feedback.core.config.compose import compose_config
    from nemo_llm_feedback.core.config.rescoring import SHARED_SECTIONS, read_yaml

    if not options.set:
        return read_yaml(options.rescoring) if options.rescoring else {}
    if options.rescoring:
        raise ConfigError("--set and --rescoring FILE both give the settings: write them into the file, or use --set.")
    named = list(dict.fromkeys(override.lstrip("+~").split("=")[0].split(".")[0] for override in options.set))
    strange = [section for section in named if section not in SHARED_SECTIONS]
    if strange:
        raise ConfigError(
            f"--set takes {', '.join(SHARED_SECTIONS)} here, not {', '.join(strange)}; what else rescoring has "
            "to set has flags of its own, or stands in the file of --rescoring."
        )
    composed: Any = OmegaConf.to_container(compose_config(options.set), resolve=True, throw_on_missing=False)
    return {section: composed[section] for section in named}


def _print(found: Any, *, nbest: int) -> None:
    for row, hyp in zip(found.rows, found.hypotheses, strict=True):
        if hyp is None:
            continue
        print(f"{row.data.get('audio_filepath', row.audio)}\t{hyp.text}")
        for member in hyp.n_best[:nbest] if nbest else ():
            parts = " ".join(f"{name}={value:.2f}" for name, value in member.parts.items())
            print(f"    {member.score:9.2f}  {member.text}  ({parts})")


def _report(found: Any, *, output: str | None) -> None:
    """Totals, WER where every transcribed row has a reference, and failures, on the error stream."""
    pairs = [(row, hyp.text) for row, hyp in zip(found.rows, found.hypotheses, strict=True) if hyp is not None]
    lines = [
        f"{len(pairs)} of {len(found.rows)} utterances, {found.audio_seconds / 60:.1f} min of audio in "
        f"{found.seconds:.1f} s: RTFx {found.rtfx:.1f}" + (f"; written to {output}" if output else "")
    ]
    if pairs and all(row.text for row, _ in pairs):
        from nemo_llm_feedback.core.types import Context
        from nemo_llm_feedback.evaluation.scoring import score_rows

        scores = score_rows([row for row, _ in pairs], [text for _, text in pairs], run_context=Context())
        lines.append(f"WER {scores.value('wer'):.1f} %, CER {scores.value('cer'):.1f} %")
    if found.failures:
        lines.append(f"{len(found.failures)} failed:")
        lines += [f"  {line}" for line in found.failures[:_MOST_LISTED]]
        more = len(found.failures) - _MOST_LISTED
        lines += [f"  … and {more} more"] if more > 0 else []
    print("\n".join(lines), file=sys.stderr)
