"""``adapt`` and ``score`` as Python functions; ``nemo_llm_feedback`` exports them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_llm_feedback.cli import options as flags
from nemo_llm_feedback.core.console import quiet
from nemo_llm_feedback.rewards import Reward, as_reward
from nemo_llm_feedback.rewards.rules import RewardFunction

with quiet():  # NeMo's telemetry writes when it is imported
    from nemo_llm_feedback.cli.jobs import score as scoring
    from nemo_llm_feedback.cli.jobs.adapt import AdaptResult, AveragedRuns, adapt_runs

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
    objective: str | None = None,
    reward: Reward | RewardFunction | None = None,
    overrides: Sequence[str] = (),
) -> AdaptResult | AveragedRuns:
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
        objective: ``distill``, ``mwer``, ``grpo``, ``gspo``, ``dpo``, ``reinforce`` or ``self_training``; the
            configuration's (``distill``) if None.
        reward: judges hypotheses in place of the LLM: a ``Reward``, or a function of texts (docs/rewards.md).
        overrides: any other setting as the command takes it, e.g. ``["trainer=gpu", "guards.patience=3"]``.

    Returns:
        What the run took and gave; with ``overrides=["runs=3"]`` what the mean of the runs gave.

    Raises:
        FeedbackError: settings, manifests, checkpoint or LLM cannot be used; raised before any training.
    """
    found = flags.given(base=base, manifest=manifest, validation=validation, output=output, max_steps=max_steps)
    found |= flags.given(objective=objective, llm=llm, description=description)
    found |= flags.given(terms_file=terms) if isinstance(terms, (str, Path)) else flags.given(terms=tuple(terms))
    return adapt_runs(flags.compose(found, overrides), reward=None if reward is None else as_reward(reward))


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
    cfg = flags.compose(flags.given(description=description, terms_file=terms_file, llm=llm), overrides)
    return scoring.score(scoring.NBestProbe(model, manifest, cfg, utterances=utterances))
