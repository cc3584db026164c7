"""Fine-tunes a shared base model on labelled synthetic *general* speech, in the voices of the quickstart.

The result is the quickstart's starting point: a model that is better at everyday speech in these voices, so that more
of what it still gets wrong are the words of the domain. It is NeMo's own supervised training (Lightning, CTC loss).
The sentences are everyday commands and short read sentences of ../shared/data/text, without the `reserved_*` texts,
without barista and without any term of the domain.

    python examples/quickstart/finetune_base.py --steps 600

It resumes: spoken sentences are kept in --work, and so is the last checkpoint. README.md has base.nemo's commands.
"""

import argparse
import io
import json
import random
import re
import tarfile
import time
from pathlib import Path

import lightning.pytorch as pl
import soundfile as sf
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from make_data import HERE, SHARED
from nemo.collections.asr.models import ASRModel
from omegaconf import OmegaConf, open_dict
from speech import KNOWN_VOICES, SAMPLE_RATE, require_flite, synthesise

# What share of the sentences each text gives; commands weigh most, since the general test set is commands.
SHARES = "slurp_lm=0.25 nlu_ed_commands=0.2 snips_commands=0.15 taskmaster4_coffee_user=0.1 common_voice=0.3"


def general_sentences(args: argparse.Namespace, *, terms: list[str]) -> list[str]:
    """Draw about `args.sentences` distinct sentences of 2 to 12 words: none reserved, none with a domain term."""
    rng = random.Random(args.seed)
    taken: set[str] = set()
    for path in sorted((args.shared / "text").glob("reserved_*.txt")):
        taken.update(path.read_text().splitlines())
    chosen: list[str] = []
    for name, share in (item.split("=") for item in args.shares):
        lines = sorted(set((args.shared / "text" / f"{name}.txt").read_text().splitlines()) - taken)
        fit = [
            line
            for line in lines
            if re.fullmatch(r"[a-z' ]+", line)
            and 2 <= len(line.split()) <= 12
            and not any(f" {term} " in f" {line} " for term in terms)
        ]
        drawn = rng.sample(fit, min(len(fit), round(args.sentences * float(share))))
        chosen += drawn
        taken.update(drawn)
    rng.shuffle(chosen)
    return chosen


def speak(sentences: list[str], args: argparse.Namespace) -> Path:
    """Speak the sentences in turn by `args.voices` (16-bit WAV) and write their manifest; spoken ones are kept."""
    require_flite()
    (args.work / "wav").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, text in enumerate(sentences):
        voice = args.voices[index % len(args.voices)]
        path = args.work / "wav" / f"{index:05d}_{voice}.wav"
        if not path.exists():
            samples = synthesise(text, voice=voice, rng=random.Random(f"{args.seed}/{index}"))
            partial = path.with_suffix(".part")
            sf.write(partial, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
            partial.rename(path)
        row = {"audio_filepath": str(path.resolve()), "duration": sf.info(path).duration, "text": text}
        lines.append(json.dumps(row))
    manifest = args.work / "train.json"
    manifest.write_text("\n".join(lines) + "\n")
    hours = sum(json.loads(line)["duration"] for line in lines) / 3600
    print(f"spoken: {len(lines)} sentences, {hours:.2f} h", flush=True)
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
    parser.add_argument("--work", type=Path, default=HERE / "work" / "base", help="spoken sentences and checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "base.nemo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--sentences", type=int, default=4500)
    parser.add_argument("--shares", nargs="+", default=SHARES.split(" "), metavar="TEXT=SHARE")
    parser.add_argument("--voices", nargs="+", default=list(KNOWN_VOICES), help="taken in turn")
    parser.add_argument("--also", nargs="*", type=Path, default=[], help="more manifests to train on")
    parser.add_argument("--speak-only", action="store_true", help="make the speech and stop")
    parser.add_argument("--steps", type=int, default=1200, help="updates in all; the schedule ends there")
    parser.add_argument("--minutes", type=int, default=60, help="stop after this many minutes of training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--no-augment", action="store_true", help="train without SpecAugment")
    parser.add_argument("--freeze-subsampling", action="store_true", help="leave the strided convolutions as they are")
    args = parser.parse_args()
    pl.seed_everything(args.seed)
    terms = (args.data / "terms.txt").read_text().splitlines()
    manifest = speak(general_sentences(args, terms=terms), args)
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
