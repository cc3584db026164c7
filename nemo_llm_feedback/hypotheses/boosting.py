"""NeMo's phrase boosting on the terms of each utterance, in one beam search for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Vocabulary
from nemo_llm_feedback.core.config import ProposalConfig

# Arcs kept in memory, of about 28 bytes. A list has two per label of the vocabulary and a few per term: with V 1024
# the lists of 2,000 utterances, each of which takes NeMo milliseconds to build, are kept over the refreshes.
_MAX_ARCS = 4_000_000


class Boosting:
    """Boosting trees of term lists, made once per list.

    Args:
        vocabulary: the head's vocabulary, of BPE or characters.
        config: ``context_score`` and ``depth_scaling``.
    """

    def __init__(self, vocabulary: Vocabulary, config: ProposalConfig) -> None:
        self._vocabulary, self._config = vocabulary, config
        self._places: dict[tuple[str, ...], int] = {}
        self._trees: Any = None
        self._last: tuple[Any, ListBoosting] | None = None

    def of(self, lists: Sequence[tuple[str, ...]], device: torch.device) -> ListBoosting:
        """What boosts a batch; the same object as last time for the same lists, by which searches know them.

        Args:
            lists: B lists of terms in the checkpoint's letters, none empty.
            device: where the beam search runs.
        """
        from nemo.collections.asr.parts.context_biasing.biasing_multi_model import GPUBiasingMultiModel

        if self._trees is None or self._trees.num_arcs_extended_total > _MAX_ARCS:
            self._trees = GPUBiasingMultiModel(self._vocabulary.vocab_size, use_triton=torch.cuda.is_available())
            self._places, self._last = {}, None
        for terms in dict.fromkeys(lists):
            if terms not in self._places:
                self._places[terms] = self._trees.add_model(boosting_tree(self._vocabulary, terms, self._config))
        found = tuple(self._places[terms] for terms in lists)
        key = found[:1] if len(set(found)) == 1 else found, device
        if self._last is None or self._last[0] != key:
            self._last = key, ListBoosting(self._trees.to(device), torch.tensor(key[0], device=device))
        return self._last[1]


class ListBoosting:
    """Stands where NeMo's batched beams expect a boosting tree; each utterance has the tree of its list.

    Args:
        trees: NeMo's ``GPUBiasingMultiModel``.
        places: [B] the tree of each utterance, or [1] that of all.
    """

    def __init__(self, trees: Any, places: Tensor) -> None:
        self._trees, self._places = trees, places
        self.vocab_size: int = trees.vocab_size

    def compatible_with_cuda_graphs(self) -> bool:
        """Whether a search with it can be captured: on a GPU with Triton."""
        return bool(self._trees.compatible_with_cuda_graphs())

    def to(self, device: torch.device) -> ListBoosting:
        """Nothing: it is on the beam's device already."""
        return self

    def get_init_states(self, batch_size: int, bos: bool = True) -> Tensor:
        """[batch_size] first states, of B utterances with their beams."""
        states: Tensor = self._trees.get_init_states(batch_size=batch_size, bos=bos)
        return states

    def advance(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[B · beam] states → [B · beam, V] scores and next states."""
        beams = states.shape[0] // len(self._places)
        scores, states = self._trees.advance(states=states, model_ids=self._places.repeat_interleave(beams))
        return scores, states

    def get_final(self, states: Tensor) -> Tensor:
        """Zeros like the states: a phrase that has begun at the end of the audio keeps its score, as with one tree."""
        return torch.zeros(states.shape, device=states.device)


def boosting_tree(vocabulary: Vocabulary, terms: Sequence[str], config: ProposalConfig) -> Any:
    """NeMo's phrase boosting tree over the terms, for BPE and character models.

    Args:
        vocabulary: the head's vocabulary.
        terms: at least one.
        config: ``context_score`` and ``depth_scaling``.
    """
    from nemo.collections.asr.parts.context_biasing.boosting_graph_batched import (
        BoostingTreeModelConfig,
        GPUBoostingTreeModel,
    )

    settings = BoostingTreeModelConfig(
        key_phrases_list=list(terms),
        context_score=config.context_score,
        depth_scaling=config.depth_scaling,
        use_triton=torch.cuda.is_available(),
    )
    return GPUBoostingTreeModel.from_config(settings, tokenizer=vocabulary)
