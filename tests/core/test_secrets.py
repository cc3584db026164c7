"""Secrets: hidden in settings and command lines, whatever form they are given in; everything else stays."""

from __future__ import annotations

from nemo_llm_feedback.core.secrets import masked, masked_command


def test_values_of_secret_keys_are_hidden_and_others_stay() -> None:
    tree = {
        "api_key": "sk-1",
        "hf_token": None,
        "reward": {"settings": {"authorization": "Bearer x", "api_key_env": "KEY", "max_context_tokens": 3}},
        "hosts": ["http://me:pw@host:80/v1", 1, True],
    }
    assert masked(tree) == {
        "api_key": "(hidden)",
        "hf_token": None,
        "reward": {"settings": {"authorization": "(hidden)", "api_key_env": "KEY", "max_context_tokens": 3}},
        "hosts": ["http://(hidden)@host:80/v1", 1, True],
    }


def test_a_command_hides_every_form_of_a_secret() -> None:
    given = [
        "nlf",
        "llm.token=sk-1",
        "--api-key",
        "sk-1",
        "--api-key=sk-1",
        "reward.settings={api_key: sk-1, retries: 2}",
    ]
    shown = masked_command([*given, "context.description=the token: a coin", "a=1 b"])
    assert shown == [
        "nlf",
        "llm.token=(hidden)",
        "--api-key",
        "(hidden)",
        "--api-key=(hidden)",
        "reward.settings={api_key: (hidden), retries: 2}",
        "context.description=the token: a coin",
        "a=1 b",
    ]
