"""The cost of quantisation: the same hypotheses judged by the LLM as a run loads it and in another quantisation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from nemo_llm_feedback.cli.jobs.nbest_probe import NBestProbe, greedy_members, judged_by
from nemo_llm_feedback.cli.jobs.tuning import Weights
from nemo_llm_feedback.core.config import LLMConfig, RunConfig
from nemo_llm_feedback.core.errors import ConfigError, LLMError, list_faults
from nemo_llm_feedback.evaluation.rank_agreement import RankAgreement, best_members, rank_agreement
from nemo_llm_feedback.evaluation.records import facts_text
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.hypotheses.trust import Trust
from nemo_llm_feedback.llm import check_llm_folder, open_llm
from nemo_llm_feedback.rewards import reward_from_config

# Below these, quantisation blurs the differences that the reward is to see.
_CORRELATION, _RANKS = 0.995, 0.95
_REWARDS = ("llm", "entity")


@dataclass(frozen=True)
class QuantizationComparison:
    """The run's LLM compared with the same in another quantisation, on the same texts.

    Attributes:
        run, other: the two LLMs with their quantisation.
        members: texts judged by both.
        mean_difference, max_difference: mean and largest |Δ| of a text's log-probability, in nats.
        correlation: Pearson's, of the log-probabilities about their group's mean: an offset common to a group changes
            nothing that learns from it.
        ranks: agreement of the LLM scores within groups.
        changed: names of the utterances whose best-rewarded text differs.
        advice: whether the run's quantisation will do.
    """

    run: str
    other: str
    members: int
    mean_difference: float
    max_difference: float
    correlation: float
    ranks: RankAgreement
    changed: tuple[str, ...]
    advice: str


def other_llm(config: RunConfig, quantization: Literal["nf4", "int8", "none"]) -> LLMConfig:
    """The settings of the LLM to compare with, checked before anything is loaded.

    Raises:
        ConfigError, LLMError: there is nothing to compare, or the other cannot be used.
    """
    if config.reward.name not in _REWARDS or config.llm is None:
        raise ConfigError(
            f"--compare-quantization compares log-probabilities of LLMs; reward.name={config.reward.name} has none: "
            "use reward=llm or reward=entity."
        )
    if config.llm.quantization == quantization:
        raise ConfigError(
            f"llm.quantization={quantization} is what it would be compared with: give --compare-quantization another "
            "one of nf4, int8 and none."
        )
    other = dataclasses.replace(config.llm, quantization=quantization, compute_dtype="auto")
    if faults := check_llm_folder(other):
        raise LLMError(list_faults("the LLM to compare with cannot be used:", faults))
    return other


def compare_llms(
    probe: NBestProbe, nbest: NBestBatch, other: LLMConfig, *, weights: Weights, trust: Trust | None
) -> QuantizationComparison:
    """Judges an N-best again, by the other LLM; the two are in memory one after the other.

    Args:
        probe: holds the LLM that judged the N-best.
        nbest: the N-best with its rewards.
        other: what :func:`other_llm` gave.
        weights, trust: by which the N-best was judged.
    """
    assert probe.scorer is not None
    probe.scorer.unload()
    scorer = open_llm(other)
    reward: Any = reward_from_config(probe.config, scorer)
    again = judged_by(reward.with_weights(alpha=weights.alpha, beta=weights.beta), nbest, trust)
    names = (probe.scorer.identity, scorer.identity)
    return compare_scores(nbest, again, part=probe.config.reward.weighed_part, names=names)


def compare_scores(
    nbest: NBestBatch, again: NBestBatch, *, part: str, names: tuple[str, str]
) -> QuantizationComparison:
    """The statistics; see :class:`QuantizationComparison`.

    Args:
        nbest: judged by the run's LLM.
        again: the same, judged by the other.
        part: the part of the reward that has the LLM's log-probabilities, in nats.
        names: names of the two LLMs.
    """
    scores = nbest.parts[part], again.parts[part]
    judged = scores[0].isfinite() & scores[1].isfinite()
    run, other = (values.double().masked_fill(~judged, math.nan) for values in scores)
    difference = (run - other).abs()[judged].tolist()
    run, other = ((values - values.nanmean(dim=1, keepdim=True))[judged] for values in (run, other))
    correlation = float(run @ other / (run.norm() * other.norm()))
    ranks, greedy = rank_agreement(*scores), greedy_members(nbest)
    chosen = [best_members(next(iter(found.rewards.values())), otherwise=greedy) for found in (nbest, again)]
    choices = zip(nbest.utterances, nbest.texts, *chosen, strict=True)
    return QuantizationComparison(
        *names,
        members=len(difference),
        mean_difference=sum(difference) / max(1, len(difference)),
        max_difference=max(difference, default=math.nan),
        correlation=correlation,
        ranks=ranks,
        changed=tuple(utterance for utterance, texts, a, b in choices if texts[a] != texts[b]),
        advice="The two order the hypotheses alike."
        if correlation >= _CORRELATION and ranks.spearman >= _RANKS
        else f"The run's quantisation blurs the scores (correlation under {_CORRELATION} or Spearman under {_RANKS}): "
        "use llm=int8 or llm=full if the memory allows, or a larger LLM in 4 bit.",
    )


def comparison_text(found: QuantizationComparison, *, utterances: int) -> str:
    """The comparison for a terminal.

    Args:
        found: what :func:`compare_scores` gave.
        utterances: number of utterances compared.
    """
    share = 100 * len(found.changed) / utterances
    facts = {
        "LLM of the run": found.run,
        "compared with": found.other,
        "|Δ log p|": f"mean {found.mean_difference:.3f}, max {found.max_difference:.3f} nat of {found.members} texts",
        "within groups": f"correlation {found.correlation:.4f}, Spearman {found.ranks.spearman:.4f}",
        "choice changes": f"{len(found.changed)} of {utterances} ({share:.1f} %)",
    }
    return f"{facts_text(facts)}\n{found.advice}"
