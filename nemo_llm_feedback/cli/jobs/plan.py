"""The plan that a run logs before it starts: rows, hours, model, LLM and estimated memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_llm_feedback.asr.look_ahead import look_aheads
from nemo_llm_feedback.core.config import SOURCE_NAMES, RewardConfig
from nemo_llm_feedback.llm import estimate_memory, pick_placement, resolve_folder

_MB = 2**20


def plan_text(model: Any, *, source: Path, log_dir: Path) -> str:
    """The plan as lines of text.

    Args:
        model: prepared by ``setup_feedback``.
        source: the checkpoint.
        log_dir: folder of the run.
    """
    setup = model.feedback_setup
    config, staged, rates = setup.config, setup.staged, setup.rates
    held = sum(row.replay == "kl" for row in staged.rows if not row.text)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sources = ", ".join(f"{n} {name}" for name in SOURCE_NAMES if (n := getattr(config.proposals, name)))
    context = config.context.load()
    several = look_aheads(model.encoder)
    lines = [
        "plan",
        f"  checkpoint   {source.name}: {model.stock().__name__}, {parameters / 1e6:.1f} M parameters, "
        f"heads {' + '.join(h.name for h in setup.heads)}",
        f"  pool         {staged.num_unlabeled} unlabeled rows ({staged.hours(unlabeled=True):.2f} h); others: "
        f"{staged.num_labelled} with text, {held} without that hold the model ({staged.hours(unlabeled=False):.2f} h)",
        f"  left out     {', '.join(f'{len(n)} {why}' for why, n in staged.left_out.items()) or 'no row'}",
        f"  general      {setup.general_speech()}",
        f"  context      {context.description or '(no description)'}; {len(context.terms)} terms",
        *([f"  look-aheads  {', '.join(map(str, several))}: all are learned and guarded"] if several else []),
        f"  groups       {sources}; at most {config.proposals.max_members} members, "
        f"new every {config.feedback.refresh_every} steps",
        f"  objective    {config.objective.name}{' under SpecAugment' if config.feedback.augment else ''}; "
        "learning rate "
        + (f"by trial of {', '.join(f'{rate:g}' for rate in rates)}" if rates else f"{model.cfg.optim.lr:g}"),
        *([f"  reward       {reward_line(config.reward)}"] if config.needs_reward else []),
        f"  memory       model, gradients and AdamW {(4 * parameters + 12 * trainable) / _MB:.0f} MB (estimate); "
        f"frozen reference {setup.reference.memory_bytes / _MB:.0f} MB; "
        f"joint at most {config.feedback.memory_budget_mb} MB",
    ]
    if config.llm is not None and config.needs_llm:
        folder = resolve_folder(config.llm)
        device, dtype = pick_placement(config.llm)
        lines.append(
            f"  LLM          {config.llm.model} ({config.llm.quantization}, {str(dtype)[6:]} on {device}, "
            f"about {estimate_memory(folder, config.llm) / _MB:.0f} MB by estimate)"
        )
    lines.append(f"  run folder   {log_dir}")
    return "\n".join(lines)


def reward_line(config: RewardConfig) -> str:
    """The reward's name and weights, e.g. ``llm, alpha 1.4, beta 2.8``."""
    if config.scaled_by_pool:
        beta = "2·alpha" if config.beta is None else f"{config.beta:g}"
        return f"{config.name}, alpha by the pool's spread (factor {config.spread_factor:g}), beta {beta}"
    return f"{config.name}, alpha {config.weights[0]:g}, beta {config.weights[1]:g}" if config.weighed else config.name
