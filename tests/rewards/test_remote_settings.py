"""Settings of the remote reward: all faults at once, each with its fix, and the YAML shows the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_llm_feedback.core.config.compose import conf_dir
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.rewards import RemoteConfig, parse_remote


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
    assert shown["settings"] == {name: field.default for name, field in RemoteConfig.model_fields.items()}
