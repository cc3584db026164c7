"""A chat template, rendered once, in a process with little time and memory: a template is a program from outside.

What it writes around a message is then the same for every prompt of the run, its date included.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_llm_feedback.core.errors import LLMError

_MARK, _PROBE = "\ue001", "transcript"
_CPU_SECONDS, _SECONDS = 5, 120  # of the process, and of waiting for it on a busy machine
_MEMORY, _LONGEST = 2**29, 2**20  # bytes beyond what this process has; characters
_TODAY: ContextVar[str | None] = ContextVar("today", default=None)


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around a user's message, and behind the answer.

    Attributes:
        before, after: the text around the message, up to where the answer begins.
        end: the text behind an answer.
        gap: a space that is written before an answer that is given; no template writes it before one to generate.
    """

    before: str
    after: str
    end: str
    gap: str = ""

    def __call__(self, message: str) -> str:
        """The prompt of a message."""
        return self.before + message + self.after


@contextlib.contextmanager
def dated(day: str) -> Iterator[None]:
    """While inside, templates that write today's date write this one, in the form 2026-11-29."""
    token = _TODAY.set(day)
    try:
        yield
    finally:
        _TODAY.reset(token)


def today() -> str:
    """The date that templates write, in the form 2026-11-29."""
    return _TODAY.get() or datetime.date.today().isoformat()


def chat_frame(tokenizer: Any, settings: Mapping[str, Any]) -> ChatFrame:
    """Renders the tokenizer's chat template.

    Args:
        tokenizer: a ``transformers`` tokenizer.
        settings: variables of the template.

    Raises:
        LLMError: there is no template, it cannot be rendered within bounds, or it does not write a message and an
            answer as they are given.
    """
    if not tokenizer.chat_template:
        raise LLMError("llm.chat=on, but the tokenizer has no chat template: set llm.chat=off.")
    name = f"The chat template of {tokenizer.name_or_path}"
    if "enable_thinking" in str(tokenizer.chat_template):  # an answer is a transcript and nothing else
        settings = {"enable_thinking": False, **settings}
    moment = datetime.datetime.fromisoformat(today())

    def _rendered() -> list[str]:
        from transformers.utils import chat_template_utils

        vars(chat_template_utils)["datetime"] = SimpleNamespace(now=lambda *zone: moment)
        user, other = ({"role": "user", "content": text} for text in (_MARK, _PROBE))
        chats = [[user], [other], [user, {"role": "assistant", "content": _PROBE}]]
        return [
            tokenizer.apply_chat_template(chat, **settings, tokenize=False, add_generation_prompt=len(chat) == 1)
            for chat in chats
        ]

    texts, fault = _bounded(_rendered)
    if fault:
        raise LLMError(
            f"{name} cannot be rendered ({fault}): set llm.chat=off, or use the template of the model's publisher."
        )
    question, other, whole = texts
    before, *after = question.split(_MARK)
    if len(after) != 1 or other != before + _PROBE + after[0]:
        raise LLMError(f"{name} does not write the message once and as it is given: set llm.chat=off.")
    behind = whole.removeprefix(question)
    answer = behind.lstrip()
    gap = behind[: len(behind) - len(answer)]
    if not (whole.startswith(question) and answer.startswith(_PROBE)):
        raise LLMError(
            f"{name} writes one thing before a given answer and another before a generated one, so a transcript "
            "cannot be scored as the answer: for a thinking model name its switch (enable_thinking is off already) "
            "in llm.chat_template_kwargs={NAME: false}, for another set llm.chat=off."
        )
    end = answer.removeprefix(_PROBE)
    # Only the last space can be a part of the answer's first token; what stands before it is the prompt's.
    space = " " if gap.endswith(" ") else ""
    return ChatFrame(before, after[0] + gap.removesuffix(" "), end, space)


def _bounded(work: Callable[[], list[str]]) -> tuple[list[str], str]:
    """What a function returns in a copy of this process that may use little time and memory, and what went wrong."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_answer, args=(work, sender))
    child.start()
    sender.close()
    try:
        if receiver.poll(_SECONDS):
            texts, fault = json.loads(receiver.recv_bytes())
            return texts, fault
    except (EOFError, OSError):  # it was ended by a limit
        pass
    finally:
        receiver.close()
        child.kill()
        child.join()
    return [], f"it takes more than {_CPU_SECONDS} s or {_MEMORY >> 20} MiB"


def _answer(work: Callable[[], list[str]], sender: Connection) -> None:  # pragma: no cover (in the other process)
    """Sends what the function returns, and ends the process."""
    try:
        with contextlib.suppress(OSError, ValueError):  # no such file elsewhere than on Linux, or a lower limit
            size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
        texts, fault = work(), ""
        if max(map(len, texts)) > _LONGEST:
            texts, fault = [], f"it writes more than {_LONGEST} characters"
    except MemoryError:
        texts, fault = [], f"it takes more than {_MEMORY >> 20} MiB"
    except BaseException as error:  # whatever it is, the other process reports it
        texts, fault = [], f"{type(error).__name__}: {str(error)[:500]}"
    with contextlib.suppress(BaseException):
        sender.send_bytes(json.dumps([texts, fault]).encode())
    os._exit(0)  # nothing of this process's own ending, such as its temporary files, is the copy's
