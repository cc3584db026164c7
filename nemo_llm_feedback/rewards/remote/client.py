"""JSON over HTTP with a deadline: retries with jitter where trying again can help, an error where it cannot.

``urllib3`` keeps the connections and ``tenacity`` runs the attempts. urllib3's own retries are off: they know no
deadline over all attempts. Redirects are not followed: they would carry the key elsewhere.
"""

from __future__ import annotations

import json
import logging
import random
import time
from typing import Any
from urllib.parse import urlsplit

import tenacity
import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError

from nemo_llm_feedback.core.errors import RewardError
from nemo_llm_feedback.rewards.remote.config import RemoteConfig, api_key

logger = logging.getLogger(__name__)

_PASSING = (408, 409, 425, 429)  # and 5xx
_REFUSED = {
    401: "it wants a key: set reward.settings.api_key_env to the environment variable that holds it",
    403: "it refuses the key of reward.settings.api_key_env",
    404: "it has no such path or model: check reward.settings.base_url, dialect and model",
    405: "it has no such path: check reward.settings.base_url and dialect",
}
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_CONNECT = 10.0  # seconds until an attempt to connect is given up
_SLOW = "; if the server is only slow, lower reward.settings.max_in_flight or raise timeout_s and deadline_s"
_PIECE = 2**16  # bytes read at once


class RefusedError(RewardError):
    """The server refuses whatever this run would ask: trying on is of no use."""


class _PassingError(Exception):
    """A failure that another attempt may not meet.

    Args:
        reason: what happened.
        wait: seconds that the server asked to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _StopBefore(tenacity.stop.stop_base):
    """Stops instead of beginning a wait that outlasts a deadline; tenacity's own measures from the first attempt."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return time.monotonic() + retry_state.upcoming_sleep >= self._deadline


class Client:
    """Talks JSON to one server; may be used by several threads at once.

    Args:
        config: checked settings. The key is read from the environment here; no message or log line holds it.

    Attributes:
        num_retries: attempts after a first one so far.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        self._key = api_key(config)
        headers = {"Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
            url = urlsplit(config.base_url)
            if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
                logger.warning("The key for %s goes over plain http: use https.", config.base_url)
        self._pool = urllib3.PoolManager(maxsize=config.max_in_flight, headers=headers, retries=False)
        self._random = random.Random()  # its own: jitter must not move the run's random state
        self.num_retries = 0

    def get(self, path: str, *, deadline: float) -> Any:
        """Returns the parsed answer to a GET; see :meth:`post`."""
        return self._attempts("GET", path, None, deadline)

    def post(self, path: str, body: dict[str, Any], *, deadline: float) -> Any:
        """Sends a body and returns the parsed answer.

        Args:
            path: below the server's address.
            body: sent as JSON.
            deadline: ``time.monotonic()`` at which the last attempt must have ended.

        Raises:
            RefusedError: wrong key, path or model.
            RewardError: every attempt failed, the deadline passed, or the server finds fault with the request.
        """
        return self._attempts("POST", path, json.dumps(body).encode(), deadline)

    def _attempts(self, method: str, path: str, body: bytes | None, deadline: float) -> Any:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            wait=self._wait,
            stop=tenacity.stop_after_attempt(self._config.retries + 1) | _StopBefore(deadline),
            before_sleep=self._count,
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body, deadline)
        except _PassingError as error:
            tried = retrying.statistics.get("attempt_number", 1)
            raise RewardError(f"{self._config.base_url}: {error} ({tried} attempts).") from error

    def _count(self, state: tenacity.RetryCallState) -> None:
        self.num_retries += 1

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Exponential back-off with full jitter, and no less than what the server asked for."""
        longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (state.attempt_number - 1))
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.wait if isinstance(error, _PassingError) else 0.0
        return asked + longest * self._random.random()

    def _once(self, method: str, path: str, body: bytes | None, deadline: float) -> Any:
        end = min(deadline, time.monotonic() + self._config.timeout_s)
        left = end - time.monotonic()
        if left <= 0:
            raise RewardError(
                f"{self._config.base_url}: no time was left of reward.settings.deadline_s={self._config.deadline_s}."
            )
        headers = {**self._pool.headers, **({"Content-Type": "application/json"} if body is not None else {})}
        try:
            response = self._pool.request(
                method,
                self._config.api_root + path,
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(connect=min(_CONNECT, left), read=left),
                redirect=False,
                preload_content=False,
            )
            content = _read(response, end)
        except ReadTimeoutError as error:
            raise _PassingError(f"no answer in {left:.0f} s{_SLOW}") from error
        except HTTPError as error:
            raise _PassingError(f"no whole answer ({self._hidden(str(error))})") from error
        if response.status != 200:
            raise self._status_error(response, content)
        try:
            return json.loads(content)
        except ValueError as error:
            raise _PassingError(f"the answer is no JSON, or cut short after {len(content)} bytes") from error

    def _status_error(self, response: urllib3.BaseHTTPResponse, content: bytes) -> Exception:
        says = self._hidden(" ".join(content[:2000].decode("utf-8", "replace").split())[:300])
        what = f"status {response.status}: {says}"
        if response.status in _PASSING or response.status >= 500:
            return _PassingError(what, _asked_wait(response))
        if response.status in _REFUSED or 300 <= response.status < 400:
            fix = _REFUSED.get(response.status, "it redirects: give the final address as reward.settings.base_url")
            return RefusedError(
                f"{self._config.base_url} answers with status {response.status}; {fix}. It says: {says}"
            )
        return RewardError(f"{self._config.base_url} refuses a request ({what}).")

    def _hidden(self, text: str) -> str:
        """The text without the key, which some servers repeat in their messages."""
        return text if self._key is None else text.replace(self._key, "***")


def _read(response: urllib3.BaseHTTPResponse, end: float) -> bytes:
    """Returns the body; a server that trickles it is cut off at ``end``, which a socket's time-out would not do."""
    pieces = []
    try:
        while piece := response.read1(_PIECE):
            pieces.append(piece)
            if time.monotonic() >= end:
                raise _PassingError(f"no whole answer in time{_SLOW}")
    except BaseException:
        response.close()  # what is left on this connection belongs to no later answer
        raise
    response.release_conn()
    return b"".join(pieces)


def _asked_wait(response: urllib3.BaseHTTPResponse) -> float:
    """Seconds of a ``Retry-After`` header, a number or a date; 0 without one."""
    try:
        return urllib3.Retry().get_retry_after(response) or 0.0
    except InvalidHeader:
        return 0.0
