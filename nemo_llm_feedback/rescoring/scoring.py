"""Orders the hypotheses of an N-best by exact log p(y|x) and a reward, for whatever decoder found them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Head, Labels
from nemo_llm_feedback.core.config import ProposalConfig, RunConfig
from nemo_llm_feedback.core.config.rescoring import RescoringConfig
from nemo_llm_feedback.core.config.reward import DEFAULT_ALPHA
from nemo_llm_feedback.core.errors import ConfigError, RewardError
from nemo_llm_feedback.core.text import get_normalizer, text_length
from nemo_llm_feedback.core.types import Context, ExternalText, HypothesisGroup, RewardOutput
from nemo_llm_feedback.hypotheses.external import ExternalTexts
from nemo_llm_feedback.hypotheses.proposals import Candidate, Proposer, build_members, scored, to_hypothesis
from nemo_llm_feedback.hypotheses.trust import Trust, bonuses, trusted_sources
from nemo_llm_feedback.llm import open_llm
from nemo_llm_feedback.rewards import LLMReward, Reward
from nemo_llm_feedback.rewards.composite import CompositeReward
from nemo_llm_feedback.rewards.from_config import reward_faults, reward_from_config


@dataclass(frozen=True)
class ScoredHypothesis:
    """One member of a rescored N-best.

    Attributes:
        labels: label ids without blank.
        text: the text that the reward judged, i.e. after normalisation.
        score: the value by which the N-best is ordered; NaN where the reward could not judge the member.
        parts: ``asr`` = exact log p(y|x) in nats, ``length``, and the reward's parts, unweighted.
        source: ``beam``, or ``greedy``, ``boosted``, ``term_swap`` where those were asked for, or another recogniser.
    """

    labels: Labels
    text: str
    score: float
    parts: Mapping[str, float]
    source: str


@dataclass(eq=False)
class Rescorer:
    """Chooses among hypotheses by log p(y|x) + α·reward + β·length. It is not a module, so that it is never saved.

    The reward of the settings, as training has it, ``LLMReward``, composites with it, and rewards whose parts include
    ``asr`` are the whole score. A member that the reward cannot judge (NaN) ranks below all that it can
    judge; among members that it cannot judge, log p(y|x) decides.

    Attributes:
        reward: judges the hypotheses; None for log p(y|x) + β·length.
        alpha, beta: weights of a reward that does not weigh log p(y|x) itself, and of the length; None = those of
            ``settings.reward``, else 1 and 0.
        context: the context of all utterances; that of each utterance is merged over it.
        settings: beam size, further hypotheses, text normalisation and memory budget.
        trust: how texts of other recognisers are judged; by default as ``settings.reward`` says.
        batch: names, contexts and other recognisers' texts of the rows that are decoded next, where they are known.
    """

    reward: Reward | None
    alpha: float | None = None
    beta: float | None = None
    context: Context = field(default_factory=Context)
    settings: RescoringConfig = field(default_factory=lambda: RescoringConfig(reward=None))
    trust: Trust | None = None
    batch: tuple[tuple[str, ...], tuple[Context, ...], tuple[tuple[ExternalText, ...], ...]] | None = None

    def __post_init__(self) -> None:
        if self.trust is None and self.settings.reward is not None:
            self.trust = Trust.of(self.settings.reward)
        self._normalize = get_normalizer(self.settings.normalizer)
        given = [v for v in (self.alpha, self.beta) if v is not None]
        if not all(map(math.isfinite, given)):
            raise ConfigError(f"alpha={self.alpha} and beta={self.beta} must be finite numbers.")
        if isinstance(self.reward, LLMReward) and given:
            raise ConfigError("an LLMReward has alpha and beta itself: set them on it, not on enable_rescoring.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Rescorer:
        """A copied model, such as the frozen reference, shares the rescorer: an LLM must not be copied."""
        return self

    @classmethod
    def from_settings(cls, settings: RescoringConfig) -> Rescorer:
        """Loads the LLM and the reward that the settings name; a reward may be named by a path to the user's code.

        Args:
            settings: checked rescoring settings.

        Raises:
            LLMError, RewardError: the LLM or the reward cannot be used.
        """
        reward = None
        if settings.reward is not None:
            config = RunConfig(reward=settings.reward, llm=settings.llm, context=settings.context)
            if faults := reward_faults(config):
                raise RewardError("the reward cannot be used:" + "".join(f"\n  - {fault}" for fault in faults))
            needed = settings.llm if settings.reward.needs_llm else None
            reward = reward_from_config(config, open_llm(needed) if needed is not None else None)
        return cls(reward, context=settings.context.load(), settings=settings)

    def proposer(self, head: Head) -> Proposer | None:
        """What adds boosted hypotheses and term swaps to a head's N-best, or None where neither is asked for."""
        config = self.proposals
        return Proposer(head, config) if config.boosted or config.term_swap else None

    @property
    def proposals(self) -> ProposalConfig:
        """What is added to the first pass."""
        names = ("boosted", "term_swap", "boosting_weight", "external", "language")
        return ProposalConfig(beam=0, samples=0, **{name: getattr(self.settings, name) for name in names})

    @torch.no_grad()
    def rescore(
        self,
        head: Head,
        encoded: Tensor,
        lengths: Tensor,
        nbest: Sequence[Sequence[Labels]],
        proposer: Proposer | None,
    ) -> list[list[ScoredHypothesis]]:
        """Orders the N-best of every row by score, best first; members of equal normalised text are merged.

        Args:
            head: the decoding model's head, in eval mode.
            encoded: [B, D, T] encoder output.
            lengths: [B] frames.
            nbest: the first pass's label sequences per row, of any number; a row without any gets the empty text.
            proposer: the result of :meth:`proposer` for the head.

        Raises:
            ConfigError: the number of announced utterances is not that of the rows, or alpha or beta have no use.
            RewardError: the reward cannot work at all.
        """
        names, contexts, external = self._rows(len(nbest))
        texts = ExternalTexts(head.vocabulary, self._normalize, self.proposals)
        candidates = [[Candidate(tuple(y), "beam") for y in row] or [Candidate((), "beam")] for row in nbest]
        for row, given, frames in zip(candidates, external, lengths.tolist(), strict=True):
            row += [Candidate(*new) for new in texts.labels(given, frames=frames)]
        candidates = scored(candidates, functools.partial(head.score, encoded, lengths))
        with_terms = [b for b, context in enumerate(contexts) if context.terms]
        if proposer is not None and with_terms:
            more = proposer.propose(encoded[with_terms], lengths[with_terms], [contexts[b] for b in with_terms])
            for b, found in zip(with_terms, more, strict=True):
                candidates[b] += found
        groups = []
        for name, context, row in zip(names, contexts, candidates, strict=True):
            spelled: Any = {"vocabulary": head.vocabulary, "normalize": self._normalize}
            keep = build_members(row, **spelled, max_members=len(row), distinct=True)
            members = tuple(to_hypothesis(c, **spelled) for c in keep)
            groups.append(self._trusted(HypothesisGroup(name, members, context, tuple(c.logp for c in keep))))
        return self._ordered(groups)

    def _trusted(self, group: HypothesisGroup) -> tuple[HypothesisGroup, list[float]]:
        """The group without texts that are not trusted so far, and what members get for the trust in them, in nats."""
        if self.trust is None:
            return group, [0.0] * len(group)
        found = trusted_sources(group.hypotheses, group.ref_logp, self.trust.limits)
        kept = [n for n, sources in enumerate(found) if sources is not None]
        members = tuple(group.hypotheses[n] for n in kept)
        logp = tuple(group.ref_logp[n] for n in kept)
        bonus = bonuses(members, logp, [sources for sources in found if sources is not None])
        return replace(group, hypotheses=members, ref_logp=logp), bonus

    def _rows(self, count: int) -> tuple[tuple[str, ...], tuple[Context, ...], tuple[tuple[ExternalText, ...], ...]]:
        """Names, contexts and other recognisers' texts of the rows that are decoded."""
        if self.batch is None:
            return tuple(f"row {b}" for b in range(count)), (self.context,) * count, ((),) * count
        if len(self.batch[0]) != count:
            raise ConfigError(
                f"{len(self.batch[0])} utterances were announced but {count} rows are decoded: call "
                "utterance_contexts for each batch with the names and contexts of its rows."
            )
        return self.batch

    @property
    def _is_whole(self) -> bool:
        """Whether the reward of the settings is the whole score, as it is in training; one that has no weights there,
        such as a function of the user's, is weighed beside log p(y|x) where weights are given for it here."""
        named = self.settings.reward
        free = named is not None and not named.weighed and named.name != "composite"
        return named is not None and not (free and (named.alpha is not None or named.beta is not None))

    def _ordered(self, groups: Sequence[tuple[HypothesisGroup, list[float]]]) -> list[list[ScoredHypothesis]]:
        """The groups' members by score, best first; those that cannot be judged come last, by log p(y|x)."""
        given = [group for group, _ in groups]
        output = self.reward(given) if self.reward is not None else RewardOutput(torch.empty(0))
        weighed = self._is_whole or "asr" in output.parts or _weighs_asr(self.reward)
        if weighed and (self.alpha is not None or self.beta is not None):
            raise ConfigError(
                f"the reward {self.reward.name!r} weighs log p(y|x) itself: set alpha and beta on it, "  # type: ignore[union-attr]
                "not on enable_rescoring."
            )
        named = self.settings.reward
        alpha, beta = (DEFAULT_ALPHA, 0.0) if named is None else named.weights
        alpha, beta = alpha if self.alpha is None else self.alpha, beta if self.beta is None else self.beta
        ranked = []
        for b, (group, trust) in enumerate(groups):
            members = []
            rows = zip(group.hypotheses, group.ref_logp, trust, strict=True)
            for n, (hyp, asr, bonus) in enumerate(rows):
                length = float(text_length(hyp.text))
                parts = {"asr": asr, "length": length}
                parts |= {name: float(part[b, n]) for name, part in output.parts.items() if name != "asr"}
                score = asr + beta * length
                if self.reward is not None:
                    value = float(output.values[b, n])
                    score = value if weighed else score + alpha * value
                if self.trust is not None:
                    parts["trust"] = bonus
                    score += self.trust.weight * bonus
                members.append(ScoredHypothesis(hyp.tokens, hyp.text, score, parts, hyp.source))
            ranked.append(sorted(members, key=_rank, reverse=True))
        return ranked


def _weighs_asr(reward: Reward | None) -> bool:
    """Whether a reward's value holds log p(y|x) already; a composite does not name the term of a component."""
    components = reward.components if isinstance(reward, CompositeReward) else ()
    return isinstance(reward, LLMReward) or any(_weighs_asr(component.reward) for component in components)


def _rank(member: ScoredHypothesis) -> tuple[bool, float]:
    """Sort key: members that were judged are better than those that were not."""
    judged = not math.isnan(member.score)
    return judged, member.score if judged else member.parts["asr"]
