"""The average of several runs' weights: one model of the base's size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.lora import merged
from nemo_llm_feedback.core.errors import CheckpointError


class WeightAverage:
    """Takes in models that one base was fine-tuned to, and holds the mean of their weights (Wortsman et al. 2022,
    arXiv 2203.05482: "model soups").

    Only runs from one base can be averaged: their weights lie near each other, those of models that were trained
    apart do not, and their mean recognises nothing.
    """

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._first: tuple[str, type, list[str]]
        self._facts: list[Mapping[str, Any]] = []
        self._share = 0.0

    @torch.no_grad()
    def add(self, name: str, model: Any, facts: Mapping[str, Any]) -> None:
        """Takes a model's weights in; those of LoRA as merged.

        Args:
            name: of the model's file, for errors.
            model: restored on the CPU.
            facts: what its file says of its adaptation; ``base``, a file's name, is compared where it is there.

        Raises:
            CheckpointError: another class, other output symbols, other shapes or another base than the first one's.
        """
        with merged(model):
            weights = model.state_dict()
        bases = {str(known["base"]) for known in (*self._facts, facts) if known.get("base")}
        if len(bases) > 1:
            raise CheckpointError(f"{name} comes from another base ({', '.join(sorted(bases))}): {_ONE_BASE}")
        if not self._facts:
            self._first = (name, type(model), _symbols(model))
            self._mean = {key: value.clone() for key, value in weights.items()}
        self._facts.append(facts)
        self._move(name, model, weights, 1 / len(self._facts))

    @torch.no_grad()
    def mix(self, name: str, base: Any, share: float) -> None:
        """Moves the mean towards the base that the runs started from: (1 − share)·mean + share·base (Wortsman et al.
        2022, arXiv 2109.01903: the ensemble of weights that keeps what fine-tuning loses).

        Args:
            name: of the base's file, compared with the runs' ``base`` where they name one.
            base: the model, restored on the CPU.
            share: 0 ≤ share < 1.

        Raises:
            CheckpointError: not the base of the runs, by name, class, output symbols or shapes.
        """
        named = self.facts().get("base")
        if named and Path(name).name != named:
            raise CheckpointError(f"the runs started from {named}, not from {name}: give that file as --base.")
        self._move(name, base, base.state_dict(), share)
        self._share = share

    def _move(self, name: str, model: Any, weights: Mapping[str, Tensor], share: float) -> None:
        """Goes a share of the way from the mean to a model's weights, if the model is of the first one's kind."""
        first, *kind = self._first
        if [type(model), _symbols(model)] != kind:
            raise CheckpointError(f"{name} and {first} have not the same class and output symbols: {_ONE_BASE}")
        if {key: value.shape for key, value in weights.items()} != {k: v.shape for k, v in self._mean.items()}:
            raise CheckpointError(f"{name} and {first} have weights of other names or shapes: {_ONE_BASE}")
        for key, value in weights.items():
            if value.is_floating_point():
                self._mean[key] += share * (value - self._mean[key])

    def write_into(self, model: Any) -> None:
        """Gives a model of the same class, without LoRA, the mean weights."""
        model.load_state_dict(self._mean, strict=True)

    def facts(self) -> dict[str, Any]:
        """What all runs agree on, how many they were (where several), the share of the base where it was mixed in, and
        none of their error rates, which are not the average's."""
        shared = {
            key: value
            for key, value in self._facts[0].items()
            if key not in ("before", "after") and all(facts.get(key) == value for facts in self._facts)
        }
        averaged = {"averaged": len(self._facts)} if len(self._facts) > 1 else {}
        return shared | averaged | ({"base_share": self._share} if self._share else {})


_ONE_BASE = "average runs that started from one checkpoint."


def _symbols(model: Any) -> list[str]:
    """What the outputs stand for, in order: BPE pieces or characters."""
    return list(heads_of(model)[0].vocabulary.labels)
