"""HTTP client that gets log-probabilities of token ids from a vLLM server (OpenAI-compatible completions API).

The token ids are made here, so no tokenisation of the server can change them, and vLLM answers with the ids beside the
log-probabilities. Every answer is compared with what was asked, id by id: a shifted, reordered or cut answer is an
error, never a score. Only this module imports the ``openai`` client, which is an extra of the package.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.rewards.base import RefusedError
from nemo_llm_feedback.rewards.remote.config import RemoteConfig, server_key

logger = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs a line per request

Ids = tuple[int, ...]
_PASSING = (408, 409, 425, 429)  # and 5xx
_REFUSED = {
    401: "it wants a key: set reward.settings.api_key_env to the environment variable that holds it",
    403: "it refuses the key of reward.settings.api_key_env",
    404: "it has no such path or model: check reward.settings.base_url and model, and that it is a vLLM server",
    405: "it has no such path: check reward.settings.base_url, and that it is a vLLM server",
}
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_CONNECT = 10.0  # seconds until an attempt to connect is given up
_LARGEST = 2**28  # bytes of an answer; 16 sequences of 4,096 tokens take a fortieth
_SLOW = "; if the server is only slow, lower reward.settings.max_in_flight or raise timeout_s and deadline_s"
_FLOOR = -9999.0  # vLLM writes −∞ as this, JSON having no infinity
_ROUNDING = 1e-3  # a log-probability may exceed 0 by so much
# Log-probabilities of the given tokens only, at temperature 1 and without any filter or penalty, which a model's
# generation_config.json could otherwise set. One token is always generated, since vLLM refuses to generate none.
_SCORED = {"prompt_logprobs": 0, "top_k": -1, "repetition_penalty": 1.0}
_GENERATED = {"return_tokens_as_token_ids": True}


class Client:
    """Asks one server; may be used by several threads at once.

    Args:
        config: checked settings. The key that they name is sent with every request; no message or log line holds it.

    Attributes:
        num_retries: attempts after a first one so far.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self._config, self._base_url = config, config.api_root
        self._key = key = server_key(config.api_key_env or "")
        url = urlsplit(self._base_url)
        if key is not None and url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            logger.warning("The key for %s goes over plain http: use https.", self._base_url)
        transport = _BoundedTransport(limits=httpx2.Limits(max_connections=config.max_in_flight))
        # Organisations and keys that the openai client finds in the environment belong to another service.
        transport.unsent = ("OpenAI-Organization", "OpenAI-Project", *(["Authorization"] if key is None else []))
        self._openai = openai.OpenAI(
            base_url=f"{self._base_url}/v1",
            api_key=key or "none",
            max_retries=0,  # its retries know no deadline over all attempts, and draw from the run's random state
            default_headers={"Accept-Encoding": "identity"},
            # Redirects and proxies of the environment would carry the key elsewhere.
            http_client=httpx2.Client(transport=transport, trust_env=False, follow_redirects=False),
        )
        self._random = random.Random()  # jitter must not move the run's random state
        self.num_retries = 0

    def models(self, *, deadline: float) -> dict[str, dict[str, Any]]:
        """Returns the entries of the server's list of models, by name; see :meth:`sums` for the errors."""
        answer = self._ask(self._openai.models.with_raw_response.list, deadline)
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise RewardError(f"{self._base_url}/v1/models lists no models: is this a vLLM server?")
        return {
            entry["id"]: entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        }

    def sums(self, prompt: Ids, texts: Sequence[Ids], *, deadline: float) -> list[float]:
        """Returns Σ log p(token | prompt, earlier tokens) of every text, natural log, −∞ included.

        Args:
            prompt: token ids, at least one.
            texts: token ids that follow the prompt, at least one each; all different, or
                two swapped answers would not show.
            deadline: ``time.monotonic()`` at which the last attempt must have ended.

        Raises:
            RefusedError: wrong key, path or model.
            RewardError: every attempt failed, the deadline passed, the server finds fault with the request, or the
                answer is not one to what was asked.
        """
        choices = self._complete([prompt + ids for ids in texts], deadline, _SCORED)
        return [math.fsum(_read(choice, prompt, ids)) for choice, ids in zip(choices, texts, strict=True)]

    def generate(self, prompt: Ids, *, deadline: float) -> tuple[int, float]:
        """Returns the token that the server generates after a prompt, and its log p; see :meth:`sums`."""
        (choice,) = self._complete([prompt], deadline, {**_SCORED, **_GENERATED}, logprobs=0)
        try:
            logprobs = choice["logprobs"]
            return int(logprobs["tokens"][0].removeprefix("token_id:")), _number(logprobs["token_logprobs"][0])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise RewardError("the answer has no log-probability of the generated token.") from error

    def _complete(
        self, sequences: list[Ids], deadline: float, extra: dict[str, Any], **more: Any
    ) -> list[dict[str, Any]]:
        """The choices of an answer in the order of the sequences; the server may give them in any."""

        def _send(timeout: httpx2.Timeout) -> Any:
            return self._openai.completions.with_raw_response.create(
                model=self._config.model,
                prompt=[list(ids) for ids in sequences],
                max_tokens=1,
                temperature=1.0,
                top_p=1.0,
                extra_body=extra,
                timeout=timeout,
                **more,
            )

        answer = self._ask(_send, deadline)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise RewardError("the answer has no choices: is this a vLLM server?")
        by_index = {i: choice for choice in choices if type(i := choice.get("index")) is int}  # a bool is none
        if len(choices) != len(sequences) or by_index.keys() != set(range(len(sequences))):
            raise RewardError(
                f"{len(sequences)} sequences were sent, the answer has {len(choices)} choices with the indices "
                f"{str([choice.get('index') for choice in choices])[:100]}."
            )
        return [by_index[n] for n in range(len(sequences))]

    def _ask(self, send: Callable[..., Any], deadline: float) -> Any:
        """The parsed answer, after as many attempts as are allowed where another one may help."""
        attempt = 0
        while True:
            left = min(deadline - time.monotonic(), self._config.timeout_s)
            if left <= 0:
                raise RewardError(f"{self._base_url}: no time was left of reward.settings.deadline_s.")
            attempt, asked = attempt + 1, 0.0
            try:
                answer = send(timeout=httpx2.Timeout(left, connect=min(_CONNECT, left))).content
                return json.loads(self._hidden(answer.decode()))  # no later message can repeat the key
            except openai.APIStatusError as error:
                reason, asked = self._passing(error.response), _asked_wait(error.response.headers.get("Retry-After"))
            except openai.APITimeoutError:
                reason = f"no whole answer in {left:.0f} s{_SLOW}"
            except openai.APIConnectionError as error:
                reason = f"no whole answer ({self._hidden(str(error.__cause__ or error))})"
            except (ValueError, RecursionError):
                reason = "the answer is not JSON, nested too deep, or cut short"
            # Exponential back-off with full jitter, and no less than what the server asked for.
            longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (attempt - 1))
            wait = asked + longest * self._random.random()
            if attempt > self._config.retries or time.monotonic() + wait >= deadline:
                raise RewardError(f"{self._base_url}: {reason} ({attempt} attempts).")
            self.num_retries += 1
            time.sleep(wait)

    def _passing(self, response: httpx2.Response) -> str:
        """Describes a status after which another attempt may succeed.

        Raises:
            RefusedError, RewardError: another attempt would fail, too.
        """
        status = response.status_code
        message = self._hidden(" ".join(response.text.split()))[:300]
        if status in _PASSING or status >= 500:
            return f"status {status}: {message}"
        if status in _REFUSED or 300 <= status < 400:
            fix = _REFUSED.get(status, "it redirects: give the final address as reward.settings.base_url")
            raise RefusedError(f"{self._base_url} answers with status {status}; {fix}. Its message: {message}")
        raise RewardError(f"{self._base_url} refuses a request (status {status}: {message}).")

    def _hidden(self, text: str) -> str:
        """The text without the key, which some servers repeat in their messages."""
        return text if self._key is None else text.replace(self._key, "***")


class _BoundedTransport(httpx2.HTTPTransport):
    """Reads an answer whole, up to a size and within the attempt's time, which a socket's time-out would not bound."""

    unsent: tuple[str, ...] = ()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Returns the answer with its content; compressed ones, which could grow beyond any bound, are refused."""
        for name in self.unsent:
            request.headers.pop(name, None)
        end = time.monotonic() + request.extensions["timeout"]["read"]
        response = super().handle_request(request)
        pieces, size = [], 0
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise RewardError("the answer is compressed, which was not asked for: ask the server past its proxy.")
            for piece in response.iter_raw():
                pieces.append(piece)
                size += len(piece)
                if size > _LARGEST:
                    raise RewardError(f"the answer is larger than {_LARGEST} bytes: lower reward.settings.batch_size.")
                if time.monotonic() >= end:
                    raise httpx2.ReadTimeout("no whole answer in time", request=request)
        finally:
            response.close()
        return httpx2.Response(response.status_code, headers=response.headers, content=b"".join(pieces))


def _asked_wait(header: str | None) -> float:
    """Seconds of a ``Retry-After`` header, a number or a date; 0 without one."""
    if header is None:
        return 0.0
    try:
        wait = float(header) if not header[:1].isalpha() else parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return wait if wait > 0 else 0.0


def _read(choice: dict[str, Any], prompt: Ids, ids: Ids) -> list[float]:
    """log p of the tokens behind the prompt; entry t of an answer maps the id at t to its value."""
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise RewardError(
            "the answer has no prompt_logprobs: the server, or a proxy before it, ignores that field. Point "
            "reward.settings.base_url at vLLM itself."
        )
    # The only id of each place; None, which equals no id, where there is not exactly one. The first has no values.
    got = [next(iter(e)) if isinstance(e, dict) and [*map(type, e.values())] == [dict] else None for e in entries][1:]
    wanted = [str(i) for i in (prompt + ids)[1:]]
    if got != wanted:
        differing = [n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b][:1]
        where = "".join(f", and number {n} is {str(got[n])[:40]} instead of {wanted[n]}" for n in differing)
        raise RewardError(
            f"the answer's token ids are not those that were sent: {len(got)} for {len(wanted)}{where}. The server "
            "shifts, reorders, cuts or re-tokenises its input."
        )
    return [_number(entry[str(i)].get("logprob")) for entry, i in zip(entries[len(prompt) :], ids, strict=True)]


def _number(value: Any) -> float:
    """Returns a log-probability, −∞ for vLLM's stand-in.

    Raises:
        RewardError: it is missing, not a number, or above 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= _ROUNDING:  # NaN is not, either
        raise RewardError(f"a log-probability of the answer is missing or impossible ({str(value)[:40]}).")
    return -math.inf if value <= _FLOOR else float(value)
