"""An LLM on a vLLM or SGLang server as a scorer: the same prompts and ids as a local LLM, the forward elsewhere."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_llm_feedback.core.errors import LLMError, RewardError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm.encoding import PromptEncoder
from nemo_llm_feedback.llm.folder import fingerprint
from nemo_llm_feedback.llm.prompts import read_template
from nemo_llm_feedback.rewards.remote.client import Client, RefusedError
from nemo_llm_feedback.rewards.remote.config import RemoteConfig
from nemo_llm_feedback.rewards.remote.protocols import DIALECTS, Continuation, Ids

logger = logging.getLogger(__name__)

PROBE_CONTEXT = Context(description="a short test", terms=("one", "two"))
PROBE_TEXTS = ("one two three", "a", "two words and then some more of them")
_TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # no weights, no code
# Largest difference between two ways to the same score, in nats, times the root of the number of tokens: rounding in
# half precision or 8 bit costs hundredths to a fifth of a nat a token, of either sign; a shifted token costs nats.
_TOLERANCE = 0.25
_LOGGED_FAILURES = 5


@dataclass(frozen=True)
class RemoteScore:
    """Score of one text: ``logp`` = Σ log p of its tokens, natural log, through the end token, which ``num_tokens``
    counts too. ``logp`` is NaN for a text that does not fit the LLM or whose request failed."""

    logp: float
    num_tokens: int


class RemoteScorer:
    """Scores texts given a context on a server; a ``Scorer`` as ``rewards.lm`` wants it.

    Args:
        config: checked settings (see ``remote_config.parse_remote``).

    Attributes:
        num_requests: answered or failed requests so far, without those of the start-up check.
        num_failed_requests: those that failed after all retries.

    Raises:
        LLMError: the tokenizer or the template cannot be used.
        RewardError: the server cannot be reached, does not serve the model, or fails the start-up check.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        self._dialect = DIALECTS[config.dialect]
        self._client = Client(config)
        self._lock = threading.Lock()
        self.num_requests = 0
        self.num_failed_requests = 0
        self._failed: set[tuple[Context, str]] = set()
        self._warned_long = False
        folder, tokenizer_name, tokenizer = _load_tokenizer(config)
        served = self._served_model()
        length = config.max_model_len or served.get("max_model_len")
        if not isinstance(length, int) or length < 16:
            raise RewardError(
                f"{config.base_url} does not say how long a sequence {config.model} can read: set "
                "reward.settings.max_model_len to its context length in tokens."
            )
        self._room = length - 1  # one token is generated behind every sequence
        chat = config.chat == "on" or (config.chat == "auto" and bool(tokenizer.chat_template))
        template = read_template(config.template, chat=chat)
        self.encoder = PromptEncoder(
            tokenizer,
            template=template,
            chat=chat,
            chat_template_kwargs=config.chat_template_kwargs,
            max_tokens=min(config.max_context_tokens, self._room - min(256, self._room // 4)),
        )
        parts = {
            "model": [config.model, served.get("root"), config.version],
            "dialect": config.dialect,
            "tokenizer": [tokenizer_name, fingerprint(folder)],
            "template": template.text,
            "chat": [tokenizer.chat_template, dict(config.chat_template_kwargs)] if chat else None,
            "max_context_tokens": config.max_context_tokens,
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._identity = f"remote:{config.model}:{digest}"
        self.probe_scores = self._check_self()

    @property
    def identity(self) -> str:
        """A string that changes whenever anything does that scores depend on, as far as this side can know."""
        return self._identity

    @property
    def uses_context(self) -> bool:
        """Whether the prompt template shows the context to the LLM at all."""
        return self.encoder.uses_context

    @property
    def num_retries(self) -> int:
        """Attempts after a first one so far."""
        return self._client.num_retries

    def score(self, requests: Sequence[tuple[Context, Sequence[str]]]) -> list[list[RemoteScore]]:
        """Scores texts behind their contexts; equal (context, text) pairs are sent once.

        Args:
            requests: (context, texts) pairs; the empty context and the empty text are allowed.

        Returns:
            One list a request, one ``RemoteScore`` a text, in the given order.

        Raises:
            RefusedError: the server refuses the key or does not know the model.
            LLMError: the template alone exceeds the prompt's limit.
        """
        encoded = [
            (self.encoder.encode_prompt(context), [self.encoder.encode_text(text) for text in texts])
            for context, texts in requests
        ]
        wanted: dict[Ids, dict[Ids, float]] = {}
        for prompt, texts in encoded:
            wanted.setdefault(prompt, {}).update((ids, math.nan) for ids in texts)
        batches = [batch for prompt, texts in wanted.items() for batch in self._batches(prompt, list(texts))]
        failed: set[tuple[Ids, Ids]] = set()
        for batch, sums in zip(batches, self._send_all(batches), strict=True):
            if sums is None:
                failed.update((c.prompt, c.ids) for c in batch)
                continue
            wanted[batch[0].prompt].update((c.ids, logp) for c, logp in zip(batch, sums, strict=True))
        for (context, given), (prompt, rows) in zip(requests, encoded, strict=True):
            pairs = zip(given, rows, strict=True)
            self._failed.update((context, text) for text, ids in pairs if (prompt, ids) in failed)
        return [[RemoteScore(wanted[prompt][ids], len(ids)) for ids in texts] for prompt, texts in encoded]

    def take_failures(self) -> set[tuple[Context, str]]:
        """Returns the (context, text) pairs whose requests failed since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def _batches(self, prompt: Ids, texts: Sequence[Ids]) -> list[list[Continuation]]:
        """One prompt's texts, as many a request as allowed, without those that the LLM cannot read.

        A request holds one prompt only: its texts are then all different, so that two swapped answers show.
        """
        fitting = [Continuation(prompt, ids) for ids in texts if len(prompt) + len(ids) <= self._room]
        if len(fitting) < len(texts) and not self._warned_long:
            self._warned_long = True
            logger.warning(
                "A hypothesis is longer than the LLM can read (%d tokens with its prompt): NaN.", self._room
            )
        size = self._config.batch_size
        return [fitting[start : start + size] for start in range(0, len(fitting), size)]

    def _send_all(self, batches: Sequence[Sequence[Continuation]]) -> list[list[float] | None]:
        """Returns the sums of each batch, None for one that failed."""
        if not batches:
            return []
        deadline = time.monotonic() + self._config.deadline_s
        pool = ThreadPoolExecutor(max_workers=min(self._config.max_in_flight, len(batches)))
        try:
            return list(pool.map(lambda batch: self._try(batch, deadline), batches))
        finally:
            pool.shutdown(cancel_futures=True)

    def _try(self, batch: Sequence[Continuation], deadline: float) -> list[float] | None:
        sums, failure = None, None
        try:
            sums = self._sums(batch, deadline)
        except RefusedError:
            raise
        except RewardError as error:
            failure = error
        with self._lock:
            self.num_requests += 1
            self.num_failed_requests += failure is not None
            if failure is not None and self.num_failed_requests <= _LOGGED_FAILURES:
                more = " Later ones are counted, not logged." if self.num_failed_requests == _LOGGED_FAILURES else ""
                logger.warning("%d hypotheses got no score: %s%s", len(batch), failure, more)
        return sums

    def _sums(self, batch: Sequence[Continuation], deadline: float) -> list[float]:
        body = self._dialect.request(self._config.model, batch)
        answer = self._client.post(self._dialect.path, body, deadline=deadline)
        return [math.fsum(logp) for logp in self._dialect.read(answer, batch)]

    def _served_model(self) -> dict[str, Any]:
        """Returns what ``/v1/models`` says of the model; both kinds of server have that list."""
        answer = self._client.get("/v1/models", deadline=time.monotonic() + self._config.deadline_s)
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise RewardError(f"{self._config.base_url}/v1/models lists no models: is this a vLLM or SGLang server?")
        served = {entry["id"]: entry for entry in entries if isinstance(entry, dict) and "id" in entry}
        if self._config.model not in served:
            raise RewardError(
                f"{self._config.base_url} does not serve reward.settings.model={self._config.model}; it serves "
                f"{', '.join(map(str, served)) or 'nothing'}."
            )
        return served[self._config.model]

    def _check_self(self) -> dict[str, RemoteScore]:
        """Scores short texts in several ways and returns their scores.

        Whole texts must score as the sum of their two parts, and a generated token must have the log p that it has
        as a part of the input: shifted or foreign values do not pass both. Where ``check_against`` names the LLM's
        folder, its scores must agree too.

        Raises:
            RewardError: they differ, a score is not finite, or the server does not answer as it should.
        """
        prompt = self.encoder.encode_prompt(PROBE_CONTEXT)
        texts = [self.encoder.encode_text(text) for text in PROBE_TEXTS]
        cuts = [len(ids) // 2 for ids in texts]
        halves = [(ids[:cut], ids[cut:]) for ids, cut in zip(texts, cuts, strict=True) if cut]
        deadline = time.monotonic() + self._config.deadline_s
        try:
            whole = dict(zip(texts, self._sums([Continuation(prompt, ids) for ids in texts], deadline), strict=True))
            for head, tail in halves:
                first = self._sums([Continuation(prompt, head)], deadline)[0]
                second = self._sums([Continuation(prompt + head, tail)], deadline)[0]
                self._compare("in two parts", first + second, whole[head + tail], len(head + tail))
            start = Continuation(prompt, texts[0][:-1] or texts[0])
            body = self._dialect.request(self._config.model, [start], generate=True)
            answer = self._client.post(self._dialect.path, body, deadline=deadline)
            token, generated = self._dialect.read_generated(answer)
            as_input = self._sums([Continuation(start.whole, (token,))], deadline)[0]
            self._compare("as a generated token", generated, as_input, 1)
        except RefusedError:
            raise
        except RewardError as error:
            raise RewardError(f"The scoring server failed the start-up check: {error}") from error
        if self._config.check_against is not None:
            for text, local in zip(PROBE_TEXTS, _local_scores(self._config), strict=True):
                ids = self.encoder.encode_text(text)
                self._compare("by reward.settings.check_against", local, whole[ids], len(ids))
        return {text: RemoteScore(whole[ids], len(ids)) for text, ids in zip(PROBE_TEXTS, texts, strict=True)}

    def _compare(self, way: str, score: float, reference: float, num_tokens: int) -> None:
        if not agree(score, reference, num_tokens):
            raise RewardError(
                f"{self._config.base_url}: a short text of {num_tokens} tokens scores {score:.3f} nat {way} and "
                f"{reference:.3f} nat as input. The server's log-probabilities are not those of its input, or it "
                "serves another model than you think."
            )


def agree(score: float, reference: float, num_tokens: int) -> bool:
    """Whether two scores of one text are the same but for rounding; NaN and ∞ never are."""
    return abs(score - reference) <= _TOLERANCE * math.sqrt(num_tokens)


def _load_tokenizer(config: RemoteConfig) -> tuple[Path, str, Any]:
    """Returns the tokenizer's folder, a name of it, and the tokenizer; a hub id's files are fetched if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoTokenizer

    source = config.tokenizer_source
    folder = Path(source).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(source, revision=config.revision, allow_patterns=list(_TOKENIZER_FILES)))
        return folder, source, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (HfHubHTTPError, ValueError, OSError, KeyError, ImportError) as error:
        raise LLMError(
            f"reward.settings.tokenizer={source} cannot be loaded ({error}): give the folder of the tokenizer that "
            "the server's model uses."
        ) from error


def _local_scores(config: RemoteConfig) -> list[float]:
    """Scores of the check's texts by the LLM of ``check_against``, loaded for this only."""
    from nemo_llm_feedback.llm import load_llm

    return [score.logp for score in load_llm(config.prompting).score([(PROBE_CONTEXT, PROBE_TEXTS)])[0]]
