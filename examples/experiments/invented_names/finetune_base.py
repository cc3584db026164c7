"""Fine-tunes a shared base model on labelled synthetic *general* speech, in the voices of the sets.

The result is a starting point: a model that is better at everyday speech in these voices, so that more
of what it still gets wrong are the words of the domain. It is NeMo's own supervised training (Lightning, CTC loss).
The sentences are everyday commands and short read sentences of ../shared/data/text, without the `reserved_*` texts,
without barista and without any term of the domain.

    python examples/experiments/invented_names/finetune_base.py --steps 600

It resumes: spoken sentences are kept in --work, and so is the last checkpoint. README.md has base.nemo's commands.
"""

import argparse
import io
import json
import random
import re
import tarfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import soundfile as sf
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.collections.asr.models import ASRModel
from omegaconf import OmegaConf, open_dict
from on_demand import COMMANDS, HERE, SHARED, WORK
from speech import KNOWN_VOICES, SAMPLE_RATE, require_flite, synthesise

# What share of the sentences each text gives; commands weigh most, since the general test set is commands.
SHARES = "slurp_lm=0.25 nlu_ed_commands=0.2 snips_commands=0.15 taskmaster4_coffee_user=0.1 common_voice=0.3"


# The sentences that base.nemo has heard: seed, number and shares of its runs (README.md).
BASE_DRAWS = (
    (7, 4500, SHARES),
    (8, 8000, COMMANDS),
)


def general_sentences(
    shared: Path, *, seed: int, number: int, shares: Sequence[str], terms: Sequence[str], taken: Iterable[str] = ()
) -> list[str]:
    """Draw about `number` distinct sentences of 2 to 12 words: none reserved, none with a domain term.

    Args:
        shared: folder with `text/`.
        seed: of the draw.
        number: of sentences; fewer where a text has no more.
        shares: `TEXT=SHARE` each, how much of the draw comes from which text.
        terms: of the domain.
        taken: further sentences that shall not be drawn.
    """
    rng = random.Random(seed)
    out = set(taken)
    for path in sorted((shared / "text").glob("reserved_*.txt")):
        out.update(path.read_text().splitlines())
    chosen: list[str] = []
    for name, share in (item.split("=") for item in shares):
        lines = sorted(set((shared / "text" / f"{name}.txt").read_text().splitlines()) - out)
        fit = [
            line
            for line in lines
            if re.fullmatch(r"[a-z' ]+", line)
            and 2 <= len(line.split()) <= 12
            and not any(f" {term} " in f" {line} " for term in terms)
        ]
        drawn = rng.sample(fit, min(len(fit), round(number * float(share))))
        chosen += drawn
        out.update(drawn)
    rng.shuffle(chosen)
    return chosen


def speak(sentences: list[str], folder: Path, *, name: str, seed: int, voices: Sequence[str]) -> Path:
    """Speak the sentences in turn by the voices (16-bit WAV) and write their manifest; spoken ones are kept.

    Args:
        sentences: to speak.
        folder: for `wav/` and the manifest.
        name: of the manifest, and of the files where it is not `train`.
        seed: of the variation.
        voices: of flite, taken in turn.
    """
    require_flite()
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    prefix = "" if name == "train" else f"{name}_"

    def row(index: int) -> str:
        text, voice = sentences[index], voices[index % len(voices)]
        path = folder / "wav" / f"{prefix}{index:05d}_{voice}.wav"
        if not path.exists():
            samples = synthesise(text, voice=voice, rng=random.Random(f"{seed}/{prefix}{index}"))
            part = path.with_suffix(".part")
            sf.write(part, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
            part.rename(path)
        duration = sf.info(path).duration
        return json.dumps({"audio_filepath": str(path.resolve()), "duration": duration, "text": text})

    first = [row(index) for index in range(min(1, len(sentences)))]  # soundfile makes its C types, one thread alone
    with ThreadPoolExecutor(max_workers=2) as pool:
        lines = first + list(pool.map(row, range(len(first), len(sentences))))
    manifest = folder / f"{name}.json"
    manifest.write_text("\n".join(lines) + "\n")
    hours = sum(json.loads(line)["duration"] for line in lines) / 3600
    print(f"spoken: {name}, {len(lines)} sentences, {hours:.2f} h", flush=True)
    return manifest


def speak_all(args: argparse.Namespace) -> Path:
    """The training speech of the run and, with `--aside`, speech like it that no base has heard; gives the former."""
    terms = (args.data / "terms.txt").read_text().splitlines()
    draw = partial(general_sentences, args.shared, terms=terms)
    without = [json.loads(line)["text"] for path in args.without for line in path.read_text().splitlines()]
    train = draw(seed=args.seed, number=args.sentences, shares=args.shares, taken=without)
    manifest = speak(train, args.work, name="train", seed=args.seed, voices=args.voices)
    if args.aside:
        heard = [
            text
            for seed, number, shares in BASE_DRAWS
            for text in draw(seed=seed, number=number, shares=shares.split(" "))
        ]
        aside = draw(seed=args.seed, number=args.aside, shares=args.shares, taken=[*without, *heard, *train])
        speak(aside, args.work, name="aside", seed=args.seed, voices=args.voices)
    return manifest


def greedy_wer(model: ASRModel, manifest: Path) -> float:
    """Word error rate in percent of greedy decoding on a manifest with text."""
    from nemo.collections.asr.metrics.wer import word_error_rate

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    model.eval()
    with torch.inference_mode():
        files = [str(manifest.parent / row["audio_filepath"]) for row in rows]
        hypotheses = [h.text for h in model.transcribe(files, batch_size=16, verbose=False)]
    return 100 * word_error_rate(hypotheses=hypotheses, references=[row["text"] for row in rows])


def train(model: ASRModel, manifest: Path, args: argparse.Namespace) -> None:
    """Run NeMo's supervised training for `args.steps` updates or `args.minutes`, resuming from the last checkpoint."""
    data = {
        "manifest_filepath": [str(path) for path in (manifest, *args.also)],
        "sample_rate": SAMPLE_RATE,
        "batch_size": args.batch_size,
        "shuffle": True,
        "num_workers": 0,
    }
    if args.bucketing:
        # Half of a batch drawn by chance is padding.
        data |= {"use_lhotse": True, "use_bucketing": True, "num_buckets": 12, "bucket_buffer_size": 6000}
        data |= {"concurrent_bucketing": False}  # its thread would keep the process from ending
    optim = {
        "name": "adamw",
        "lr": args.lr,
        "betas": [0.9, 0.98],
        "weight_decay": 1e-3,
        "sched": {"name": "CosineAnnealing", "warmup_steps": 100, "min_lr": args.lr / 50, "max_steps": args.steps},
    }
    saver = ModelCheckpoint(args.work / "ckpt", save_last=True, every_n_train_steps=100, save_top_k=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=args.precision,
        max_steps=args.steps,
        max_time={"minutes": args.minutes},
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    if args.freeze_subsampling:
        # The strided convolutions take a third of a step and know nothing of words.
        model.encoder.pre_encode.requires_grad_(False)
    if args.no_augment:
        model.spec_augmentation = None
    model.set_trainer(trainer)
    model.setup_training_data(OmegaConf.create(data))
    model.setup_optimization(OmegaConf.create(optim))
    with open_dict(model.cfg):
        model.cfg.optim = optim
    last = args.work / "ckpt" / "last.ckpt"
    start = time.time()
    trainer.fit(model, ckpt_path=str(last) if last.exists() else None)
    print(f"trained to update {trainer.global_step} in {time.time() - start:.0f} s", flush=True)


def halve(nemo_file: Path) -> None:
    """Rewrite a .nemo with its floating-point weights in fp16 (stock NeMo restores them into fp32 parameters)."""
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(nemo_file) as tar:
        for info in tar.getmembers():
            if info.isfile():
                body = tar.extractfile(info)
                if body is None:
                    raise OSError(f"{nemo_file}: member {info.name} cannot be read")
                members.append((info, body.read()))
    with tarfile.open(nemo_file, "w") as tar:
        for info, body in members:
            if info.name.endswith("model_weights.ckpt"):
                state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
                buffer = io.BytesIO()
                torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, buffer)
                body = buffer.getvalue()
                info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def main() -> None:
    """Speak, train, export in fp16, and print the general and domain error rates before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=SHARED.parent / "checkpoints" / "ctc.nemo")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with text/")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="what make_data.py wrote")
    parser.add_argument("--work", type=Path, default=WORK / "base", help="spoken sentences and checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "base.nemo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--sentences", type=int, default=4500)
    parser.add_argument("--aside", type=int, default=0, help="sentences spoken like the others and not trained on")
    parser.add_argument("--shares", nargs="+", default=SHARES.split(" "), metavar="TEXT=SHARE")
    parser.add_argument("--voices", nargs="+", default=list(KNOWN_VOICES), help="taken in turn")
    parser.add_argument("--without", nargs="*", type=Path, default=[], help="manifests whose sentences are not spoken")
    parser.add_argument("--also", nargs="*", type=Path, default=[], help="more manifests to train on")
    parser.add_argument("--speak-only", action="store_true", help="make the speech and stop")
    parser.add_argument("--steps", type=int, default=1200, help="updates in all; the schedule ends there")
    parser.add_argument("--minutes", type=int, default=60, help="stop after this many minutes of training")
    parser.add_argument("--bucketing", action="store_true", help="sentences of like length in a batch")
    parser.add_argument("--precision", default="32-true", help="Lightning's, e.g. bf16-mixed")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--no-augment", action="store_true", help="train without SpecAugment")
    parser.add_argument("--freeze-subsampling", action="store_true", help="leave the strided convolutions as they are")
    args = parser.parse_args()
    pl.seed_everything(args.seed)
    manifest = speak_all(args)
    if args.speak_only:
        return
    model = ASRModel.restore_from(args.base, map_location="cpu")
    tests = [args.data / f"{name}.json" for name in ("general_dev", "dev")]
    print("greedy WER before:", {test.stem: round(greedy_wer(model, test), 1) for test in tests}, flush=True)
    train(model, manifest, args)
    with open_dict(model.cfg):
        model.cfg.train_ds.manifest_filepath = None  # a path of this machine has no place in the file
    model.save_to(str(args.out))
    halve(args.out)
    model = ASRModel.restore_from(args.out, map_location="cpu")
    print("greedy WER after:", {test.stem: round(greedy_wer(model, test), 1) for test in tests}, flush=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
