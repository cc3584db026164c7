"""The score job: how the reward ranks some N-best lists, before anything is trained on it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_llm_feedback.cli.jobs.nbest_probe import NBestProbe, greedy_members, judged_by
from nemo_llm_feedback.cli.jobs.quantization import QuantizationComparison, compare_llms, comparison_text, other_llm
from nemo_llm_feedback.cli.jobs.tuning import Weights, by_spread, tune_by_labels, tuned_text
from nemo_llm_feedback.core.config import RewardConfig
from nemo_llm_feedback.core.console import quiet
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.text import get_normalizer
from nemo_llm_feedback.core.types import pad_groups
from nemo_llm_feedback.data.manifests import Row
from nemo_llm_feedback.evaluation.metrics import CorpusScores, find_metric
from nemo_llm_feedback.evaluation.rank_agreement import RankAgreement, best_members, rank_agreement
from nemo_llm_feedback.evaluation.records import Table, facts_text, to_plain
from nemo_llm_feedback.evaluation.scoring import score_rows
from nemo_llm_feedback.evaluation.tables import build_table
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.reward_scale import component_deviations, component_spread
from nemo_llm_feedback.hypotheses.scored_nbest import JudgedReference, judged_references, measured_trust
from nemo_llm_feedback.hypotheses.trust import SourceTrust, Trust, trust_text
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
        rows: the B rows that were taken.
        total: rows of the manifest.
        nbest: the rows' N-best, in their order.
        weights: the reward's weights; None for a reward without any.
        formula: the reward as a sum of its parts; empty for a reward without weights.
        trusted: other recogniser → what these rows say of it; empty where trust is set or there is none.
        chosen, greedy: index of each row's best-rewarded member, and of the recogniser's own text.
        signal_fraction: share of groups whose rewards differ by more than ``objective.min_spread``.
        spread: reward and component → mean within-group standard deviation, in its unit.
        unjudged: members that the reward could not judge.
        references: the rows' texts judged beside their groups; None for rows without text.
        preference: reward and components → how often they prefer the reference.
        llm: one line on the LLM and its cache.
        errors: position of a row with text → word errors of its members.
        systems: greedy, chosen, oracle → scores on the rows with text; empty without any.
        agreement: ``wer``, ``ewer`` → rank correlation of the reward with −WER and −EWER within groups.
        quantization: comparison with another quantisation, if asked for.
        tuned: the weights picked, if asked for.
    """

    rows: list[Row]
    total: int
    nbest: NBestBatch
    weights: Weights | None
    formula: str
    trusted: dict[str, SourceTrust]
    chosen: list[int]
    greedy: list[int]
    signal_fraction: float
    spread: dict[str, float]
    unjudged: int
    references: list[JudgedReference | None]
    preference: dict[str, Preference]
    llm: str
    errors: dict[int, list[int]]
    systems: dict[str, CorpusScores]
    agreement: dict[str, RankAgreement]
    quantization: QuantizationComparison | None
    tuned: Weights | None


@quiet()
def score(
    probe: NBestProbe, *, other: Literal["nf4", "int8", "none"] | None = None, tune: bool = False
) -> ScoreReport:
    """Proposes and judges the N-best of some rows and, where they have text, judges the judge.

    Args:
        probe: the rows, the recogniser and the reward.
        other: also judge by the LLM in this quantisation.
        tune: also pick α and β.

    Raises:
        FeedbackError: unusable input, before any model is loaded; or a reward that cannot work.
    """
    config, settings = probe.config, probe.config.reward
    if tune and not settings.weighed:
        raise ConfigError(f"--tune picks reward.alpha and reward.beta; reward.name={settings.name} has none.")
    compared = other_llm(config, other) if other else None
    nbest, reward = probe.nbest(), probe.reward
    llm = probe.llm_line()  # its hit rate is that of the groups; they come again below
    weights = Weights(*settings.weights, "settings") if settings.weighed else None
    if settings.scaled_by_pool:
        weights = by_spread(nbest, settings)
        reward = reward.with_weights(alpha=weights.alpha, beta=weights.beta)  # type: ignore[attr-defined]
    shared: Any = {"config": config, "batch_size": probe.batch_size}
    trusted = measured_trust(probe.model, probe.rows, nbest, **shared) if settings.trusts_by_pool else {}
    trust = Trust.of(replace(settings, trust={s: of.trust for s, of in trusted.items()}) if trusted else settings)
    if settings.scaled_by_pool or trust is not None:
        normalize = get_normalizer(config.feedback.normalizer)
        nbest = judged_by(reward, nbest, trust, texts=[normalize(row.text) for row in probe.rows])
    references = judged_references(probe.model, probe.rows, nbest, reward=reward, trust=trust, **shared)
    (rewards,) = nbest.rewards.values()
    greedy = greedy_members(nbest)
    chosen = best_members(rewards, otherwise=greedy)
    labelled = LabelledMembers(probe, nbest) if any(row.text for row in probe.rows) else None
    tuned = comparison = None
    if tune and labelled is not None:
        tuned = tune_by_labels(nbest, labelled.scores, settings)
    elif tune:
        tuned = by_spread(nbest, replace(settings, beta=None))
    if compared is not None:
        assert weights is not None  # `other_llm` refuses a reward without any
        comparison = compare_llms(probe, nbest, compared, weights=weights, trust=trust)
    with_signal = signal(rewards, nbest.mask, min_spread=config.objective.min_spread)
    return ScoreReport(
        rows=probe.rows,
        total=probe.total,
        nbest=nbest,
        weights=weights,
        formula=_formula(weights, settings, trusted="trust" in nbest.parts) if weights is not None else "",
        trusted=trusted,
        chosen=chosen,
        greedy=greedy,
        signal_fraction=float(with_signal.float().mean()),
        spread=component_spread(component_deviations(replace(nbest, parts={"reward": rewards, **nbest.parts}))),
        unjudged=int((rewards.isnan() & nbest.mask).sum()),
        references=references,
        preference=_preferences([r for r in references if r is not None]),
        llm=llm,
        errors=labelled.errors if labelled else {},
        systems=labelled.systems(greedy, chosen) if labelled else {},
        agreement=labelled.agreement(rewards) if labelled else {},
        quantization=comparison,
        tuned=tuned,
    )


def _formula(weights: Weights, settings: RewardConfig, *, trusted: bool) -> str:
    """The reward as a sum of the columns that are shown."""
    parts = {settings.weighed_part: weights.alpha, "length": weights.beta, "asr": settings.asr_weight}
    parts |= {"trust": settings.asr_weight} if trusted else {}
    return " + ".join(name if w == 1 else f"{w:g}·{name}" for name, w in parts.items() if w)


class LabelledMembers:
    """The members of the rows with text, each scored against it.

    Attributes:
        rows: positions of the rows with text, at least one.
        errors: position of a row with text → word errors of its members.
    """

    def __init__(self, probe: NBestProbe, nbest: NBestBatch) -> None:
        self.rows = [i for i, row in enumerate(probe.rows) if row.text]
        self._sizes = [nbest.sizes[i] for i in self.rows]
        self._scores = score_rows(
            [probe.rows[i] for i in self.rows for _ in nbest.texts[i]],
            [text for i in self.rows for text in nbest.texts[i]],
            run_context=probe.config.context.load(),
            normalizer=probe.config.feedback.normalizer,
        )
        self.errors = dict(zip(self.rows, self._counts("word_errors"), strict=True))

    def scores(self, members: Sequence[int] | Mapping[int, int]) -> CorpusScores:
        """The scores of one member per row with text; ``members`` has its index at the row's position."""
        starts = itertools.accumulate(self._sizes, initial=0)
        return self._scores.select([start + members[i] for start, i in zip(starts, self.rows, strict=False)])

    def systems(self, greedy: Sequence[int], chosen: Sequence[int]) -> dict[str, CorpusScores]:
        """The scores of the greedy, the best-rewarded and the best members."""
        fewest = {i: errors.index(min(errors)) for i, errors in self.errors.items()}
        picks: dict[str, Any] = {"greedy": greedy, "best-rewarded": chosen, "oracle": fewest}
        return {name: self.scores(members) for name, members in picks.items()}

    def agreement(self, rewards: Tensor) -> dict[str, RankAgreement]:
        """Rank correlation of the [B, N] rewards of all rows with −WER and, where there are entities, −EWER."""
        counts = {"wer": "word_errors", "ewer": find_metric("ewer").numerator}
        return {
            metric: rank_agreement(rewards[self.rows], -pad_groups(self._counts(name)))
            for metric, name in counts.items()
            if self._scores.ratio(metric)[1].sum()
        }

    def _counts(self, name: str) -> list[list[int]]:
        """One count of every member per row with text; ``name`` from ``metrics.COLUMNS``."""
        return [part.tolist() for part in torch.as_tensor(self._scores.column(name)).split(self._sizes)]


def _preferences(references: Sequence[JudgedReference]) -> dict[str, Preference]:
    """Reward and components → how often the reference, which is the last member, beats the best wrong one."""
    found: dict[str, list[bool]] = {}
    for reference in references:
        *texts, true_text = reference.nbest.texts[0]
        for name, values in _values(reference.nbest, 0).items():
            *others, truth = values
            wrong = [v for v, text in zip(others, texts, strict=True) if text != true_text and math.isfinite(v)]
            wins = found.setdefault(name, [])
            if reference.feasible and wrong and math.isfinite(truth):
                wins.append(truth > max(wrong))
    return {name: Preference(sum(wins), len(wins)) for name, wins in found.items()}


def _values(nbest: NBestBatch, row: int) -> dict[str, list[float]]:
    """Reward and components → the members' values in one utterance."""
    (rewards,) = nbest.rewards.values()
    size = nbest.sizes[row]
    return {name: values[row, :size].tolist() for name, values in {"reward": rewards, **nbest.parts}.items()}


# ---------------------------------------------------------------- as text and JSON


def report_text(report: ScoreReport, *, show: int, members: int) -> str:
    """The report for a terminal.

    Args:
        report: what :func:`score` found.
        show: rows whose N-best is printed; 0 = none.
        members: how many of each are printed, the best-rewarded first; greedy is always among them.
    """
    formula = f"reward = {report.formula}; " if report.formula else ""
    lines = [f"{formula}> the choice (highest reward), = greedy, ref the row's text", ""] if show > 0 else []
    for i in range(min(show, len(report.rows))):
        lines += [_row_text(report, i, members), ""]
    texts, sizes = report.nbest.texts, report.nbest.sizes
    changed = sum(row[a] != row[b] for row, a, b in zip(texts, report.chosen, report.greedy, strict=True))
    pairs = zip(report.nbest.sources, report.chosen, strict=True)
    suppliers = Counter(name for members, n in pairs for name in members[n])
    facts = {
        "rows": f"{len(report.rows)} of {report.total} rows, {sum(sizes) / len(sizes):.1f} hypotheses per row",
        "LLM": report.llm,
        "groups with signal": f"{100 * report.signal_fraction:.1f} %",
        "choice ≠ greedy": f"{100 * changed / len(sizes):.1f} %",
        "choice found in": ", ".join(f"{name} {100 * n / len(sizes):.1f} %" for name, n in suppliers.most_common()),
        "not judged": f"{report.unjudged} of {sum(sizes)} hypotheses",
        "spread in a group": ", ".join(f"{name} {value:.2f}" for name, value in report.spread.items()),
    }
    if report.weights is not None:
        facts["weights"] = report.weights.sentence
    if report.trusted:
        facts["other recognisers"] = trust_text(report.trusted)
    lines.append(facts_text(facts))
    lines += _labels_text(report) if report.systems else ["no row has text: nothing to compare the reward with"]
    if report.quantization is not None:
        lines += ["", comparison_text(report.quantization, utterances=len(report.rows))]
    if report.tuned is not None:
        lines += ["", tuned_text(report.tuned)]
    return "\n".join(lines)


def _labels_text(report: ScoreReport) -> list[str]:
    """How good the reward is by the rows with text."""
    first = report.systems["greedy"]
    metrics = ["wer"] + (["ewer", "entity_recall"] if first.column("entity_words").sum() else [])
    metrics += ["false_alarms"] if first.column("term_utterances").sum() else []
    lines = ["", build_table(report.systems, metrics=metrics, base="greedy").to_text(), ""]
    for metric, a in report.agreement.items():
        lines.append(
            f"reward against −{metric.upper():4} within groups: Spearman {a.spearman:.3f}, Kendall {a.kendall:.3f} "
            f"({a.groups} groups; {a.skipped} without differences)"
        )
    for name, p in report.preference.items():
        share = f"{100 * p.preferred / p.rows:.1f} %" if p.rows else "–"
        lines.append(f"{name:8} prefers the reference to every wrong member: {share} ({p.preferred} of {p.rows})")
    return lines


def _row_text(report: ScoreReport, i: int, members: int) -> str:
    """One row's N-best, best-rewarded first; ``>`` marks the choice, ``=`` greedy, ``ref`` the row's text."""
    record, names = _row_record(report, i), ["reward", *report.nbest.parts]
    found, greedy = record["members"], report.greedy[i]
    rewards = [member["reward"] if math.isfinite(member["reward"]) else -math.inf for member in found]
    order = sorted(range(len(found)), key=lambda n: -rewards[n])
    shown = order[:members] + [greedy] * (greedy not in order[:members])
    columns = [*names, *(["word_errors"] if i in report.errors else []), "source", "text"]
    rows = []
    for n in shown:
        mark = (">" if n == report.chosen[i] else " ") + ("=" if n == greedy else " ")
        rows.append([mark, *(found[n][name] for name in columns)])
    if (true := record.get("reference")) is not None:
        true |= {"word_errors": 0, "source": "" if true["feasible"] else "too long"}
        rows.append(["ref", *(true[name] for name in columns)])
    table = Table(["", *("errors" if name == "word_errors" else name for name in columns)], rows)
    return f"{record['utterance'].rsplit('/', 1)[-1]}  ({len(shown)} of {len(found)} hypotheses)\n{table.to_text()}"


def report_record(report: ScoreReport) -> dict[str, Any]:
    """Everything as plain data; what is not a finite number is null."""
    metrics = ("wer", "ewer", "entity_recall", "false_alarms")
    kept = ("llm", "weights", "trusted", "signal_fraction", "spread", "unjudged", "quantization", "tuned")
    return to_plain(
        {
            "rows": len(report.rows),
            "total_rows": report.total,
            **{name: getattr(report, name) for name in kept},
            "systems": {name: {m: scores.value(m) for m in metrics} for name, scores in report.systems.items()},
            "rank_agreement": report.agreement,
            "prefers_reference": report.preference,
            "utterances": [_row_record(report, i) for i in range(len(report.rows))],
        }
    )


def _row_record(report: ScoreReport, i: int) -> dict[str, Any]:
    texts, reference = report.nbest.texts[i], report.references[i]
    columns: dict[str, Sequence[Any]] = {
        "text": texts,
        "source": [hypothesis.source for hypothesis in report.nbest.hypotheses[i]],
        "sources": report.nbest.sources[i],
        **_values(report.nbest, i),
    }
    if i in report.errors:
        columns["word_errors"] = report.errors[i]
    record: dict[str, Any] = {
        "utterance": report.rows[i].utterance,
        "members": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
        "greedy": texts[report.greedy[i]],
        "chosen": texts[report.chosen[i]],
    }
    if reference is not None:
        true = {name: values[-1] for name, values in _values(reference.nbest, 0).items()}
        record["reference"] = {"text": reference.nbest.texts[0][-1], "feasible": reference.feasible, **true}
    return record
