"""Has the next batch judged while the model learns from this one (``feedback.score_ahead``)."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.utils import logging
from torch import Tensor

from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.errors import TrainingError
from nemo_llm_feedback.core.types import pad_groups
from nemo_llm_feedback.data.resumable_loader import ResumableLoader
from nemo_llm_feedback.hypotheses.maker import Unjudged
from nemo_llm_feedback.hypotheses.nbest import NBestBatch
from nemo_llm_feedback.training.distributed import CollectiveBlock
from nemo_llm_feedback.training.pool import EncodedAudio
from nemo_llm_feedback.training.state import Feedback


class ScoreAhead(pl.Callback):
    """Proposes the next batch's groups before the step, and has a second thread judge them during it.

    The policy that proposes has not taken the step in between (one step off policy, as in asynchronous RL). Only the
    reward is asked beside the step: its LLM is frozen, while the searches need weights that stand still. On a GPU the
    thread has a stream of its own. What is judged is kept before anything that follows the step, and is in the step's
    checkpoint: a resumed run takes the same steps.
    """

    def __init__(self) -> None:
        self._judging: tuple[int, Future[NBestBatch]] | None = None
        self._stream: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Has the loader read one batch more than is asked for.

        Raises:
            TrainingError: it cannot.
        """
        loader = pl_module._train_dl
        if not isinstance(loader, ResumableLoader):
            raise TrainingError(
                f"feedback.score_ahead needs NeMo's loaders, and this is a {type(loader).__name__}: set it to false."
            )
        loader.looks_ahead = True
        if pl_module.device.type == "cuda":
            self._stream = torch.cuda.Stream(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Makes what is missing of this batch (an epoch's first), and hands the next one over."""
        feedback, step = pl_module.feedback, int(trainer.global_step)
        every, following = feedback.config.feedback.refresh_every, pl_module._train_dl.following(batch_idx)
        refresh = step // every
        coming = (step + int((batch_idx + 1) % trainer.accumulate_grad_batches == 0)) // every
        with CollectiveBlock(), evaluation_mode(pl_module), pl_module.run_precision(), torch.no_grad():
            if following is None:
                return
            for part in pl_module.encoded_pool([batch], unless=feedback.knows(refresh)):
                feedback.nbest(*part, refresh=refresh)
            for part in pl_module.encoded_pool([following], unless=feedback.knows(coming), refresh=coming):
                self._hand_over(pl_module, part, refresh=coming)

    def _hand_over(self, pl_module: Any, part: EncodedAudio, *, refresh: int) -> None:
        """Proposes now, and has a thread judge."""
        feedback: Feedback = pl_module.feedback
        unjudged, logp = feedback.maker.propose(*part), {}
        if feedback.config.on_policy:  # at its first use the policy will have moved
            logp = feedback.policy_logp(part.encoded, part.lengths, unjudged)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(part.encoded.device))
        future: Future[NBestBatch] = Future()

        def judge() -> None:
            """Puts the judged groups, or the error, into the future."""
            stream = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
            try:
                with torch.no_grad(), stream, pl_module.run_precision():  # each thread has its own modes
                    nbest = feedback.maker.judge(unjudged)
                future.set_result(nbest.with_old_logp(_of_those_left(nbest, unjudged, logp)))
            except Exception as error:
                future.set_exception(error)

        if feedback.scorer is not None and not feedback.scorer.loaded:
            judge()  # loading weights changes torch's defaults and random state for all threads
        else:
            threading.Thread(target=judge, name="score_ahead", daemon=True).start()  # no exit waits for a server
        self._judging = refresh, future

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Keeps what was judged."""
        self._keep(pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps what was judged, also for a callback that saves before this one's turn."""
        self._keep(pl_module)

    def _keep(self, pl_module: Any) -> None:
        """Waits for the thread; where judging failed the step asks again, and its error reaches all ranks."""
        if self._judging is None:
            return
        (refresh, future), self._judging = self._judging, None
        if (error := future.exception()) is None:
            pl_module.feedback.cache.start(refresh)
            pl_module.feedback.cache.put(future.result())
        else:
            logging.warning(f"feedback.score_ahead: {type(error).__name__}: {error}; the next step asks again.")
        if self._stream is not None:
            torch.cuda.current_stream(pl_module.device).wait_stream(self._stream)


def _of_those_left(nbest: NBestBatch, unjudged: Unjudged, logp: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Head → [B, N] log p of the members that judging has left, of that of those that were proposed."""
    found = {}
    for head, scores in logp.items():
        rows = zip(unjudged.hypotheses, scores.tolist(), strict=True)
        known = [{member.tokens: value for member, value in zip(*row, strict=False)} for row in rows]
        left = zip(known, nbest.labels, strict=True)
        found[head] = pad_groups([[of[y] for y in row] for of, row in left], fill=-math.inf)
    return found
