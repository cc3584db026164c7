"""Settings of a scoring server (``reward.settings`` of ``reward=remote``), checked before anything is sent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo
from pydantic.dataclasses import dataclass

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.config.faults import STRICT, make
from nemo_llm_feedback.core.config.sections import PromptConfig
from nemo_llm_feedback.llm.folder import check_llm_folder, is_hub_id
from nemo_llm_feedback.llm.gguf import is_gguf

SETTINGS_KEY = "reward.settings"


def _address(value: str) -> str:
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"is not an address: give one such as http://localhost:8000, not {value!r}.")
    if url.username or url.password or url.query or url.fragment:
        # Settings go into logs, run folders and model cards; the value is not repeated for that reason.
        raise ValueError(
            "holds a user name, password, query or fragment: leave them out, and give a key by "
            f"{SETTINGS_KEY}.api_key_env."
        )
    return value


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty: give the model's name as the server's /v1/models lists it.")
    return value


def _tokenizer(value: str | None, info: ValidationInfo) -> str | None:
    source = value or info.data.get("model")
    if source and not (Path(source).expanduser().is_dir() or is_gguf(source) or is_hub_id(source)):
        raise ValueError(
            f"={source} is neither a folder, a GGUF file nor a hub id: token ids are made on this machine, so "
            "give the tokenizer that the server's model uses."
        )
    return value


def _key_variable(name: str | None) -> str | None:
    if name is not None and server_key(name) is None:
        raise ValueError(
            f"={name}, but that environment variable is not set (or holds more than printable ASCII): export the "
            "server's key under that name."
        )
    return name


def server_key(name: str) -> str | None:
    """The value of an environment variable if a header can carry it."""
    value = os.environ.get(name, "").strip()
    return value if value and value.isascii() and value.isprintable() else None


def _folder(value: str | None) -> str | None:
    if value and (faults := check_llm_folder(LLMConfig(model=value, quantization="none"))):
        raise ValueError(" ".join(fault.replace("llm.model", f"{SETTINGS_KEY}.check_against") for fault in faults))
    return value


@dataclass(frozen=True, config=ConfigDict(**STRICT, validate_default=True), kw_only=True)
class RemoteConfig(PromptConfig):
    """A scoring server, under ``reward.settings`` of ``reward=remote``.

    Attributes:
        base_url: address of the server, ``http://host:8000``; with a path in front of the API where a proxy adds one.
        model: the model's name on the server, as ``/v1/models`` lists it.
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
        max_model_len: longest sequence of the server's model in tokens; null = the value of ``/v1/models``.
        template, chat, chat_template_kwargs, max_context_tokens, max_terms, truecasing: what the LLM reads, as in the
            section ``llm``.
        check_against: folder of the same LLM on this machine; at start-up it is loaded unquantised, scores the check's
            texts too, and is dropped. null = the server is only checked against itself.
    """

    base_url: Annotated[str, AfterValidator(_address)] = ""
    model: Annotated[str, AfterValidator(_named)] = ""
    tokenizer: Annotated[str | None, AfterValidator(_tokenizer)] = None
    revision: str | None = None
    version: str = ""
    api_key_env: Annotated[str | None, AfterValidator(_key_variable)] = None
    timeout_s: PositiveFloat = 60.0
    deadline_s: PositiveFloat = 300.0
    retries: NonNegativeInt = 5
    max_in_flight: PositiveInt = 8
    batch_size: PositiveInt = 16
    max_failed: Annotated[float, Field(ge=0, lt=1)] = 0.2
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    check_against: Annotated[str | None, AfterValidator(_folder)] = None

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
        shared = {key.name: getattr(self, key.name) for key in fields(PromptConfig)}
        return LLMConfig(self.check_against or self.tokenizer_source, quantization="none", **shared)


def parse_remote(settings: Mapping[str, Any]) -> RemoteConfig:
    """Makes the checked settings of ``reward.settings``; nothing is sent.

    Raises:
        ConfigError: lists every unknown key with the nearest known one, and every fault.
    """
    return make(RemoteConfig, settings, where=SETTINGS_KEY, what="reward=remote has")
