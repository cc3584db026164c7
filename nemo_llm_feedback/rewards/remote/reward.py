"""The LLM reward with the LLM on a vLLM server: ``reward=remote``.

R(h) = α·logP_LLM(h | context) + w·log p_ref(h | audio) + β·length(h) as with a local LLM, cache included: the same
prompts and token ids, but the forward pass runs on the server. A failed request makes the groups that needed it NaN;
they are counted, never cached, and stop the run where they are too many. Such a group is asked for again in the next
refresh round, when it is proposed anew.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.core.types import Context, HypothesisGroup
from nemo_llm_feedback.llm import TextScore, load_llm
from nemo_llm_feedback.llm.encoding import PromptEncoder, hash_of
from nemo_llm_feedback.llm.folder import fingerprint
from nemo_llm_feedback.llm.loading import load_tokenizer
from nemo_llm_feedback.llm.view import LLMView
from nemo_llm_feedback.rewards.asking import FailedGroups, Pair, ScoreCache, score_key
from nemo_llm_feedback.rewards.base import RefusedError, register
from nemo_llm_feedback.rewards.lm import LLMReward
from nemo_llm_feedback.rewards.remote.config import SETTINGS_KEY, RemoteConfig, parse_remote

logger = logging.getLogger(__name__)

Ids = tuple[int, ...]
_PROBE_CONTEXT = Context(description="a short test", terms=("one", "two"))
_PROBE_TEXTS = ("one two three", "a", "two words and then some more of them")
# Largest difference between two ways to the same score, in nats, times the root of the number of tokens: rounding in
# half precision or 8 bit costs hundredths to a fifth of a nat per token, of either sign; a shifted token costs nats.
_TOLERANCE = 0.25
_FAILED = TextScore(math.nan, -1)
_LOGGED_FAILURES = 5


class RemoteScorer:
    """Scores texts given a context on a server; a ``Scorer`` as ``rewards.lm`` wants it.

    Args:
        config: checked settings (see :func:`parse_remote`).

    Attributes:
        uses_context: whether the prompt template shows the context to the LLM at all.
        identity: changes whenever anything does that scores depend on, as far as the client can know.
        probe_scores: scores of the start-up check's texts.
        num_failed_requests: requests that failed after all retries so far, without those of the start-up check.

    Raises:
        LLMError: the tokenizer or the template cannot be used.
        RewardError: the ``openai`` client is not installed, or the server cannot be reached, does not serve the model,
            or fails the start-up check.
    """

    def __init__(self, config: RemoteConfig) -> None:
        try:
            from nemo_llm_feedback.rewards.remote.client import Client
        except ImportError as error:
            raise RewardError(
                f"reward=remote needs the openai client ({error}): pip install 'nemo_llm_feedback[remote]'."
            ) from error
        self._config = config
        self.client = Client(config)
        self.num_failed_requests = 0
        self._warned_long = False
        folder, tokenizer = load_tokenizer(config.tokenizer_source, config.revision, key=f"{SETTINGS_KEY}.tokenizer")
        models = self.client.models(deadline=self._deadline())
        if config.model not in models:
            raise RewardError(
                f"{config.base_url} does not serve reward.settings.model={config.model}; it serves "
                f"{', '.join(models)[:300] or 'nothing'}."
            )
        served = models[config.model]
        length = config.max_model_len or served.get("max_model_len")
        if not isinstance(length, int) or length < 16:
            raise RewardError(
                f"{config.base_url} does not report how long a sequence {config.model} can read: set "
                "reward.settings.max_model_len to its context length in tokens."
            )
        self._room = length - 1  # one token is generated behind every sequence
        self.encoder = PromptEncoder(tokenizer, config.prompting, max_positions=self._room)
        self.uses_context = self.encoder.uses_context
        parts = {
            "model": [config.model, served.get("root"), config.version],
            "dialect": "vllm",  # caches of earlier versions stay valid
            "tokenizer": [config.tokenizer_source, fingerprint(folder)],
            **self.encoder.identity,
        }
        self.identity = f"remote:{config.model}:{hash_of(parts)[:16]}"
        self.probe_scores = self._check_self()

    def score(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> list[list[TextScore]]:
        """Scores texts behind their contexts; equal (context, text) pairs are sent once.

        Args:
            requests: (context, texts) pairs; the empty context and the empty text are allowed.

        Returns:
            Per request one list, per text one score, in the given order; NaN for a text that does not fit the LLM
            or, with −1 tokens, whose request failed.

        Raises:
            RefusedError: the server refuses the key or does not know the model.
            LLMError: the template alone exceeds the prompt's limit.
        """
        encoded = [
            (self.encoder.encode_prompt(context), self.encoder.encode_texts(texts)) for context, texts in requests
        ]
        wanted: dict[Ids, dict[Ids, TextScore]] = {}
        for prompt, texts in encoded:
            wanted.setdefault(prompt, {}).update((ids, TextScore(math.nan, len(ids))) for ids in texts)
        # A request holds one prompt only: its texts are then all different, so that two swapped answers show.
        batches = [(prompt, batch) for prompt, texts in wanted.items() for batch in self._batches(prompt, list(texts))]
        for (prompt, batch), sums in zip(batches, self._send_all(batches), strict=True):
            scores = [TextScore(logp, len(ids)) for logp, ids in zip(sums, batch, strict=True)] if sums else None
            wanted[prompt].update(zip(batch, scores or [_FAILED] * len(batch), strict=True))
        return [[wanted[prompt][ids] for ids in texts] for prompt, texts in encoded]

    def _batches(self, prompt: Ids, texts: Sequence[Ids]) -> list[list[Ids]]:
        """The texts that the LLM can read, as many per request as allowed."""
        fitting = [ids for ids in texts if len(prompt) + len(ids) <= self._room]
        if len(fitting) < len(texts) and not self._warned_long:
            self._warned_long = True
            logger.warning(
                "A hypothesis is longer than the LLM can read (%d tokens with its prompt): NaN.", self._room
            )
        size = self._config.batch_size
        return [fitting[start : start + size] for start in range(0, len(fitting), size)]

    def _send_all(self, batches: Sequence[tuple[Ids, list[Ids]]]) -> list[list[float] | None]:
        """Returns the sums of each batch, None for one that failed."""
        deadline = self._deadline()

        def _send(batch: tuple[Ids, list[Ids]]) -> list[float] | RewardError:
            try:
                return self.client.sums(*batch, deadline=deadline)
            except RefusedError:
                raise
            except RewardError as error:
                return error

        with ThreadPoolExecutor(max_workers=self._config.max_in_flight) as pool:
            answers = list(pool.map(_send, batches))
        for (_, texts), answer in zip(batches, answers, strict=True):
            if isinstance(answer, RewardError):
                self.num_failed_requests += 1
                more = " Later ones are counted, not logged." if self.num_failed_requests == _LOGGED_FAILURES else ""
                if self.num_failed_requests <= _LOGGED_FAILURES:
                    logger.warning("%d hypotheses got no score: %s%s", len(texts), answer, more)
        return [None if isinstance(answer, RewardError) else answer for answer in answers]

    def _deadline(self) -> float:
        return time.monotonic() + self._config.deadline_s

    def _check_self(self) -> dict[str, TextScore]:
        """Scores short texts in several ways and returns their scores.

        Whole texts must score as the sum of their two parts, and a generated token must have the log p that it has
        as a part of the input: shifted or foreign values do not pass both. Where ``check_against`` names the LLM's
        folder, its scores must agree too.

        Raises:
            RewardError: they differ, a score is not finite, or the server does not answer as it should.
        """
        prompt, deadline = self.encoder.encode_prompt(_PROBE_CONTEXT), self._deadline()
        texts = self.encoder.encode_texts(_PROBE_TEXTS)
        try:
            sums = self.client.sums(prompt, texts, deadline=deadline)
            for ids, whole in zip(texts, sums, strict=True):
                if cut := len(ids) // 2:
                    (first,) = self.client.sums(prompt, [ids[:cut]], deadline=deadline)
                    (second,) = self.client.sums(prompt + ids[:cut], [ids[cut:]], deadline=deadline)
                    self._compare("in two parts", first + second, whole, len(ids))
            start = prompt + (texts[0][:-1] or texts[0])
            token, generated = self.client.generate(start, deadline=deadline)
            (as_input,) = self.client.sums(start, [(token,)], deadline=deadline)
            self._compare("as a generated token", generated, as_input, 1)
        except RefusedError:
            raise
        except RewardError as error:
            raise RewardError(f"The scoring server failed the start-up check: {error}") from error
        if self._config.check_against is not None:
            local = load_llm(self._config.prompting).score([(_PROBE_CONTEXT, _PROBE_TEXTS)])[0]
            for score, whole in zip(local, sums, strict=True):
                self._compare("by reward.settings.check_against", score.logp, whole, score.num_tokens)
        return {text: TextScore(logp, len(ids)) for text, ids, logp in zip(_PROBE_TEXTS, texts, sums, strict=True)}

    def _compare(self, way: str, score: float, reference: float, num_tokens: int) -> None:
        if not _agree(score, reference, num_tokens):
            raise RewardError(
                f"{self._config.base_url}: a short text of {num_tokens} tokens scores {score:.3f} nat {way} and "
                f"{reference:.3f} nat as input. The server's log-probabilities are not those of its input, or it "
                "serves another model than you think."
            )


def _agree(score: float, reference: float, num_tokens: int) -> bool:
    """Whether two scores of one text are the same but for rounding; NaN and ∞ never are."""
    return abs(score - reference) <= _TOLERANCE * math.sqrt(num_tokens)


@register("remote")
class RemoteReward(LLMReward):
    """:class:`LLMReward` on a server, which is checked first; a group with a failed request is NaN as a whole.

    Args:
        settings: what ``reward.settings`` holds; see :class:`RemoteConfig`.
        alpha, beta, normalize, asr_weight, cache, allow_no_context: see :class:`LLMReward`.

    Attributes:
        remote: scores texts on the server.
        failed: counts the groups without a reward.

    Raises:
        ConfigError: faults of the settings.
        LLMError, RewardError: see :class:`RemoteScorer`; or the cache has scores of another model under the same name.
            On call, as :class:`LLMReward`, or too many groups failed.
    """

    name = "remote"

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        alpha: float,
        beta: float,
        normalize: str = "sum",
        asr_weight: float = 1.0,
        cache: ScoreCache | str | None = None,
        allow_no_context: bool = False,
    ) -> None:
        config = parse_remote(settings)
        self.remote = RemoteScorer(config)
        super().__init__(
            self.remote,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            asr_weight=asr_weight,
            cache=cache,
            view=LLMView.of(config.prompting),
            allow_no_context=allow_no_context,
        )
        self._lost: set[Pair] = set()
        self.failed = FailedGroups(
            "the scoring server",
            most=config.max_failed,
            fix=f"reward.settings.max_failed={config.max_failed}: see the warnings above and the server's log. "
            "Answered scores are in the cache, and a run that is resumed does not ask for them again.",
        )
        self._check_cache()

    def _counted(self, groups: Sequence[HypothesisGroup]) -> list[list[float]]:
        """The log-probabilities of groups as the LLM sees them; NaN in all of a failed one.

        Raises:
            RewardError: too many groups failed.
        """
        self._lost.clear()
        rows = self._llm_part(groups)
        lost = [any((c, text) in self._lost for text in g.texts for c in (g.context, Context())) for g in groups]
        self.failed.add(lost)
        return [[math.nan] * len(row) if is_lost else row for row, is_lost in zip(rows, lost, strict=True)]

    def _ask(self, requests: list[tuple[Context, list[str]]]) -> list[list[list[TextScore]]]:
        rows = super()._ask(requests)
        for (context, texts), row in zip(requests, rows, strict=True):
            self._lost.update((context, text) for text, (s,) in zip(texts, row, strict=True) if s.num_tokens < 0)
        return rows

    def _check_cache(self) -> None:
        """Compares the start-up check's score with that of the run that filled the cache."""
        scores = self.remote.probe_scores
        keys = {text: score_key(self.remote.identity, _PROBE_CONTEXT, text) for text in scores}
        known = self.cache.get_many(keys.values())
        for text, key in keys.items():
            if key in known and not _agree(known[key].logp, *scores[text]):
                raise RewardError(
                    "reward.cache holds scores of another model that was served under the same name: give a new "
                    "reward.cache, or set reward.settings.version to tell the two apart."
                )
        self.cache.put_many({keys[text]: score for text, score in scores.items() if keys[text] not in known})
