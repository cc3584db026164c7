"""The score job: what the reward says of some N-best lists, before anything is trained on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nemo_llm_feedback.cli.jobs.nbest_probe import Look, baseline, open_look
from nemo_llm_feedback.cli.options import ProbeOptions
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import pad_groups
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import CorpusScores, oracle
from nemo_llm_feedback.evaluation.rank_agreement import RankAgreement, best_member, rank_agreement
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.tables import ScoreTable, build_table
from nemo_llm_feedback.hypotheses.groups import ScoredGroup
from nemo_llm_feedback.hypotheses.scored_nbest import JudgedReference, judged_references
from nemo_llm_feedback.training.group_math import signal


@dataclass(frozen=True)
class Preference:
    """How often a judgement puts the reference above every wrong member of its group.

    Attributes:
        preferred: rows where it does.
        rows: rows with text, a wrong member, and a reference that could be judged.
    """

    preferred: int
    rows: int


@dataclass(frozen=True)
class ScoreReport:
    """What the job found.

    Attributes:
        rows: looked at.
        total: rows of the manifest.
        groups: of the rows, in their order.
        chosen, greedy: index of the best-rewarded member of each group, and of the recogniser's own.
        signal_fraction: share of groups whose rewards differ by more than ``objective.min_spread``.
        spread: reward and component → mean within-group standard deviation, in its unit.
        unjudged: members that the reward could not judge.
        references: the rows' own texts judged beside their groups; None where there is none.
        errors: word errors of each member, for rows with text.
        systems: greedy, chosen, oracle → scores on the rows with text; empty without any.
        agreement: ``wer``, ``ewer`` → rank correlation of the reward with −WER and −EWER within groups.
        preference: reward and components → how often they prefer the reference.
        llm: one line on the LLM and its cache.
    """

    rows: tuple[Row, ...]
    total: int
    groups: tuple[ScoredGroup, ...]
    chosen: tuple[int, ...]
    greedy: tuple[int, ...]
    signal_fraction: float
    spread: dict[str, float]
    unjudged: int
    references: tuple[JudgedReference | None, ...]
    errors: dict[int, list[int]]
    systems: dict[str, CorpusScores]
    agreement: dict[str, RankAgreement]
    preference: dict[str, Preference]
    llm: str


def score(options: ProbeOptions) -> ScoreReport:
    """Proposes and judges the N-best of some rows and, where they have text, judges the judge.

    Args:
        options: the flags.

    Raises:
        FeedbackError: unusable input, before any model is loaded; or a reward that cannot work.
    """
    look = open_look(options)
    judge = look.open_judge()
    model = look.load_model()
    groups = look.make_groups(model, judge)
    hit_rate = judge.hit_rate  # of the groups; their members come again beside the references
    references = judged_references(model, look.rows, groups, settings=look.settings, reward=judge.reward)
    return report_on(look, groups, references, llm=judge.llm_line(hit_rate))


def report_on(
    look: Look, groups: Sequence[ScoredGroup], references: Sequence[JudgedReference | None], *, llm: str
) -> ScoreReport:
    """The statistics of scored groups; see :class:`ScoreReport`."""
    head = next(iter(groups[0].rewards))
    rewards = [g.rewards[head] for g in groups]
    greedy = tuple(baseline(g) for g in groups)
    chosen = tuple(best_member(r, otherwise=n) for r, n in zip(rewards, greedy, strict=True))
    padded = pad_groups(rewards)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(r) for r in rewards])[:, None]
    parts = {"reward": rewards} | {name: [g.parts[name] for g in groups] for name in groups[0].parts}
    labelled = [i for i, row in enumerate(look.rows) if row.text]
    counts = member_counts(look, labelled, groups)
    systems = _systems(look, labelled, groups, greedy=greedy, chosen=chosen) if labelled else {}
    return ScoreReport(
        rows=look.rows,
        total=look.total,
        groups=tuple(groups),
        chosen=chosen,
        greedy=greedy,
        signal_fraction=float(signal(padded, mask, min_spread=look.config.objective.min_spread).float().mean()),
        spread={name: _mean_spread(values) for name, values in parts.items()},
        unjudged=int((padded.isnan() & mask).sum()),
        references=tuple(references),
        errors=dict(zip(labelled, counts["word_errors"], strict=True)),
        systems=systems,
        agreement={
            metric: rank_agreement([rewards[i] for i in labelled], [[-float(e) for e in row] for row in counts[name]])
            for metric, name in (("wer", "word_errors"), ("ewer", "entity_errors"))
            if labelled and systems["greedy"].column("words" if metric == "wer" else "entity_words").sum()
        },
        preference=_preferences([r for r in references if r is not None], head),
        llm=llm,
    )


def member_counts(look: Look, labelled: Sequence[int], groups: Sequence[ScoredGroup]) -> dict[str, list[list[int]]]:
    """Word and entity errors of every member of the rows with text: name → one list a row."""
    if not labelled:
        return {"word_errors": [], "entity_errors": []}
    owners = [i for i in labelled for _ in groups[i].group.texts]
    scores = score_rows(
        [look.rows[i] for i in owners],
        [text for i in labelled for text in groups[i].group.texts],
        run_context=look.settings.run_context,
        normalizer=look.settings.normalizer,
    )
    out = {}
    for name in ("word_errors", "entity_errors"):
        flat = iter(scores.column(name).tolist())
        out[name] = [[next(flat) for _ in groups[i].group.texts] for i in labelled]
    return out


def _systems(
    look: Look, labelled: Sequence[int], groups: Sequence[ScoredGroup], *, greedy: Sequence[int], chosen: Sequence[int]
) -> dict[str, CorpusScores]:
    rows = [look.rows[i] for i in labelled]
    texts = [groups[i].group.texts for i in labelled]
    best = oracle([row.text for row in rows], texts, normalize=get_normalizer(look.settings.normalizer)).best
    picks = {
        "greedy": [greedy[i] for i in labelled],
        "best-rewarded": [chosen[i] for i in labelled],
        "oracle": list(best),
    }
    return {
        name: score_rows(
            rows,
            [members[n] for members, n in zip(texts, pick, strict=True)],
            run_context=look.settings.run_context,
            normalizer=look.settings.normalizer,
        )
        for name, pick in picks.items()
    }


def _preferences(references: Sequence[JudgedReference], head: str) -> dict[str, Preference]:
    """Reward and components → how often the reference beats the best wrong member."""
    if not references:
        return {}
    found = {}
    for name in ("reward", *references[0].scored.parts):
        wins = rows = 0
        for reference in references:
            scored = reference.scored
            *values, truth = scored.rewards[head] if name == "reward" else scored.parts[name]
            *texts, true_text = scored.group.texts
            wrong = [v for v, text in zip(values, texts, strict=True) if text != true_text and math.isfinite(v)]
            if reference.feasible and wrong and math.isfinite(truth):
                rows += 1
                wins += truth > max(wrong)
        found[name] = Preference(wins, rows)
    return found


def _mean_spread(values: Sequence[Sequence[float]]) -> float:
    """Mean over groups of the standard deviation of the judged members."""
    finite = [torch.tensor([v for v in row if math.isfinite(v)], dtype=torch.float64) for row in values]
    stds = [float(row.std(correction=0)) for row in finite if len(row)]
    return sum(stds) / len(stds) if stds else math.nan


# ---------------------------------------------------------------- as text and JSON


def report_text(report: ScoreReport, *, show: int, members: int) -> str:
    """The report for a terminal.

    Args:
        report: of the job.
        show: rows whose N-best is printed; 0 = none.
        members: of each, the best-rewarded ones; greedy is always among them.
    """
    lines = ["> best-rewarded, = the recogniser's own, ref the row's text", ""] if show > 0 else []
    for i in range(min(show, len(report.groups))):
        lines += [_group_text(report, i, members), ""]
    sizes = [len(g.group) for g in report.groups]
    changed = sum(
        g.group.texts[a] != g.group.texts[b]
        for g, a, b in zip(report.groups, report.chosen, report.greedy, strict=True)
    )
    lines += [
        f"{len(report.rows)} of {report.total} rows, {sum(sizes) / len(sizes):.1f} members a group",
        f"LLM                {report.llm}",
        f"groups with signal {100 * report.signal_fraction:.1f} %",
        f"choice ≠ greedy    {100 * changed / len(sizes):.1f} %",
        f"not judged         {report.unjudged} of {sum(sizes)} members",
        "spread in a group  " + ", ".join(f"{name} {value:.2f}" for name, value in report.spread.items()),
    ]
    if not report.systems:
        return "\n".join([*lines, "no row has text: nothing to compare the reward with"])
    lines += ["", _table(report.systems).to_text(), ""]
    for metric, a in report.agreement.items():
        lines.append(
            f"reward against −{metric.upper():4} within groups: Spearman {a.spearman:.3f}, Kendall {a.kendall:.3f} "
            f"({a.groups} groups; {a.skipped} without differences)"
        )
    for name, p in report.preference.items():
        share = f"{100 * p.preferred / p.rows:.1f} %" if p.rows else "–"
        lines.append(f"{name:8} prefers the reference to every wrong member: {share} ({p.preferred} of {p.rows})")
    return "\n".join(lines)


def _table(systems: Mapping[str, CorpusScores]) -> ScoreTable:
    first = systems["greedy"]
    metrics = ["wer"] + (["ewer", "entity_recall"] if first.column("entity_words").sum() else [])
    metrics += ["false_alarms"] if first.column("term_utterances").sum() else []
    return build_table(dict(systems), metrics=metrics, base="greedy", samples=2000, seed=0)


def _group_text(report: ScoreReport, i: int, members: int) -> str:
    """One row's N-best, best-rewarded first; ``>`` marks the choice, ``=`` greedy, ``ref`` the row's own text."""
    scored, names = report.groups[i], list(report.groups[i].parts)
    head = next(iter(scored.rewards))
    order = sorted(range(len(scored.group)), key=lambda n: (math.isnan(scored.rewards[head][n]), -_or_low(scored, n)))
    shown = order[:members]
    shown += [n for n in (report.greedy[i],) if n not in shown]
    lines = [f"{report.rows[i].utterance}  ({len(scored.group)} members)"]
    lines.append("      reward " + " ".join(f"{name:>8}" for name in names) + "  errors source     text")
    errors = report.errors.get(i)
    for n in shown:
        mark = (">" if n == report.chosen[i] else " ") + ("=" if n == report.greedy[i] else " ")
        lines.append(
            f"{mark:3}{_line(scored, n, names, head)}  {errors[n] if errors else '–':>6} "
            f"{scored.group.hypotheses[n].source:10} {scored.group.texts[n]}"
        )
    reference = report.references[i]
    if reference is not None:
        lines.append(
            f"ref{_line(reference.scored, -1, names, head)}  {0:>6} {'' if reference.feasible else 'too long':10} "
            f"{reference.scored.group.texts[-1]}"
        )
    return "\n".join(lines)


def _or_low(scored: ScoredGroup, n: int) -> float:
    value = scored.rewards[next(iter(scored.rewards))][n]
    return value if math.isfinite(value) else -math.inf


def _line(scored: ScoredGroup, n: int, names: Sequence[str], head: str) -> str:
    return f"{scored.rewards[head][n]:9.2f} " + " ".join(f"{scored.parts[name][n]:8.2f}" for name in names)


def report_json(report: ScoreReport) -> dict[str, Any]:
    """Everything as plain data; what is not a finite number is null."""
    head = next(iter(report.groups[0].rewards))
    utterances = []
    for i, scored in enumerate(report.groups):
        texts, reference = scored.group.texts, report.references[i]
        columns = {"reward": scored.rewards[head], **scored.parts}
        members: list[dict[str, Any]] = []
        for n, hypothesis in enumerate(scored.group.hypotheses):
            member = {"text": texts[n], "source": hypothesis.source, **{k: v[n] for k, v in columns.items()}}
            members.append(member | ({"word_errors": report.errors[i][n]} if i in report.errors else {}))
        entry: dict[str, Any] = {"utterance": report.rows[i].utterance, "members": members}
        entry |= {"greedy": texts[report.greedy[i]], "chosen": texts[report.chosen[i]]}
        if reference is not None:
            true = {"reward": reference.scored.rewards[head], **reference.scored.parts}
            entry["reference"] = {
                "text": reference.scored.group.texts[-1],
                "feasible": reference.feasible,
                **{k: v[-1] for k, v in true.items()},
            }
        utterances.append(entry)
    metrics = ("wer", "ewer", "entity_recall", "false_alarms")
    systems = {name: {m: scores.value(m) for m in metrics} for name, scores in report.systems.items()}
    plain = {
        "rows": len(report.rows),
        "total_rows": report.total,
        "llm": report.llm,
        "signal_fraction": report.signal_fraction,
        "spread": report.spread,
        "unjudged": report.unjudged,
        "systems": systems,
        "rank_agreement": {name: asdict(a) for name, a in report.agreement.items()},
        "prefers_reference": {name: asdict(p) for name, p in report.preference.items()},
        "utterances": utterances,
    }
    return finite(plain)


def finite(node: Any) -> Any:
    """The same with null for numbers that JSON has not."""
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
