"""The runs job: lists the runs of a folder with the settings that differ, steps, state and results."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.run_folder import RESULT_FILE, RUN_FILE, SETTINGS_FILE, STEPS_FILE, in_use, read_steps
from nemo_llm_feedback.evaluation.records import Table

# Where a run writes does not make it another run.
_PLACES = ("exp_manager.", "output")
_SCORES = ("wer", "ewer")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: relative to the folder asked for.
        state: ``finished``, ``running`` or ``interrupted``.
        objective: name of the objective.
        steps: optimizer steps taken.
        max_steps: asked for.
        attempts: number of starts.
        started: time of the first start, UTC.
        settings: key → value of those that differ between the runs.
        result: what ``result.json`` has of it: ``learning_rate`` (the peak), ``alpha``, ``gain`` (held-out, of the
            kept weights), ``kept_step``, ``before`` and ``after`` (validation set → score → per cent), ``ended`` (why
            it ended early) and ``nemo``. Of a run that has not finished the rate and the largest gain so far.
    """

    folder: str
    state: str
    objective: str
    steps: int
    max_steps: int | None
    attempts: int
    started: str
    settings: dict[str, Any]
    result: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The run as plain data, with the result's values beside the others."""
        return {name: value for name, value in vars(self).items() if name != "result"} | self.result


def list_runs(folder: str | Path) -> list[Run]:
    """All runs in a folder and below it, oldest first.

    Args:
        folder: an ``exp_manager.exp_dir``, or a folder of such.

    Raises:
        ConfigError: no such folder, or no run in it.
    """
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the exp_manager.exp_dir of your runs.")
    # exp_manager moves the files of an earlier attempt into run_0, run_1 …; a kill may have left them there.
    # Other tools have files of this name; of a run ours says when it started.
    places = {path.parent for path in top.rglob(SETTINGS_FILE) if (path.parent / RUN_FILE).is_file()}
    places = {path.parent if path.name.startswith("run_") and path.parent in places else path for path in places}
    if not places:
        raise ConfigError(f"{folder} holds no run: {SETTINGS_FILE} is in none of its folders.")
    settings = {path: _flat(yaml.safe_load((path / SETTINGS_FILE).read_text(encoding="utf-8"))) for path in places}
    keys = sorted({key for run in settings.values() for key in run if not key.startswith(_PLACES)})
    differing = [key for key in keys if len({repr(run.get(key)) for run in settings.values()}) > 1]
    runs = [_run(top, path, found, differing) for path, found in settings.items()]
    return sorted(runs, key=lambda run: (run.started, run.folder))


def runs_text(runs: list[Run]) -> str:
    """The runs as text of 80 columns: a line per run, and below it scores and the settings that differ."""
    rows = []
    for run in runs:
        rate, alpha, gain = (run.result[name] for name in ("learning_rate", "alpha", "gain"))
        numbers = [None if value is None else f"{value:.3g}" for value in (rate, alpha)]
        shown = None if gain is None else f"{gain:+.2f}"
        rows.append([_short(run.folder, 22), run.objective, *numbers, shown, _kept(run), run.state])
    lines = [Table(["run", "objective", "rate", "alpha", "gain", "kept step", "state"], rows).to_text()]
    for run in runs:
        facts = [
            f"{name} {score} {before[score]:.2f} → {after[score]:.2f}"
            for name, before in run.result["before"].items()
            for score in _SCORES
            if score in before and score in (after := run.result["after"].get(name, {}))
        ]
        facts += [f"{k}={_short(v, 40)}" for k, v in run.settings.items() if not _is_usual(k, v, runs)]
        facts += [f"{100 * run.result['share']:.0f} % of the update"] if run.result["share"] < 1 else []
        facts += [f"kept generation {run.result['generation']}"] if run.result["generation"] > 1 else []
        facts += [f"ended early: {run.result['ended']}"] if run.result["ended"] else []
        lines += textwrap.wrap(f"{run.folder}: {', '.join(facts)}", 80, subsequent_indent="  ") if facts else []
    if any(run.state == "interrupted" for run in runs):
        lines.append("an interrupted run goes on when its command is given again")
    return "\n".join(lines)


def _run(top: Path, path: Path, settings: dict[str, Any], differing: list[str]) -> Run:
    steps, found = read_steps(path / STEPS_FILE), _read_json(path / RESULT_FILE)
    attempts = _read_json(path / RUN_FILE).get("attempts", [])
    rates = [settings.get("model.optim.lr"), *(line.get("lr") for line in steps)]
    so_far: dict[str, Any] = {
        "learning_rate": max((rate for rate in rates if rate is not None), default=None),
        "alpha": settings.get("reward.alpha"),
        "gain": max((line["held_out/gain"] for line in steps if "held_out/gain" in line), default=None),
    } | {"kept_step": None, "share": 1.0, "generation": 1, "before": {}, "after": {}, "ended": "", "nemo": None}
    return Run(
        folder=str(path.relative_to(top)),
        state="finished" if found else ("running" if in_use(path) else "interrupted"),
        objective=str(settings.get("objective.name", "")),
        steps=max((int(line["step"]) for line in steps), default=0),
        max_steps=settings.get("trainer.max_steps"),
        attempts=len(attempts),
        started=attempts[0]["started"] if attempts else "",
        settings={key: settings.get(key) for key in differing},
        result={name: found.get(name, value) for name, value in so_far.items()},
    )


def _is_usual(key: str, value: Any, runs: Sequence[Run]) -> bool:
    """Whether most of the runs have this value, so that only the others are told apart by theirs."""
    return 2 * sum(repr(run.settings[key]) == repr(value) for run in runs) > len(runs)


def _kept(run: Run) -> str:
    """The kept step of all steps, or the last one so far."""
    kept = run.result["kept_step"]
    step = run.steps if kept is None else kept
    return f"{step}/{run.max_steps}" if run.max_steps else str(step)


def _short(value: Any, width: int) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= width else "…" + text[1 - width :]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists are values."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
