"""Uploads an exported ``.nemo`` with its card to the Hugging Face Hub; never run against the real Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from nemo_llm_feedback.core.errors import refused
from nemo_llm_feedback.evaluation.model_card import card_path

_REFUSALS = (OSError, ValueError)  # all that the Hub's client raises derives from them


def check_login(repo: str) -> None:
    """Sees to it, before any work, that a repository can be written.

    Args:
        repo: ``OWNER/NAME`` on the Hub.

    Raises:
        ConfigError: the name is not one, nobody is logged in, or the Hub cannot be reached.
    """
    head = f"--push-to-hub {repo}: give OWNER/NAME, and log in (`hf auth login`, or set HF_TOKEN):"
    with refused(head, *_REFUSALS):
        validate_repo_id(repo)
        huggingface_hub.HfApi().whoami()


def push_to_hub(nemo: str | Path, repo: str) -> str:
    """Uploads a ``.nemo`` and its card, as ``README.md``, in one commit.

    Args:
        nemo: the file; its card is beside it (``model_card.card_path``).
        repo: ``OWNER/NAME``; one that does not exist is made, and is private.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the Hub refuses it; the files stay where they are.
    """
    path, api = Path(nemo), huggingface_hub.HfApi()
    files = {path.name: path, "README.md": card_path(path)}
    with refused(f"{path} is written, but could not be uploaded to {repo}:", *_REFUSALS):
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.create_commit(
            repo,
            [huggingface_hub.CommitOperationAdd(name, file) for name, file in files.items()],
            commit_message=f"Upload {path.name}",
        )
    return commit.commit_url
