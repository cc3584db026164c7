"""Rewards without an LLM: the ASR model's log-probability, simple rules, word errors, and any Python function.

The rules alone are hacked at once (``length`` by insertions, ``negative_length`` by deletions, ``repetition`` and
``edit_distance`` by what they cannot see): they are components and controls, not goals.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rapidfuzz.distance import Levenshtein
from torch import Tensor

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.text import get_normalizer, occurrences, text_length, words
from nemo_llm_feedback.core.types import HypothesisGroup, RewardOutput, pad_groups
from nemo_llm_feedback.llm.prompts import read_template
from nemo_llm_feedback.rewards.base import Reward, reference_scores, register

RewardFunction = Callable[..., Sequence[float | None]]


class GroupRuleReward:
    """A reward that judges the members of a group beside each other, by texts and reference scores.

    Args:
        name: the part's name in the output.
        rule: group → one reward per member, any finite number; NaN = cannot judge.
    """

    def __init__(self, name: str, rule: Callable[[HypothesisGroup], Sequence[float]]) -> None:
        self.name = name
        self._rule = rule

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], which are also the only part."""
        values = self._values(groups)
        return RewardOutput(values, {self.name: values}, _revalued(groups, self._values))

    def _values(self, groups: Sequence[HypothesisGroup]) -> Tensor:
        return pad_groups([[float(value) for value in self._rule(group)] for group in groups])


def _revalued(
    groups: Sequence[HypothesisGroup], judge: Callable[[Sequence[HypothesisGroup]], Tensor]
) -> Callable[[Tensor], Tensor]:
    """What gives the judgement of the groups with other [B, N] reference scores."""

    def judged(ref_logp: Tensor) -> Tensor:
        """[B, N] values beside these [B, N] reference scores."""
        rows = zip(groups, ref_logp.tolist(), strict=True)
        return judge([replace(group, ref_logp=tuple(row[: len(group)])) for group, row in rows])

    return judged


class RuleReward(GroupRuleReward):
    """A reward that judges each text for itself.

    Args:
        name: the part's name in the output.
        rule: text → reward, any finite number; NaN = cannot judge.
    """

    def __init__(self, name: str, rule: Callable[[str], float]) -> None:
        super().__init__(name, lambda group: [rule(text) for text in group.texts])

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], which are also the only part and depend on no reference scores."""
        return replace(super().__call__(groups), revalue=None)


@register("asr")
def asr_reward() -> GroupRuleReward:
    """log p(h | audio) under the frozen reference, nats; NaN where the audio is too short for h."""
    return GroupRuleReward(
        "asr", lambda group: [value if math.isfinite(value) else math.nan for value in reference_scores(group)]
    )


@register("length")
def length_reward() -> RuleReward:
    """More words are better (characters in scripts written without spaces)."""
    return RuleReward("length", text_length)


@register("negative_length")
def negative_length_reward() -> RuleReward:
    """Fewer words are better."""
    return RuleReward("negative_length", lambda text: -text_length(text))


def word_distance(one: str, two: str) -> int:
    """Returns how many words must be inserted, deleted or substituted to make one text of the other."""
    return int(Levenshtein.distance(words(one), words(two)))


def best_transcript(group: HypothesisGroup) -> str:
    """The recogniser's best transcript of a group: its greedy member, else its most probable one.

    A group of samples has no greedy member. The most probable one is that of the highest reference score, or the first
    where there are no such scores.
    """
    for member in group.hypotheses:
        if "greedy" in member.sources:
            return member.text
    scored = len(group.ref_logp) == len(group)
    return max(zip(group.ref_logp, group.texts, strict=True))[1] if scored else group.texts[0]


@register("empty")
def empty_reward() -> RuleReward:
    """−1 for a text without a word, else 0."""
    return RuleReward("empty", lambda text: 0.0 - (text_length(text) == 0))


@register("edit_distance")
def edit_distance_reward() -> GroupRuleReward:
    """Minus the edit distance in words to the recogniser's best transcript, against free invention."""

    def _distances(group: HypothesisGroup) -> list[float]:
        best = best_transcript(group)
        return [0.0 - word_distance(text, best) for text in group.texts]

    return GroupRuleReward("edit_distance", _distances)


def repetition(text: str) -> float:
    """Returns the share of a text's units that repeat the unit before or close an earlier pair, in [0, 1].

    Units are words, or characters where ``text_length`` counts those. 0 for texts of fewer than two units.
    """
    units = words(text)
    if len(units) < 2:
        return 0.0
    seen: set[tuple[str, str]] = set()
    repeats = 0
    for pair in itertools.pairwise(units):
        repeats += pair[0] == pair[1] or pair in seen
        seen.add(pair)
    return repeats / (len(units) - 1)


@register("repetition")
def repetition_reward() -> RuleReward:
    """Minus the share of repeated words and word pairs, in [−1, 0]."""
    return RuleReward("repetition", lambda text: -repetition(text))


@register("wer")
class WerReward:
    """R(h) = −(E + (w − 1)·E_entity) in words (characters in scripts without spaces), against the row's own text.

    Labelled RL, minimum word error rate training. E is the edit distance; E_entity are the edits of a minimum
    alignment on words of the text inside an occurrence of one of the context's terms, and insertions between two words
    of one (the numerator of entity WER). Errors and not their rate: the mean over utterances is then that of the
    corpus's WER (Prabhavalkar et al. 2018, arXiv 1712.01818). Members of a group without text are NaN.

    Args:
        entity_weight: w ≥ 0; 1 = plain word errors.
        normalizer: name of the run's text normalisation, under which terms are looked for.

    Raises:
        RewardError: a weight below 0.
    """

    name = "wer"

    def __init__(self, *, entity_weight: float = 1.0, normalizer: str = "basic") -> None:
        if not entity_weight >= 0:
            raise RewardError(f"entity_weight={entity_weight} of reward wer must be at least 0.")
        self._weight, self._normalize = entity_weight, get_normalizer(normalizer)

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], also as the part ``wer``; with a weight the part ``entity_errors``, negative, too."""
        counts = [self._errors(group) for group in groups]
        errors, entity = (pad_groups([[-float(pair[k]) for pair in row] for row in counts]) for k in (0, 1))
        values = errors + (self._weight - 1) * entity
        return RewardOutput(values, {"wer": values} | ({"entity_errors": entity} if self._weight != 1 else {}))

    def _errors(self, group: HypothesisGroup) -> list[tuple[float, float]]:
        """Errors of each member, and those of them on entities; NaN without a text."""
        text = words(group.reference)
        if not text:
            return [(math.nan, math.nan)] * len(group)
        terms = [words(self._normalize(term)) for term in group.context.terms]
        spans = [span for term in terms for span in occurrences(text, term)]
        inside = {p for start, end in spans for p in range(start, end)}
        within = {p for start, end in spans for p in range(start + 1, end)}
        found = []
        for member in group.texts:
            edits = Levenshtein.editops(text, words(member))
            entity = sum(edit.src_pos in (within if edit.tag == "insert" else inside) for edit in edits)
            found.append((float(len(edits)), float(entity)))
        return found


@register("callable")
class CallableReward:
    """A Python function as a reward.

    Three signatures are accepted. ``function(texts, context)`` is called per group, with the group's ``Context``.
    ``function(texts, **columns)`` is called once for all groups. So is TRL's, known by an argument ``completions``:
    ``function(prompts=…, completions=…, **columns)``, where a prompt is the context in the words of the built-in
    template and a completion is a transcript; ``prompts`` is given if the function takes it. The columns are
    ``descriptions``, ``terms``, ``utterances``, ``sources``, ``ref_logp``, ``completion_ids`` (labels of the ASR
    vocabulary) and ``references`` (the row's own text with ``feedback.labelled=reward``, else ""), as far as the
    signature takes them: lists with one entry per text.

    Args:
        function: returns one number per text, None (or NaN) where it cannot judge.
        name: the part's name; that of the function by default.

    Raises:
        RewardError: ``function`` is not a function, or needs an argument that is not offered; on call, it failed or
            returned something else.
    """

    def __init__(self, function: RewardFunction, *, name: str | None = None) -> None:
        if not callable(function):
            raise RewardError(f"A callable reward needs a function, got {function!r}.")
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._taken = {p.name for p in parameters if p.kind not in variadic}
        self._trl = "completions" in self._taken
        self._per_group = "context" in self._taken and not self._trl
        texts = {"prompts", "completions"} if self._trl else {p.name for p in tuple(parameters)[:1]}
        offered = {*texts, *_COLUMNS, *(["context"] if self._per_group else [])}
        lacking = [p.name for p in parameters if p.name in self._taken - offered and p.default is p.empty]
        if lacking:
            raise RewardError(
                f"The reward function {self.name} needs {', '.join(lacking)}, which is not offered: it may take the "
                f"texts (or TRL's prompts and completions), context, and {', '.join(_COLUMNS)}."
            )

    def __call__(self, groups: Sequence[HypothesisGroup]) -> RewardOutput:
        """Returns values [B, N], which are also the only part.

        Raises:
            RewardError: the function raised, or did not return one number or None per text.
        """
        values = self._values(groups)
        reads = self._takes_all or "ref_logp" in self._taken
        return RewardOutput(values, {self.name: values}, _revalued(groups, self._values) if reads else None)

    def _values(self, groups: Sequence[HypothesisGroup]) -> Tensor:
        batches = [[group] for group in groups] if self._per_group else [groups]
        rest = iter([number for batch in batches for number in self._numbers(batch)])
        values = pad_groups([[next(rest) for _ in group.hypotheses] for group in groups])
        return values.masked_fill(values.isinf(), math.nan)

    def _numbers(self, groups: Sequence[HypothesisGroup]) -> list[float]:
        texts = [text for group in groups for text in group.texts]
        try:
            numbers = [math.nan if answer is None else float(answer) for answer in self._call(texts, groups)]
        except Exception as error:  # whatever the user's function raises is reported under its name
            raise RewardError(f"The reward function {self.name} failed: {type(error).__name__}: {error}") from error
        if len(numbers) != len(texts):
            raise RewardError(
                f"The reward function {self.name} returned {len(numbers)} values for {len(texts)} texts."
            )
        return numbers

    def _call(self, texts: list[str], groups: Sequence[HypothesisGroup]) -> Sequence[float | None]:
        members = [(group, n) for group in groups for n in range(len(group))]
        columns: dict[str, Any] = {
            name: [column(group, n) for group, n in members]
            for name, column in _COLUMNS.items()
            if self._takes_all or name in self._taken
        }
        if self._per_group:
            columns["context"] = groups[0].context
        if not self._trl:
            return self._function(texts, **columns)
        if self._takes_all or "prompts" in self._taken:
            template = read_template(None, chat=False)
            columns["prompts"] = [template.render(group.context) for group, _ in members]
        return self._function(completions=texts, **columns)


def as_reward(reward: Reward | RewardFunction) -> Reward:
    """Returns a reward as it is, and a plain Python function as a :class:`CallableReward`.

    Raises:
        RewardError: neither of the two, or a function whose signature does not fit.
    """
    return reward if isinstance(reward, Reward) else CallableReward(reward)


_COLUMNS: dict[str, Callable[[HypothesisGroup, int], Any]] = {
    "descriptions": lambda group, n: group.context.description,
    "terms": lambda group, n: list(group.context.terms),
    "utterances": lambda group, n: group.utterance,
    "sources": lambda group, n: group.hypotheses[n].source,
    "ref_logp": lambda group, n: group.ref_logp[n] if group.ref_logp else math.nan,
    "completion_ids": lambda group, n: list(group.hypotheses[n].tokens),
    "references": lambda group, n: group.reference,
}
