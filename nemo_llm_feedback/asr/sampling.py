"""Draws exact samples from p(y | x), for which NeMo has no decoder: alignments are drawn and their labels kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Incomplete TDT paths are drawn again this often before a row gets fewer samples than asked for.
MAX_ATTEMPTS = 8

# A path with more labels per frame than this is rejected; its probability is negligible.
MAX_LABELS_PER_FRAME = 10


def sample_ctc(
    log_probs: Tensor, lengths: Tensor, *, size: int, generator: torch.Generator
) -> list[list[tuple[int, ...]]]:
    """Draws every frame's label independently, merges repeats and removes blanks: an exact sample of CTC's p(y | x).

    Args:
        log_probs: [B, T, V+1] natural log, blank last.
        lengths: [B] frames.
        size: samples per row.
        generator: random numbers, on the CPU, so that runs agree across devices.

    Returns:
        B lists of ``size`` label sequences.
    """
    probs = log_probs.detach().double().exp().cpu()
    batch, frames, width = probs.shape
    drawn = torch.multinomial(probs.reshape(-1, width), size, replacement=True, generator=generator)
    paths = drawn.reshape(batch, frames, size).transpose(1, 2)  # [B, size, T]
    return [[collapse(path[:n], width - 1) for path in row] for row, n in zip(paths, lengths.tolist(), strict=True)]


def collapse(frames: Tensor, blank: int) -> tuple[int, ...]:
    """The labels that a CTC path [T] spells: repeats merged, blanks removed."""
    return tuple(label for label in torch.unique_consecutive(frames).tolist() if label != blank)


def sample_transducer(
    encoded: Tensor,
    lengths: Tensor,
    decoder: Any,
    joint: Any,
    *,
    size: int,
    durations: Sequence[int] = (),
    generator: torch.Generator,
) -> list[list[tuple[int, ...]]]:
    """Ancestral sampling of RNN-T and TDT alignments, one joint evaluation per step for all rows and samples.

    RNN-T: at (t, u) a token is drawn from the joint; a label moves to u + 1, a blank to t + 1. TDT draws a duration
    beside the token (they are independent given (t, u)) and moves t by it. A TDT path that is not complete — blank
    with duration 0, a jump beyond T, a label that lands on T — has no probability in log p(y | x) and is rejected, so
    what is returned are exact samples of the normalised p(y | x); a row may have fewer than ``size``.

    Args:
        encoded: [B, T, D] encoder output.
        lengths: [B] frames.
        decoder, joint: NeMo's prediction network and joint, in eval mode.
        size: samples per row.
        durations: TDT's durations in frames; empty for RNN-T.
        generator: random numbers, on the CPU.

    Returns:
        B lists of at most ``size`` label sequences.
    """
    found: list[list[tuple[int, ...]]] = [[] for _ in encoded]
    draw = functools.partial(_sample_once, encoded, lengths, decoder, joint, durations, generator)
    for _ in range(MAX_ATTEMPTS):
        missing = [size - len(row) for row in found]
        if max(missing, default=0) == 0:
            break
        found = [row + new[:n] for row, new, n in zip(found, draw(max(missing)), missing, strict=True)]
    return found


def _sample_once(
    encoded: Tensor, lengths: Tensor, decoder: Any, joint: Any, durations: Any, generator: torch.Generator, size: int
) -> list[list[tuple[int, ...]]]:
    """One attempt of ``size`` paths per row; incomplete ones are left out."""
    batch = encoded.shape[0]
    frames = joint.project_encoder(encoded).repeat_interleave(size, dim=0)
    ends = lengths.repeat_interleave(size)
    rows = torch.arange(batch * size, device=encoded.device)
    time = torch.zeros_like(rows)
    g, state = decoder.predict(None, None, add_sos=False, batch_size=len(rows))
    if state is None:  # of a stateless network, whose history begins with blanks
        state = decoder.initialize_state(g)
    g = joint.project_prednet(g)
    num_tokens = joint.num_classes_with_blank - joint.num_extra_outputs
    labels: list[list[int]] = [[] for _ in range(len(rows))]
    alive = ends > 0
    complete = ~alive
    for _ in range(int(lengths.max()) * (MAX_LABELS_PER_FRAME + 1)):
        if not bool(alive.any()):
            break
        here = frames[rows, time.clamp(max=frames.shape[1] - 1)][:, None]
        logits = joint.joint_after_projection(here, g)[:, 0, 0].double().cpu()
        token = _draw(logits[:, :num_tokens], generator)
        is_blank = token == num_tokens - 1
        step = is_blank.long()
        if durations:
            step = torch.tensor(durations)[_draw(logits[:, num_tokens:], generator)]
        is_blank, step = is_blank.to(rows.device), step.to(rows.device)
        stuck = alive & is_blank & (step == 0)
        time = torch.where(alive, time + step, time)
        ended = alive & is_blank & (time == ends) & ~stuck
        leaked = stuck | (alive & (time > ends)) | (alive & ~is_blank & (time >= ends))
        emitted = alive & ~is_blank & ~leaked
        for r in emitted.nonzero().flatten().tolist():
            labels[r].append(int(token[r]))
        complete |= ended
        alive = alive & ~ended & ~leaked
        if bool(emitted.any()):
            inputs = token.to(rows.device).masked_fill(~emitted, 0)[:, None]
            next_g, next_state = decoder.predict(inputs, state, add_sos=False, batch_size=len(rows))
            g = torch.where(emitted[:, None, None], joint.project_prednet(next_g), g)
            state = _advance(decoder, state, next_state, emitted)
    done = complete.tolist()
    return [[tuple(labels[r]) for r in range(b * size, (b + 1) * size) if done[r]] for b in range(batch)]


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """[R] indices drawn from softmax(logits [R, K]); joints that return log-probabilities give the same."""
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


def _advance(decoder: Any, state: Any, next_state: Any, emitted: Tensor) -> Any:
    """The state of rows that emitted a label moves on, the others keep theirs (by NeMo's rule for the decoder)."""
    kept = [part.clone() for part in state]
    decoder.batch_replace_states_mask(src_states=next_state, dst_states=kept, mask=emitted)
    return kept
