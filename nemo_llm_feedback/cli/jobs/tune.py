"""The tune job: the one place that picks (α, β) of reward = α·LLM + w·ASR + β·length.

With transcripts: a grid over stored scores, judged by k-fold cross-validation. The value that is reported for the
choice is that of utterances which did not take part in choosing; the best cell of the grid flatters itself.

Without: α makes the LLM's say in a group so many times as large as the recogniser's (``scales.from_spread``), which is
what ``adapt`` does by itself where ``reward.alpha`` is null. The default, 2, is the smaller of what transcripts chose
on two dev sets; an equal say is more cautious, and costs fewer entity false alarms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_llm_feedback.cli.jobs.nbest_probe import Look, baseline, open_look
from nemo_llm_feedback.cli.options import ProbeOptions
from nemo_llm_feedback.core.config import RewardConfig
from nemo_llm_feedback.core.config.reward import BETA_PER_ALPHA
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.evaluation.metrics import COLUMNS, CorpusScores, find_metric, oracle
from nemo_llm_feedback.evaluation.rank_agreement import best_member
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.hypotheses.reward_scale import component_spread, from_spread

ALPHAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
BETAS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
METRICS = ("wer", "ewer", "false_alarms")
_DEFAULT = RewardConfig()


@dataclass(frozen=True)
class TuneOptions:
    """What there is to choose from, and how.

    Attributes:
        alphas, betas: the grid.
        metric: ``wer`` or ``ewer``, the one to lower; ties go to the other one, then to the smaller α and β.
        folds: of the cross-validation; at most the number of rows with text.
        factor: without labels, how many times the recogniser's say the LLM gets.
        use_text: False ignores transcripts.
        seed: of the folds.
    """

    alphas: tuple[float, ...] = ALPHAS
    betas: tuple[float, ...] = BETAS
    metric: str = "wer"
    folds: int = 5
    factor: float = _DEFAULT.spread_factor
    use_text: bool = True
    seed: int = 0

    def validate(self) -> list[str]:
        """Returns every fault of the values as a sentence."""
        faults = []
        for name in ("alphas", "betas"):
            values = getattr(self, name)
            if not values or any(not math.isfinite(v) or v < 0 for v in values):
                faults.append(f"--{name} must be finite numbers ≥ 0, got {values}.")
        if self.metric not in ("wer", "ewer"):
            faults.append(f"--metric must be wer or ewer, got {self.metric!r}.")
        if self.folds < 2:
            faults.append(f"--folds must be at least 2, got {self.folds}.")
        if not (math.isfinite(self.factor) and self.factor > 0):
            faults.append(f"--factor must be > 0, got {self.factor}.")
        return faults


Point = tuple[float, float]  # (α, β)


@dataclass(frozen=True)
class Grid:
    """The labelled way.

    Attributes:
        points: metric → value in its unit at every (α, β), over all rows with text.
        cross_validated: metric → value over all rows, each with the (α, β) chosen on the other folds.
        fold_choices: (α, β) that each fold's others chose; far apart means that the data do not decide.
        greedy, oracle, default: metric → value of the recogniser alone, of the best members, and at the default α, β.
        rows: with text.
        folds: of the cross-validation; 0 where there were too few rows for it.
    """

    points: dict[Point, dict[str, float]]
    cross_validated: dict[str, float]
    fold_choices: tuple[Point, ...]
    greedy: dict[str, float]
    oracle: dict[str, float]
    default: dict[str, float]
    rows: int
    folds: int


@dataclass(frozen=True)
class Tuned:
    """The choice.

    Attributes:
        alpha, beta: to paste into a run.
        spread: component → mean within-group standard deviation, in its unit.
        grid: how it was chosen from labels; None without.
        options: what there was to choose from.
        rows: looked at.
        members: mean group size.
        asr_weight: w, as the configuration has it.
        llm: one line on the LLM and its cache.
    """

    alpha: float
    beta: float
    spread: dict[str, float]
    grid: Grid | None
    options: TuneOptions
    rows: int
    members: float
    asr_weight: float
    llm: str

    @property
    def line(self) -> str:
        """The settings to paste."""
        return f"reward.alpha={self.alpha:g} reward.beta={self.beta:g}"


def tune(options: ProbeOptions, choice: TuneOptions) -> Tuned:
    """Scores the groups of some rows once and picks (α, β).

    Args:
        options: the flags.
        choice: what there is to choose from.

    Raises:
        FeedbackError: unusable input, before any model is loaded; or no group that tells anything.
    """
    faults = choice.validate()
    if faults:
        raise ConfigError(" ".join(faults))
    look = open_look(options)
    if look.config.reward.name != "llm" or look.config.llm is None:
        raise ConfigError(f"tune picks the weights of reward.name=llm, not of {look.config.reward.name}.")
    labelled = [i for i, row in enumerate(look.rows) if row.text] if choice.use_text else []
    if labelled and choice.metric == "ewer" and not any(look.rows[i].data.get("entities") for i in labelled):
        raise ConfigError("--metric ewer needs rows with `entities`; use --metric wer.")
    judge = look.open_judge()
    groups = look.make_groups(look.load_model(), judge)
    parts: dict[str, list[float]] = {}
    for name in groups[0].parts:
        rows = [[v for v in g.parts[name] if v == v and abs(v) < float("inf")] for g in groups]
        parts[name] = [float(np.std(row)) for row in rows if len(row) > 1]
    spread = component_spread(parts)
    weight = look.config.reward.asr_weight
    grid = None
    if labelled:
        grid = labelled_grid(look, [groups[i] for i in labelled], labelled, choice, asr_weight=weight)
        alpha, beta = best_point(grid.points, choice.metric)
    else:
        alpha, beta = from_spread(spread, factor=choice.factor, asr_weight=weight)
    return Tuned(
        alpha=alpha,
        beta=beta,
        spread=spread,
        grid=grid,
        options=choice,
        rows=len(look.rows),
        members=sum(len(g.group) for g in groups) / len(groups),
        asr_weight=weight,
        llm=judge.llm_line(judge.hit_rate),
    )


# ---------------------------------------------------------------- with labels


def choose(scored: ScoredGroup, *, alpha: float, beta: float, asr_weight: float = 1.0) -> int:
    """The member with the largest α·LLM + w·ASR + β·length; the recogniser's own where none is judged."""
    parts = scored.parts
    asr = parts.get("asr") or [0.0] * len(scored.group)
    rewards = [
        alpha * llm + (asr_weight * a if asr_weight else 0.0) + beta * length
        for llm, a, length in zip(parts["llm"], asr, parts["length"], strict=True)
    ]
    return best_member(rewards, otherwise=baseline(scored))


def labelled_grid(
    look: Look, groups: Sequence[ScoredGroup], labelled: Sequence[int], choice: TuneOptions, *, asr_weight: float
) -> Grid:
    """Evaluates the grid on rows with text, and cross-validates the choosing itself.

    Args:
        look: whose rows have the text.
        groups: of those rows.
        labelled: their positions among the look's rows.
        choice: the grid and the folds.
        asr_weight: w.
    """
    rows = [look.rows[i] for i in labelled]

    def scores(picks: Sequence[int]) -> CorpusScores:
        return score_rows(
            rows,
            [g.group.texts[n] for g, n in zip(groups, picks, strict=True)],
            run_context=look.settings.run_context,
            normalizer=look.settings.normalizer,
        )

    points = list(itertools.product(sorted(set(choice.alphas)), sorted(set(choice.betas))))
    # One table of counts a grid point; identical choices, which are many, are counted once.
    known: dict[tuple[int, ...], NDArray[np.int64]] = {}
    tables: dict[Point, NDArray[np.int64]] = {}
    for alpha, beta in points:
        picks = tuple(choose(g, alpha=alpha, beta=beta, asr_weight=asr_weight) for g in groups)
        if picks not in known:
            known[picks] = scores(picks).counts
        tables[alpha, beta] = known[picks]
    folds = min(choice.folds, len(rows))
    crossed, fold_choices = _cross_validate(tables, choice, folds)
    best = oracle([r.text for r in rows], [g.group.texts for g in groups], normalize=_normalizer(look)).best
    alpha, beta = _DEFAULT.weights
    default = [choose(g, alpha=alpha, beta=beta, asr_weight=asr_weight) for g in groups]
    return Grid(
        points={point: _values(table) for point, table in tables.items()},
        cross_validated=_values(crossed) if crossed is not None else dict.fromkeys(METRICS, math.nan),
        fold_choices=fold_choices,
        greedy=_values(scores([baseline(g) for g in groups]).counts),
        oracle=_values(scores(best).counts),
        default=_values(scores(default).counts),
        rows=len(rows),
        folds=folds if crossed is not None else 0,
    )


def _cross_validate(
    tables: dict[Point, NDArray[np.int64]], choice: TuneOptions, folds: int
) -> tuple[NDArray[np.int64] | None, tuple[Point, ...]]:
    """Counts [U, columns] of every row under the point that the other folds chose; None for a single row."""
    first = next(iter(tables.values()))
    if folds < 2:
        return None, ()
    fold_of = np.random.default_rng(choice.seed).permutation(len(first)) % folds
    held_out, chosen = np.zeros_like(first), []
    for fold in range(folds):
        inside = fold_of == fold
        point = best_point({p: _values(table[~inside]) for p, table in tables.items()}, choice.metric)
        held_out[inside] = tables[point][inside]
        chosen.append(point)
    return held_out, tuple(chosen)


def best_point(points: dict[Point, dict[str, float]], metric: str) -> Point:
    """The point with the lowest metric; of equals the one with the lower other metric, then the smaller α and β."""
    other = "ewer" if metric == "wer" else "wer"

    def key(point: Point) -> tuple[float, ...]:
        return tuple(_or_high(points[point][name]) for name in (metric, other)) + point

    return min(points, key=key)


def _or_high(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _values(counts: NDArray[np.int64]) -> dict[str, float]:
    """Pooled metrics of a table of counts, in their units; NaN where nothing counts to the denominator."""
    totals = dict(zip(COLUMNS, counts.sum(axis=0).tolist(), strict=True))
    found = {}
    for name in METRICS:
        metric = find_metric(name)
        below = totals[metric.denominator]
        found[name] = metric.scale * totals[metric.numerator] / below if below else math.nan
    return found


def _normalizer(look: Look) -> Any:
    return get_normalizer(look.settings.normalizer)


# ---------------------------------------------------------------- as text and JSON


def tuned_text(found: Tuned) -> str:
    """What was done, what it gave, and the line to paste last."""
    lines = [
        f"{found.rows} rows, {found.members:.1f} members a group",
        f"LLM                {found.llm}",
        "spread in a group  " + ", ".join(f"{name} {value:.2f}" for name, value in found.spread.items()),
    ]
    if found.grid is None:
        factor, asr = found.options.factor, found.asr_weight * found.spread["asr"]
        return "\n".join(
            [
                *lines,
                "",
                f"No transcripts were used. α makes the mean within-group spread of α·LLM {factor:g} times that of",
                f"the recogniser's score ({asr:.2f} nat); β = {BETA_PER_ALPHA:g}·α, the default's proportion.",
                "This balances the two voices; it does not know which of them is right. On two dev sets transcripts",
                "chose a factor of 2 and of 2.5 (--factor); a smaller one costs fewer entity false alarms.",
                "",
                found.line,
            ]
        )
    return "\n".join([*lines, "", *_grid_lines(found.grid, found), "", found.line])


def _grid_lines(grid: Grid, found: Tuned) -> list[str]:
    metric = found.options.metric
    betas = sorted({beta for _, beta in grid.points})
    lines = [f"{metric.upper()} in % over {grid.rows} rows with text (what the plot shows; choosing on it flatters)"]
    lines.append("  α \\ β " + "".join(f"{beta:8g}" for beta in betas))
    for alpha in sorted({alpha for alpha, _ in grid.points}):
        cells = "".join(f"{grid.points[alpha, beta][metric]:8.1f}" for beta in betas)
        lines.append(f"{alpha:6g}  {cells}")
    lines += ["", f"{'':34}{'WER':>7}{'EWER':>7}  false alarms per 100"]
    for name, values in (
        ("greedy", grid.greedy),
        ("α {:g}, β {:g}".format(*_DEFAULT.weights), grid.default),
        (f"chosen, cross-validated ({grid.folds} folds)", grid.cross_validated),
        ("chosen, on its own rows", grid.points[found.alpha, found.beta]),
        ("oracle", grid.oracle),
    ):
        cells = "".join(f"{_number(values[m]):>7}" for m in ("wer", "ewer"))
        lines.append(f"{name:34}{cells}  {_number(values['false_alarms']):>5}")
    if grid.fold_choices:
        chosen = ", ".join(f"({alpha:g}, {beta:g})" for alpha, beta in grid.fold_choices)
        lines.append(f"the folds chose (α, β) = {chosen}")
    if found.alpha in (max(found.options.alphas), 0.0) or found.beta == max(found.options.betas):
        lines.append("The choice is at the edge of the grid: widen it with --alphas and --betas, or doubt it.")
    return lines


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "–"


def tuned_json(found: Tuned) -> dict[str, Any]:
    """Everything as plain data."""
    plain = asdict(found)
    if found.grid is not None:
        plain["grid"]["points"] = [
            {"alpha": alpha, "beta": beta, **values} for (alpha, beta), values in found.grid.points.items()
        ]
    return plain | {"line": found.line}
