"""What is asked of a vLLM and of an SGLang server, and how their answers are read: pure functions of plain data.

Both score token ids that are made here, so no server-side tokenisation can change them, and both answer with the ids
beside the log-probabilities. Every answer is compared with what was asked, id by id: a shifted, reordered or cut
answer is an error, never a score. Log-probabilities are asked for at temperature 1 without any filter or penalty;
a model's generation_config.json could otherwise set some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_llm_feedback.core.errors import RewardError

Ids = tuple[int, ...]
_FLOOR = -9999.0  # vLLM writes −∞ as this, JSON having no infinity
_ROUNDING = 1e-3  # a log-probability may exceed 0 by so much


@dataclass(frozen=True)
class Continuation:
    """Token ids to score behind a prompt's, at least one each."""

    prompt: Ids
    ids: Ids

    @property
    def whole(self) -> Ids:
        """Prompt and continuation."""
        return self.prompt + self.ids


class Dialect(Protocol):
    """A kind of server. ``answer`` is the parsed JSON, of any shape; a wrong one raises :class:`RewardError`."""

    path: str

    def request(self, model: str, continuations: Sequence[Continuation], *, generate: bool = False) -> dict[str, Any]:
        """Returns the body that asks for the log-probabilities; with ``generate`` also for one token's after it."""

    def read(self, answer: Any, continuations: Sequence[Continuation]) -> list[list[float]]:
        """Returns log p of every continuation's tokens, natural log, −∞ included."""

    def read_generated(self, answer: Any) -> tuple[int, float]:
        """Returns the token that was generated after the only continuation, and its log p."""


class VLLM:
    """vLLM's ``/v1/completions``: the prompt's log-probabilities, entry t a mapping of the id at t to its value."""

    path = "/v1/completions"

    def request(self, model: str, continuations: Sequence[Continuation], *, generate: bool = False) -> dict[str, Any]:
        """Returns the request's body. A token is always generated: vLLM refuses to generate none."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": [list(c.whole) for c in continuations],
            "max_tokens": 1,
            "prompt_logprobs": 0,  # the token that stands there and no others
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
        }
        return {**body, "logprobs": 0, "return_tokens_as_token_ids": True} if generate else body

    def read(self, answer: Any, continuations: Sequence[Continuation]) -> list[list[float]]:
        """Returns the log-probabilities; choices may come in any order, their index tells whose they are."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise RewardError("the answer has no choices: is this a vLLM server (reward.settings.dialect)?")
        by_index = {choice.get("index"): choice for choice in choices}
        if len(choices) != len(continuations) or by_index.keys() != set(range(len(continuations))):
            raise RewardError(
                f"{len(continuations)} sequences were sent, the answer has {len(choices)} choices with the indices "
                f"{[choice.get('index') for choice in choices][:20]}."
            )
        return [self._read_one(by_index[n], continuation) for n, continuation in enumerate(continuations)]

    def _read_one(self, choice: dict[str, Any], continuation: Continuation) -> list[float]:
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise RewardError(
                "the answer has no prompt_logprobs: the server, or a proxy before it, ignores that field. Point "
                "reward.settings.base_url at vLLM itself."
            )
        whole = continuation.whole
        ids = [_only_key(entry) for entry in entries]
        if len(ids) != len(whole) or ids[1:] != [str(i) for i in whole[1:]]:  # nothing comes before the first token
            raise RewardError(_mismatch(ids[1:], whole[1:]))
        first = len(continuation.prompt)
        return [_number(entry[str(i)].get("logprob")) for entry, i in zip(entries[first:], whole[first:], strict=True)]

    def read_generated(self, answer: Any) -> tuple[int, float]:
        """Returns the generated token and its log p."""
        try:
            logprobs = answer["choices"][0]["logprobs"]
            return int(logprobs["tokens"][0].removeprefix("token_id:")), _number(logprobs["token_logprobs"][0])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise RewardError("the answer has no log-probability of the generated token.") from error


class SGLang:
    """SGLang's ``/generate``: [log p, id, text] of every token from ``logprob_start_len`` on, the first without log p.

    It is therefore asked from the prompt's last token on.
    """

    path = "/generate"

    def request(self, model: str, continuations: Sequence[Continuation], *, generate: bool = False) -> dict[str, Any]:
        """Returns the request's body; a server has one model, so ``model`` is not sent."""
        return {
            "input_ids": [list(c.whole) for c in continuations],
            "sampling_params": {
                "max_new_tokens": int(generate),
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "repetition_penalty": 1.0,
            },
            "return_logprob": True,
            "logprob_start_len": [len(c.prompt) - 1 for c in continuations],
            "top_logprobs_num": 0,
        }

    def read(self, answer: Any, continuations: Sequence[Continuation]) -> list[list[float]]:
        """Returns the log-probabilities; answers come in the order of the sequences."""
        if not isinstance(answer, list) or not all(isinstance(one, dict) for one in answer):
            raise RewardError("the answer is no list of objects: is this an SGLang server (reward.settings.dialect)?")
        if len(answer) != len(continuations):
            raise RewardError(f"{len(continuations)} sequences were sent, {len(answer)} answers came.")
        return [self._read_one(one, continuation) for one, continuation in zip(answer, continuations, strict=True)]

    def _read_one(self, one: dict[str, Any], continuation: Continuation) -> list[float]:
        meta = one.get("meta_info")
        entries = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        if not isinstance(entries, list) or not entries:
            raise RewardError("the answer has no input_token_logprobs: the server aborted the request or ignores it.")
        if not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
            raise RewardError("the answer's input_token_logprobs are not of the form [log-probability, id, text].")
        count = len(continuation.ids)
        ids = [entry[1] for entry in entries]
        # Some versions leave the entry without a log-probability out.
        if len(ids) not in (count, count + 1) or ids != list(continuation.whole[-len(ids) :]):
            raise RewardError(_mismatch(ids, continuation.whole[-count - 1 :]))
        total = meta.get("prompt_tokens") if isinstance(meta, dict) else None
        if total is not None and total != len(continuation.whole):
            raise RewardError(f"{len(continuation.whole)} tokens were sent, the server read {total}: it cuts inputs.")
        return [_number(entry[0]) for entry in entries[-count:]]

    def read_generated(self, answer: Any) -> tuple[int, float]:
        """Returns the generated token and its log p."""
        try:
            logp, token, *_ = answer[0]["meta_info"]["output_token_logprobs"][0]
            return int(token), _number(logp)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RewardError("the answer has no log-probability of the generated token.") from error


DIALECTS: dict[str, Dialect] = {"vllm": VLLM(), "sglang": SGLang()}


def _only_key(entry: Any) -> str | None:
    """The id of a position that has exactly one candidate with its values, else None, which equals no id."""
    if isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict):
        return str(next(iter(entry)))
    return None


def _mismatch(got: Sequence[Any], wanted: Sequence[int]) -> str:
    first = next((n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if str(a) != str(b)), None)
    where = "" if first is None else f", and number {first} is {got[first]} instead of {wanted[first]}"
    return (
        f"the answer's token ids are not those that were sent: {len(got)} for {len(wanted)}{where}. The server "
        "shifts, reorders, cuts or re-tokenises its input."
    )


def _number(value: Any) -> float:
    """Returns a log-probability, −∞ for vLLM's stand-in.

    Raises:
        RewardError: it is missing, not a number, or above 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value > _ROUNDING:
        raise RewardError(f"a log-probability of the answer is missing or impossible ({value!r}).")
    return -math.inf if value <= _FLOOR else float(value)
