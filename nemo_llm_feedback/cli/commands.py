"""The commands of the command line: their flags, and the call of the job that does the work.

A command is a function: its parameters are the flags (shared ones stand in ``cli.options``), its docstring is the
help, which the examples end, and it returns the exit status. Nothing heavy is imported before a job runs.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt

from nemo_llm_feedback.cli import options as flags
from nemo_llm_feedback.core.console import quiet
from nemo_llm_feedback.core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_llm_feedback.cli.jobs.transcribe import Transcripts


def adapt(
    *overrides: str,
    options: flags.AdaptOptions = flags.AdaptOptions(),
    config_name: str = "adapt",
    config_dir: str | None = None,
    show_config: bool = False,
) -> int:
    r"""Adapts a checkpoint to unlabeled audio with an LLM's feedback (Hydra settings).

    Writes a plain .nemo. NeMo's sections keep NeMo's keys. What every run needs, as flags or as keys:

      --base FILE.nemo|NAME              init_from_nemo_model= or init_from_pretrained_model=
      --manifest M.json                  model.train_ds.manifest_filepath=
      --description "…" --terms-file F   context.description= context.terms_file=
      --llm Qwen/Qwen2.5-7B-Instruct     llm.model= (folder, hub id or GGUF file)

    Often used:

      model.validation_ds.manifest_filepath=dev.json    labelled, for before/after
      objective=distill|mwer|grpo|gspo|dpo|reinforce|self_training
      llm=nf4|int8|full    trainer=auto|cpu|gpu    trainer.max_steps=200
      model.optim.lr=1e-4    model.train_ds.use_lhotse=true
      feedback.use_text=false    output=adapted.nemo    runs=3

    Every key with its default: --show-config; keys explained: docs/reference/configuration.md

    Args:
        overrides: settings, KEY=VALUE; flags win over them
        options: the settings that are given most often
        config_name: configuration to start from
        config_dir: folder of your configurations, searched first
        show_config: print the composed configuration and stop (Hydra's --cfg job)

    Examples:
      nemo-llm-feedback adapt --base base.nemo --manifest calls.json \
          --llm Qwen/Qwen2.5-7B-Instruct \
          --description "an order at a coffee shop" --terms-file menu.json \
          --output adapted.nemo
      nemo-llm-feedback adapt --base base.nemo \
          --manifest calls.json general.json --validation dev.json \
          --llm Qwen/Qwen2.5-7B-Instruct \
          --description "an order at a coffee shop" \
          --terms-file menu.json trainer=gpu runs=3
    """
    cfg = flags.compose(flags.given(options), overrides, config_name=config_name, config_dir=config_dir)
    if show_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(cfg))
        return 0
    with quiet(verbose=cfg.verbose is True):
        from nemo.utils.get_rank import is_global_rank_zero

        from nemo_llm_feedback.cli.jobs.adapt import AdaptResult, adapt_runs, averaged_text, summary
    result = adapt_runs(cfg)
    if is_global_rank_zero():
        print(summary(result) if isinstance(result, AdaptResult) else averaged_text(result))
    return 0


def prepare(
    folder: str,
    *,
    output: Annotated[str, flags.Output],
    hypotheses: str | None = None,
    source: str | None = None,
    segmenting: flags.Segmenting = flags.Segmenting(),
    preview: NonNegativeInt = 5,
) -> int:
    r"""Makes an unlabeled manifest of long recordings by voice activity, or joins other systems' transcripts onto one.

    Args:
        folder: folder of recordings, searched with its sub-folders, or one file; with --hypotheses a manifest
        output: the manifest to write
        hypotheses: what another recogniser wrote: NeMo manifest, JSON, text lines or folder of .txt, joined by path
        source: name of that recogniser; default: of its file
        segmenting: how recordings are cut
        preview: segments to show

    Examples:
      nemo-llm-feedback prepare recordings/ --output calls.json
      nemo-llm-feedback prepare meeting.m4a --output meeting.json \
          --max-duration 10
    """
    if hypotheses is not None:
        from nemo_llm_feedback.cli.jobs.hypotheses import join

        print(join(folder, hypotheses, out=output, source=source))
        return 0
    if source is not None:
        raise ConfigError("--source names the recogniser of --hypotheses FILE; add it.")
    from nemo_llm_feedback.cli.jobs import prepare as job

    print(job.summary(job.prepare(folder, out=output, settings=segmenting), preview=preview))
    return 0


def score(
    model: Annotated[str, flags.Models],
    *,
    manifest: Annotated[str, flags.Manifest],
    utterances: NonNegativeInt = 10,
    judge: flags.JudgeOptions = flags.JudgeOptions(),
    samples: NonNegativeInt | None = None,
    head: flags.HeadName | None = None,
    device: flags.Device = "auto",
    batch_size: PositiveInt = 16,
    cache: str | None = None,
    show: NonNegativeInt | None = None,
    members: PositiveInt = 8,
    compare_quantization: Literal["nf4", "int8", "none"] | None = None,
    tune: bool = False,
    json: flags.JsonFile = None,
) -> int:
    r"""Shows N-best lists with their rewards; picks weights, compares quantisations.

    Args:
        model: .nemo file or pretrained name
        manifest: NeMo manifest, with text or without
        utterances: rows that are taken, spread evenly over the manifest; 0 = all
        judge: what judges hypotheses
        samples: hypotheses that are sampled from the model
        head: head of a hybrid model
        device: where the models run
        batch_size: utterances per batch of the recogniser
        cache: file or folder of LLM scores: those of earlier runs are read, new ones added
        show: utterances printed in full; default: all that are scored
        members: members printed per utterance, best first
        compare_quantization: also judge by the LLM in this quantisation, and compare
        tune: pick reward.alpha and reward.beta: by WER where rows have text, else by the spread as adapt does
        json: write everything here too, as JSON

    Examples:
      nemo-llm-feedback score base.nemo --manifest calls.json \
          --llm Qwen/Qwen2.5-7B-Instruct \
          --description "an order at a coffee shop" --terms-file menu.json
      nemo-llm-feedback score base.nemo --manifest dev.json \
          --llm Qwen/Qwen2.5-7B-Instruct \
          --description "an order at a coffee shop" --terms-file menu.json \
          --tune --utterances 0 --show 0
    """
    from nemo_llm_feedback.evaluation.records import check_writable, write_record

    if json:
        check_writable(json, inputs=(model, manifest, judge.llm, judge.terms_file, cache))
    cfg = flags.compose(flags.given(judge, samples=samples, head=head, device=device, cache=cache))
    with quiet():
        from nemo_llm_feedback.cli.jobs import score as job
    probe = job.NBestProbe(model, manifest, cfg, utterances=utterances, batch_size=batch_size, device=device)
    report = job.score(probe, other=compare_quantization, tune=tune)
    if json:
        write_record(json, job.report_record(report))
    print(job.report_text(report, show=len(report.rows) if show is None else show, members=members))
    return 0


def transcribe(
    model: Annotated[str, flags.Models],
    audio: Annotated[tuple[str, ...], Parameter(name=("--audio", "--audio-dir"))] = (),
    *,
    manifest: Annotated[str | None, flags.Manifest] = None,
    audio_type: str | None = None,
    output: Annotated[str | None, flags.Output] = None,
    batch_size: PositiveInt = 16,
    head: flags.HeadName = "auto",
    timestamps: bool = False,
    device: flags.Device = "auto",
    nbest: NonNegativeInt = 0,
    add_to: str | None = None,
    source: str | None = None,
    choice: flags.RescoringFlags = flags.RescoringFlags(),
) -> int:
    r"""Transcribes audio, with LLM rescoring if asked for.

    Args:
        model: .nemo file or pretrained name
        audio: audio files and folders
        manifest: a NeMo manifest instead of AUDIO
        audio_type: comma-separated suffixes to take from folders; default: all known
        output: manifest to write; default: print the transcripts
        batch_size: utterances per batch
        head: head of a hybrid model
        timestamps: word and segment times, in seconds
        device: where the recogniser runs
        nbest: hypotheses to write per utterance, with all score parts
        add_to: manifest whose rows are transcribed, and get the N-best as `hypotheses`, in place or into --output
        source: name of the model in them; default: of its file
        choice: rescoring

    Examples:
      nemo-llm-feedback transcribe adapted.nemo audio/ --output out.json
      nemo-llm-feedback transcribe base.nemo audio/ --rescore \
          --llm Qwen/Qwen2.5-7B-Instruct \
          --description "an order at a coffee shop" --terms-file menu.json \
          --nbest 5 --output out.json
    """
    from nemo_llm_feedback.cli.jobs.hypotheses import named_source
    from nemo_llm_feedback.evaluation.records import check_writable

    target = output or add_to
    if output and os.path.realpath(output) in map(os.path.realpath, filter(None, (manifest, *audio))):
        raise ConfigError(f"--output {output} is what is transcribed: give another file, or --add-to {output}.")
    name = named_source(source, model) if add_to else ""
    if (source and not add_to) or (add_to and (audio or manifest)):
        raise ConfigError(
            "--add-to MANIFEST takes its rows, without AUDIO and --manifest, and --source names the model."
        )
    nbest = nbest or (_ADDED if add_to else 0)
    tree = flags.rescoring_tree(choice, nbest, own_texts=bool(add_to))
    place = flags.torch_device(device)
    with quiet():
        from nemo_llm_feedback.cli.jobs import transcribe as job

        types = audio_type.split(",") if audio_type else job.AUDIO_TYPES
        rows = job.find_rows(audio, manifest=add_to or manifest, audio_types=types)
    if target:
        judge = choice.judge
        check_writable(target, inputs=(model, judge.llm, judge.terms_file, *(row.audio for row in rows)))
    found = job.transcribe_rows(
        model,
        rows,
        batch_size=batch_size,
        head=flags.head_of(head),
        timestamps=timestamps,
        device=place,
        rescoring=tree,
    )
    written = _give(found, output=output, add_to=add_to, source=name, nbest=nbest)
    print(job.summary(found, written=written), file=sys.stderr)
    return 1 if found.failures else 0


def evaluate(
    models: Annotated[tuple[str, ...], Parameter(name=("--models", *flags.Models.name))] = (),
    *,
    manifest: Annotated[str | None, flags.Manifest] = None,
    predictions: tuple[str, ...] = (),
    head: flags.HeadName = "auto",
    batch_size: PositiveInt = 16,
    device: flags.Device = "auto",
    oracle: NonNegativeInt = 0,
    scoring: flags.ScoringFlags = flags.ScoringFlags(),
    b_wer: bool | str = False,
    json: flags.JsonFile = None,
    report: str | None = None,
    no_audio: flags.NoAudio = False,
) -> int:
    r"""Scores checkpoints or ready transcripts on a labelled manifest.

    Args:
        models: .nemo files or pretrained names; the first system is the base of the comparison
        manifest: NeMo manifest with text and, optionally, entities and context
        predictions: JSON Lines with audio_filepath and pred_text
        head: head of a hybrid model
        batch_size: utterances per batch of the recogniser
        device: where the models run
        oracle: also the oracle WER of each model's N-best; the value is its beam size
        scoring: how transcripts are scored
        b_wer: also B-WER; the value is the manifest key of each utterance's word list (entities if left out)
        json: write everything here too, as JSON
        report: write the report here, as HTML
        no_audio: no audio in the page

    Examples:
      nemo-llm-feedback evaluate base.nemo adapted.nemo --manifest dev.json \
          --terms-file menu.json --report report.html
      nemo-llm-feedback evaluate --predictions ours.json theirs.json \
          --manifest dev.json --group-by speaker
    """
    from nemo_llm_feedback.cli.jobs import evaluate as job
    from nemo_llm_feedback.evaluation.records import check_writable, write_record

    for path in filter(None, (json, report)):
        check_writable(path, inputs=(*models, *predictions, manifest, scoring.terms_file))
    place = flags.torch_device(device) if models else "cpu"
    found = job.evaluate(
        models,
        manifest,
        predictions=predictions,
        head=flags.head_of(head),
        batch_size=batch_size,
        oracle=oracle,
        device=place,
        bias_key="entities" if b_wer is True else b_wer or None,
        **vars(scoring),
    )
    if json:
        write_record(json, job.evaluation_record(found))
    if report:
        from nemo_llm_feedback.evaluation.report import evaluation_report, write_report

        page = evaluation_report(found.comparison, left_out=found.left_out)
        report = str(write_report(page, report, audio=not no_audio))
    print(job.evaluation_text(found) + (f"\n\nreport: {report}" if report else ""))
    return 0


def report(
    run_dir: str, *, output: Annotated[str | None, flags.Output] = None, no_audio: flags.NoAudio = False
) -> int:
    """Writes the report of a run again.

    Args:
        run_dir: folder of an adapt run; of one that goes on, its curves are shown
        output: the page to write; default: report.html in the folder
        no_audio: no audio in the page

    Examples:
      nemo-llm-feedback report nemo_experiments/adapted/version_0
      nemo-llm-feedback report nemo_experiments/adapted/version_0 --no-audio
    """
    from nemo_llm_feedback.cli.jobs import report as job

    print(job.report(run_dir, output=output, audio=not no_audio))
    return 0


def runs(folder: str, *, json: bool = False) -> int:
    """Lists the runs of a folder with their settings and results.

    Args:
        folder: exp_manager.exp_dir of the runs, or a folder above
        json: as a JSON list

    Examples:
      nemo-llm-feedback runs nemo_experiments
      nemo-llm-feedback runs nemo_experiments --json
    """
    from nemo_llm_feedback.cli.jobs import runs as job
    from nemo_llm_feedback.evaluation.records import to_json

    found = job.list_runs(folder)
    print(to_json([run.record() for run in found]) if json else job.runs_text(found))
    return 0


def export(
    checkpoint: tuple[str, ...],
    *,
    base: str | None = None,
    interpolation: float = 1.0,
    output: Annotated[str | None, flags.Output] = None,
    manifest: Annotated[str | None, flags.Manifest] = None,
    device: flags.Device = "auto",
    push_to_hub: str | None = None,
) -> int:
    r"""Turns a training checkpoint, or the average of several, into a plain .nemo.

    Args:
        checkpoint: a Lightning .ckpt of a run, or a .nemo; several, of runs from one base: the mean of their weights
        base: .nemo file or pretrained name that the run started from; of a .ckpt, if it has moved since
        interpolation: share of the way from the base's weights to the run's: above 0, to 1
        output: where to write; default: beside the checkpoint; needed for several
        manifest: labelled rows: before/after for the model card, which is written beside it
        device: where the rows of --manifest are transcribed
        push_to_hub: OWNER/NAME on the Hugging Face Hub, to upload the .nemo and its card; a new one is private

    Examples:
      nemo-llm-feedback export run1.nemo run2.nemo run3.nemo --output mean.nemo
      nemo-llm-feedback export mean.nemo --base base.nemo --interpolation 0.75 \
          --output nearer.nemo
    """
    from nemo_llm_feedback.cli.jobs import hub

    if push_to_hub:
        hub.check_login(push_to_hub)
    with quiet():
        from nemo_llm_feedback.cli.jobs import export as job
    place = flags.torch_device(device) if manifest else "cpu"
    nemo = job.export(
        checkpoint, base=base, output=output, manifest=manifest, interpolation=interpolation, device=place
    )
    print(nemo)
    if push_to_hub:
        print(hub.push_to_hub(nemo, push_to_hub))
    return 0


def _give(found: Transcripts, *, output: str | None, add_to: str | None, source: str, nbest: int) -> str:
    """Writes or prints transcripts; returns what the summary says of that."""
    from nemo_llm_feedback.cli.jobs import transcribe as job
    from nemo_llm_feedback.cli.jobs.hypotheses import add_hypotheses

    target = output or add_to
    if target and not found.worked:  # an earlier output is worth more than an empty one
        return f"; nothing is written to {target}"
    if add_to:
        print(add_hypotheses(add_to, job.nbest_texts(found, source=source, nbest=nbest), out=output or add_to))
    elif output:
        job.write_manifest(output, found, nbest=nbest)
    else:
        print(job.transcripts_text(found, nbest=nbest))
    return f"; written to {target}" if target else ""


_ADDED = 8  # hypotheses of another model per utterance
# In the order in which a user meets them.
COMMANDS = (prepare, score, adapt, transcribe, evaluate, report, runs, export)
