"""NeMo's searches on the CPU as they run captured on a GPU: the replay of a graph runs the code that it was made of.

Like a graph a stand-in keeps what NeMo computes when it captures; unlike one it needs no warm-up, and launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo.collections.asr.parts.submodules.ctc_batched_beam_decoding import BatchedBeamCTCComputer
from nemo.collections.asr.parts.submodules.rnnt_malsd_batched_computer import ModifiedALSDBatchedRNNTComputer
from nemo.collections.asr.parts.submodules.tdt_malsd_batched_computer import ModifiedALSDBatchedTDTComputer
from nemo.collections.asr.parts.submodules.transducer_decoding.rnnt_label_looping import (
    GreedyBatchedRNNTLabelLoopingComputer,
)
from nemo.collections.asr.parts.submodules.transducer_decoding.tdt_label_looping import (
    GreedyBatchedTDTLabelLoopingComputer,
)

from nemo_llm_feedback.asr import searches
from nemo_llm_feedback.hypotheses.boosting import ListBoosting

# NeMo's searches, and what each calls where it captures.
CAPTURED: dict[Any, str] = {
    BatchedBeamCTCComputer: "batched_beam_search_cuda_graphs",
    ModifiedALSDBatchedRNNTComputer: "modified_alsd_cuda_graphs",
    ModifiedALSDBatchedTDTComputer: "modified_alsd_cuda_graphs",
    GreedyBatchedRNNTLabelLoopingComputer: "cuda_graphs_impl",
    GreedyBatchedTDTLabelLoopingComputer: "cuda_graphs_impl",
}


class Replay:
    """Stands for the graph of a whole search.

    Args:
        search: NeMo's search.
    """

    def __init__(self, search: Any) -> None:
        self._search = search

    def replay(self) -> None:
        """Runs what NeMo captures."""
        search = self._search
        if hasattr(search, "_before_outer_loop"):  # greedy
            search._before_outer_loop()
            while search.state.active_mask_any:
                search._before_inner_loop_get_joint_output()
                while search.state.advance_mask_any:
                    search._inner_loop_step_find_next_non_blank()
                search._after_inner_loop_step()
        elif hasattr(search, "_process_batch"):  # CTC
            search._before_process_batch()
            while search.state.active_mask_any:
                search._process_batch()
            search._after_process_batch()
        else:
            search._before_loop()
            while search.state.active_mask_any:
                search._loop_body()
                search._loop_update_decoder()


def capture(search: Any) -> None:
    """In place of NeMo's ``_full_graph_compile``."""
    search.full_graph = Replay(search)


def stand_in(patch: Callable[[Any, str, Any], Any]) -> None:
    """Lets all searches run captured, on the CPU.

    Args:
        patch: sets an attribute for a while, as ``pytest.MonkeyPatch.setattr`` does.
    """

    def allow(self: Any) -> bool:
        """Graphs wherever they are allowed."""
        self.cuda_graphs_mode = self.CudaGraphsMode.FULL_GRAPH if self.allow_cuda_graphs else None
        self.reset_cuda_graphs_state()
        return bool(self.allow_cuda_graphs)

    for kind, name in CAPTURED.items():
        plain = kind.__call__

        def call(self: Any, *args: Any, run: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            """NeMo's, without its look at the device."""
            if self.cuda_graphs_mode is None:
                return plain(self, *args, **kwargs)
            names = (
                ("decoder_outputs", "decoder_output_lengths")
                if "batched" in run
                else (
                    "encoder_output",
                    "encoder_output_length",
                )
            )
            given = [*args, *(kwargs[key] for key in ("x", "out_len") if key in kwargs)]
            return getattr(self, run)(**dict(zip(names, given, strict=False)))

        patch(kind, "maybe_enable_cuda_graphs", allow)
        patch(kind, "_full_graph_compile", lambda self: capture(self))
        if hasattr(kind, "_warmup_for_cuda_graphs"):
            patch(kind, "_warmup_for_cuda_graphs", lambda self: None)
        patch(kind, "__call__", call)
    patch(searches, "on_gpu", lambda tensor: True)
    patch(ListBoosting, "compatible_with_cuda_graphs", lambda self: True)
