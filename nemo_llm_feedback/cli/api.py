"""``adapt`` and ``score`` as Python functions; ``nemo_llm_feedback`` exports them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_llm_feedback.cli.options import JudgeOptions, ProbeOptions
from nemo_llm_feedback.core.config.compose import compose_config
from nemo_llm_feedback.core.console import quiet
from nemo_llm_feedback.rewards import Reward, as_reward
from nemo_llm_feedback.rewards.rules import RewardFunction

with quiet():  # NeMo's telemetry writes when it is imported
    from nemo_llm_feedback.cli.jobs import score as scoring
    from nemo_llm_feedback.cli.jobs.adapt import AdaptResult
    from nemo_llm_feedback.cli.jobs.adapt import adapt as run_adapt

Paths = str | Path | Sequence[str | Path]


def adapt(
    base: str | Path,
    manifest: Paths,
    *,
    description: str = "",
    terms: Sequence[str] | str | Path = (),
    llm: str | Path | None = None,
    output: str | Path | None = None,
    max_steps: int | None = None,
    validation: Paths | None = None,
    objective: str = "distill",
    reward: Reward | RewardFunction | None = None,
    overrides: Sequence[str] = (),
) -> AdaptResult:
    """Adapts a checkpoint to unlabeled audio and writes a plain ``.nemo``; the command ``adapt``.

    Args:
        base: ``.nemo`` file or pretrained name.
        manifest: NeMo manifest or manifests; rows without text are learned from feedback.
        description: completes "The following is a transcript of …", e.g. ``an order at a coffee shop``.
        terms: terms that may occur, or the path of a file with them.
        llm: folder, hub id or GGUF file of a causal LM; not needed where ``reward`` is given.
        output: the adapted ``.nemo``; in the run's folder if None.
        max_steps: optimizer steps; the configuration's if None.
        validation: labelled manifest or manifests; the result has their scores before and after.
        objective: ``distill``, ``mwer``, ``grpo``, ``dpo``, ``reinforce`` or ``self_training``.
        reward: judges hypotheses in place of the LLM: a ``Reward``, or a function of texts (docs/rewards.md).
        overrides: any other setting as the command takes it, e.g. ``["trainer=gpu", "guards.patience=3"]``.

    Raises:
        FeedbackError: settings, manifests, checkpoint or LLM cannot be used; raised before any training.
    """
    cfg = compose_config([f"objective={objective}", *overrides])
    file = terms if isinstance(terms, (str, Path)) else None
    key = "init_from_nemo_model" if str(base).endswith(".nemo") else "init_from_pretrained_model"
    given = {
        key: str(base),
        "model.train_ds.manifest_filepath": _paths(manifest),
        "model.validation_ds.manifest_filepath": _paths(validation),
        "context.description": description or None,
        "context.terms": None if isinstance(terms, (str, Path)) else list(terms) or None,
        "context.terms_file": None if file is None else str(file),
        "llm.model": None if llm is None else str(llm),
        "output": None if output is None else str(output),
        "trainer.max_steps": max_steps,
    }
    for name, value in given.items():
        if value is not None:
            OmegaConf.update(cfg, name, value)
    return run_adapt(cfg, reward=None if reward is None else as_reward(reward))


def score(
    model: str | Path,
    manifest: str | Path,
    *,
    utterances: int = 10,
    description: str | None = None,
    terms_file: str | Path | None = None,
    llm: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> scoring.ScoreReport:
    """The N-best of some utterances with every component of their reward; the command ``score``.

    Args:
        model: ``.nemo`` file or pretrained name.
        manifest: NeMo manifest, with text or without.
        utterances: number of rows, spread evenly over the manifest; 0 = all.
        description: see :func:`adapt`.
        terms_file: terms that may occur.
        llm: folder, hub id or GGUF file of a causal LM.
        overrides: any other setting as ``adapt`` takes it.

    Raises:
        FeedbackError: settings, manifest, checkpoint or LLM cannot be used.
    """
    judge = JudgeOptions(
        llm=None if llm is None else str(llm),
        description=description,
        terms_file=None if terms_file is None else str(terms_file),
        overrides=tuple(overrides),
    )
    return scoring.score(ProbeOptions(str(model), manifest=str(manifest), utterances=utterances, judge=judge))


def _paths(given: Paths | None) -> Any:
    """One path as a string, several as a list of strings."""
    if given is None or isinstance(given, (str, Path)):
        return None if given is None else str(given)
    return [str(path) for path in given]
