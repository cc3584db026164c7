"""Uploads to the Hugging Face Hub, against a stub of its client."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from nemo_llm_feedback.cli.jobs.hub import check_login, push_to_hub
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.errors import ConfigError


@pytest.fixture
def api(monkeypatch: Any) -> mock.Mock:
    """A client of the Hub that takes only calls that the real one takes."""
    stub = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    stub.create_commit.return_value = mock.Mock(commit_url="https://hub/commit/1")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stub)
    return stub


def test_the_nemo_and_its_card_go_up_in_one_commit(api: mock.Mock, tmp_path: Path) -> None:
    (tmp_path / "m.nemo").write_bytes(b"weights")
    (tmp_path / "m.md").write_text("a card")
    assert push_to_hub(tmp_path / "m.nemo", "me/asr") == "https://hub/commit/1"
    api.create_repo.assert_called_once_with("me/asr", private=True, exist_ok=True)
    (repo, operations), _ = api.create_commit.call_args
    assert repo == "me/asr"
    assert {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations} == {
        "m.nemo": b"weights",
        "README.md": b"a card",
    }


def test_an_upload_that_fails_names_the_file_that_is_there(api: mock.Mock, tmp_path: Path) -> None:
    (tmp_path / "m.nemo").write_bytes(b"weights")
    (tmp_path / "m.md").write_text("a card")
    api.create_repo.side_effect = ConnectionError("no route")
    with pytest.raises(ConfigError, match=r"m\.nemo is written, but could not be uploaded to me/asr: no route"):
        push_to_hub(tmp_path / "m.nemo", "me/asr")


def test_a_missing_login_is_found_before_any_work(api: mock.Mock, capsys: Any) -> None:
    api.whoami.side_effect = LocalTokenNotFoundError("token is required")
    assert main(["export", "absent.ckpt", "--push-to-hub", "me/asr"]) == 1
    assert "hf auth login" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        check_login("a name with spaces")
