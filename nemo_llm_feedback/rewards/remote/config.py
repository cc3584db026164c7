"""Settings of the ``remote`` reward: where the scoring server is, what it serves, and how patient to be with it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.config.faults import choice, listing
from nemo_llm_feedback.core.config.renames import renamed
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.llm.folder import check_llm_folder, is_hub_id

DIALECT_NAMES = ("vllm", "sglang")
_KEY = "reward.settings"


@dataclass(frozen=True)
class RemoteConfig:
    """A scoring server, under ``reward.settings`` of ``reward=remote``.

    Attributes:
        base_url: address of the server, ``http://host:8000``; with a path in front of the API where a proxy adds one.
        model: the model's name on the server, as ``/v1/models`` lists it.
        dialect: ``vllm`` (``/v1/completions`` with prompt log-probabilities) or ``sglang`` (``/generate``).
        tokenizer: folder or hub id of the tokenizer that the server's model uses; null = ``model``.
        revision: branch, tag or commit of a hub id.
        version: any text; enters the cache's key. Change it when other weights are served under the same name.
        api_key_env: name of the environment variable that holds the server's key; null = the server asks for none.
        timeout_s: longest wait for one attempt of one request.
        deadline_s: longest time for all requests of one batch of groups, retries included.
        retries: attempts after the first, on time-outs, cut connections and statuses 408, 409, 425, 429 and 5xx.
        max_in_flight: requests under way at once.
        batch_size: hypotheses in one request.
        max_failed: share of the recent groups without an answer above which the run stops.
        max_model_len: longest sequence of the server's model in tokens; null = what ``/v1/models`` says.
        template, chat, chat_template_kwargs, max_context_tokens, max_terms, truecasing: what the LLM reads, as in the
            section ``llm``.
        check_against: folder of the same LLM on this machine; at start-up it is loaded unquantised, scores the check's
            texts too, and is dropped. null = the server is only checked against itself.
    """

    base_url: str = ""
    model: str = ""
    dialect: str = "vllm"
    tokenizer: str | None = None
    revision: str | None = None
    version: str = ""
    api_key_env: str | None = None
    timeout_s: float = 60.0
    deadline_s: float = 300.0
    retries: int = 5
    max_in_flight: int = 8
    batch_size: int = 16
    max_failed: float = 0.2
    max_model_len: int | None = None
    template: str | None = None
    chat: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_context_tokens: int = 1024
    max_terms: int = 200
    truecasing: str = "none"
    check_against: str | None = None

    @property
    def api_root(self) -> str:
        """``base_url`` without a closing slash or the ``/v1`` that OpenAI clients want at its end."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def tokenizer_source(self) -> str:
        """Folder or hub id of the tokenizer."""
        return self.tokenizer or self.model

    @property
    def prompting(self) -> LLMConfig:
        """The prompt's settings as those of a local LLM: ``check_against`` or, where there is none, a name only."""
        return LLMConfig(
            model=self.check_against or self.tokenizer_source,
            quantization="none",
            template=self.template,
            chat=self.chat,
            chat_template_kwargs=self.chat_template_kwargs,
            max_context_tokens=self.max_context_tokens,
            max_terms=self.max_terms,
            truecasing=self.truecasing,
        )

    def validate(self) -> list[str]:
        """Returns every fault that shows without asking the server, as a sentence that names the fix."""
        faults = [*_type_faults(self)]
        if faults:  # the checks below compare values
            return faults
        faults += _address_faults(self.base_url)
        if not self.model.strip():
            faults.append(f"{_KEY}.model is empty: give the model's name as the server's /v1/models lists it.")
        faults += choice(f"{_KEY}.dialect", self.dialect, DIALECT_NAMES)
        source = Path(self.tokenizer_source).expanduser()
        if self.model.strip() and not source.is_dir() and not is_hub_id(self.tokenizer_source):
            faults.append(
                f"{_KEY}.tokenizer={self.tokenizer_source} is neither a folder nor a hub id: token ids are made on "
                "this machine, so give the folder or hub id of the tokenizer that the server's model uses."
            )
        if self.api_key_env is not None and not _key(self.api_key_env):
            faults.append(
                f"{_KEY}.api_key_env={self.api_key_env}, but that environment variable is not set (or holds more than "
                "printable ASCII): export the server's key under that name."
            )
        for name in ("timeout_s", "deadline_s", "max_in_flight", "batch_size"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                faults.append(f"{_KEY}.{name}={getattr(self, name)} must be a number > 0.")
        if self.retries < 0:
            faults.append(f"{_KEY}.retries={self.retries} must be ≥ 0.")
        if not 0 <= self.max_failed < 1:
            faults.append(f"{_KEY}.max_failed={self.max_failed} must be a share in [0, 1).")
        if self.max_model_len is not None and self.max_model_len < 16:
            faults.append(f"{_KEY}.max_model_len={self.max_model_len} must be at least 16 tokens, or null.")
        faults += [fault.replace("llm.", f"{_KEY}.") for fault in self.prompting.validate()]
        if self.check_against is not None and not faults:
            folder_faults = check_llm_folder(self.prompting)
            faults += [fault.replace("llm.model", f"{_KEY}.check_against") for fault in folder_faults]
        return faults


def api_key(config: RemoteConfig) -> str | None:
    """Returns the server's key from the environment, or None where none is asked for."""
    return None if config.api_key_env is None else _key(config.api_key_env)


def parse_remote(settings: Mapping[str, Any]) -> RemoteConfig:
    """Makes the checked settings of ``reward.settings``; nothing is sent.

    Raises:
        ConfigError: lists every unknown key with the nearest known one, and every fault.
    """
    known = {f.name for f in dataclasses.fields(RemoteConfig)}
    faults = [
        renamed(f"{_KEY}.{key}")
        or f"unknown key {_KEY}.{key}; did you mean {_KEY}.{difflib.get_close_matches(str(key), known, 1, 0.0)[0]}?"
        for key in settings
        if key not in known
    ]
    config = RemoteConfig(**{key: value for key, value in settings.items() if key in known})
    faults += config.validate()
    if faults:
        raise ConfigError("reward=remote has " + listing(faults))
    return config


def _type_faults(config: RemoteConfig) -> list[str]:
    """Numbers given as words and the like; dataclasses do not check types themselves."""
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "float": (int, float), "int": (int,), "dict[str": (Mapping,)}
    faults = []
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), str(f.type).split(",")[0]
        wanted = kind.removesuffix(" | None")
        if value is None and wanted != kind:
            continue
        if not isinstance(value, kinds[wanted]) or isinstance(value, bool):
            faults.append(f"{_KEY}.{f.name} must be {wanted.removesuffix('[str')}, got {value!r}.")
    return faults


def _address_faults(base_url: str) -> list[str]:
    try:
        url = urlsplit(base_url)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        return [f"{_KEY}.base_url={base_url!r} is no address: give one such as http://localhost:8000."]
    if url.username or url.password or url.query or url.fragment:
        # Settings go into logs, run folders and model cards; the value is not repeated for that reason.
        return [
            f"{_KEY}.base_url holds a user name, password, query or fragment: leave them out, and give a key by "
            f"{_KEY}.api_key_env."
        ]
    return []


def _key(name: str) -> str | None:
    """The variable's value if a header can carry it."""
    value = os.environ.get(name, "").strip()
    return value if value and value.isascii() and value.isprintable() else None
