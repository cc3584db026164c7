"""Settings of the remote reward: all faults at once, each with its fix, and the YAML shows the defaults."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nemo_llm_feedback.core.config.compose import conf_dir
from nemo_llm_feedback.core.errors import ConfigError, RewardError
from nemo_llm_feedback.rewards import RemoteConfig, parse_remote
from nemo_llm_feedback.rewards.remote.client import Client, _asked_wait, _number


def test_all_faults_of_the_settings_come_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    with pytest.raises(ConfigError) as error:
        parse_remote(
            {
                "base_url": "http://me:hunter2@host:8000",
                "model": "",
                "tokenizer": str(tmp_path / "absent"),
                "api_key_env": "ABSENT_KEY",
                "timeout_s": 0,
                "retries": -1,
                "max_failed": 1.0,
                "chat": "maybe",
                "timout_s": 3,
            }
        )
    text = str(error.value)
    for words in ("base_url", "model is empty", "ABSENT_KEY", "timeout_s must be > 0", "retries", "max_failed"):
        assert words in text
    assert "unknown key reward.settings.timout_s; did you mean reward.settings.timeout_s" in text
    assert "reward.settings.chat must be one of auto, on, off" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_url": "localhost:8000"}, "not an address"),
        ({"base_url": "http://host:99999"}, "not an address"),
        ({"max_in_flight": "many"}, "max_in_flight must be int, got 'many'"),
        ({"batch_size": True}, "batch_size must be int, got True"),
        ({"timeout_s": float("inf")}, "timeout_s must be a finite number, got inf"),
        ({"truecasing": "loud"}, "truecasing must be one of .*english, got 'loud'"),
        ({"restore": "english"}, r"reward\.settings\.restore is now reward\.settings\.truecasing"),
        ({"dialect": "vllm"}, "dialect is now always vLLM's"),
        ({"tokenizer": "/absent/folder"}, "neither a folder, a GGUF file nor a hub id"),
        ({"check_against": "/absent/folder"}, "check_against"),
        ({"template": 3}, "template must be str, got 3"),
    ],
)
def test_faults_name_the_fix(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_remote({"base_url": "http://host:8000/v1", "model": "owner/name", **changes})


def test_the_address_may_end_in_v1_as_openai_clients_want_it() -> None:
    for url in ("http://host:8000", "http://host:8000/", "http://host:8000/v1", "http://host:8000/v1/"):
        assert parse_remote({"base_url": url, "model": "owner/name"}).api_root == "http://host:8000"
    assert parse_remote({"base_url": "https://host/llm/v1", "model": "a/b"}).api_root == "https://host/llm"


def test_the_yaml_shows_every_default() -> None:
    shown = yaml.safe_load((conf_dir() / "reward" / "remote.yaml").read_text(encoding="utf-8"))
    assert shown["name"] == "remote"
    fields = RemoteConfig.__pydantic_fields__
    assert shown["settings"] == {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


@pytest.mark.parametrize("index", [True, "0", [0], {"n": 0}, None, 0.0])
def test_an_index_of_another_type_is_a_typed_error(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(parse_remote({"base_url": "http://localhost:1", "model": "someone/tiny"}))
    monkeypatch.setattr(client, "_ask", lambda send, deadline: {"choices": [{"index": index}]})
    with pytest.raises(RewardError, match="1 sequences were sent"):
        client.sums((1,), [(2,)], deadline=0.0)


@pytest.mark.parametrize("value", [10**400, float("nan"), True, "x" * 1000, None, [0]])
def test_an_impossible_log_probability_is_a_short_typed_error(value: Any) -> None:
    with pytest.raises(RewardError, match="missing or impossible") as caught:
        _number(value)
    assert len(str(caught.value)) < 120
    assert _number(-(10**400)) == -math.inf


def test_deep_nesting_and_a_repeated_key_end_in_a_typed_error_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "tiny-secret")
    settings = {"base_url": "http://localhost:1", "model": "someone/tiny", "api_key_env": "SECRET_KEY", "retries": 0}
    client = Client(parse_remote(settings))
    deadline = time.monotonic() + 60
    with pytest.raises(RewardError, match="nested too deep"):
        client._ask(lambda timeout: SimpleNamespace(content=b"[" * 1_000_000), deadline)
    answer = client._ask(lambda timeout: SimpleNamespace(content=b'{"id": "tiny-secret"}'), deadline)
    assert answer == {"id": "***"}


@pytest.mark.parametrize("header", ["inf", "1e999", "nan", "-5", "Mon, 01 Jan 9999999 00:00:00 GMT", "", "soon"])
def test_an_absurd_retry_after_is_no_traceback(header: str) -> None:
    assert _asked_wait(header) in (0.0, math.inf)
