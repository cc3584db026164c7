"""The N-best of a batch of utterances: texts, labels and scores as padded tensors, and a cache of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_llm_feedback.asr.heads import Labels
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup, pad_groups

# Score tensors by what stands on their padding.
_FILL = {"ref_logp": -math.inf, "old_logp": math.nan, "rewards": math.nan, "parts": math.nan}


@dataclass(frozen=True, eq=False)
class NBestBatch:
    """B utterances with up to N hypotheses each, and everything that an objective needs but the policy's log p.

    All tensors are [B, N], float32, on the CPU and without gradient.

    Attributes:
        utterances: B names.
        contexts: B contexts, merged over the run's.
        hypotheses: B tuples of 1 to N members, in the order of the columns.
        ref_logp: head → log p(h | x) under the frozen reference; −inf where the audio is too short, and on padding.
        old_logp: head → log p(h | x) under the policy that proposed the member; NaN until its first use, and on
            padding.
        rewards: head → reward (each head has its reference score in it), NaN = cannot judge, and on padding.
        parts: component of the reward → its value (first head), NaN as in ``rewards``.
    """

    utterances: tuple[str, ...]
    contexts: tuple[Context, ...]
    hypotheses: tuple[tuple[Hypothesis, ...], ...]
    ref_logp: dict[str, Tensor]
    rewards: dict[str, Tensor]
    old_logp: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def sizes(self) -> list[int]:
        """Number of members per utterance."""
        return [len(row) for row in self.hypotheses]

    @property
    def mask(self) -> Tensor:
        """[B, N] bool, True for members."""
        return torch.arange(max(self.sizes))[None, :] < torch.tensor(self.sizes)[:, None]

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The members' texts per utterance."""
        return [tuple(h.text for h in row) for row in self.hypotheses]

    @property
    def sources(self) -> list[tuple[tuple[str, ...], ...]]:
        """Per utterance and member the names of all that supplied it."""
        return [tuple(h.sources for h in row) for row in self.hypotheses]

    def supplied_by(self, source: str) -> Tensor:
        """[B, N] bool, True for the members that this source supplied."""
        return pad_groups([[source in names for names in row] for row in self.sources], fill=False, dtype=torch.bool)

    @property
    def labels(self) -> list[list[Labels]]:
        """The members' label sequences per utterance, as ``Head.score`` takes them."""
        return [[h.tokens for h in row] for row in self.hypotheses]

    def with_old_logp(self, logp: Mapping[str, Tensor]) -> NBestBatch:
        """Members that are used for the first time remember the policy's log p (for ratios).

        Args:
            logp: head → [B, N] log p under the policy now.
        """
        old = {}
        for head, now in logp.items():
            before = self.old_logp.get(head, torch.full(now.shape, math.nan))
            old[head] = torch.where(before.isnan() & self.mask, now.detach().float().cpu(), before)
        return dataclasses.replace(self, old_logp=old)

    def by_the_start(self) -> NBestBatch:
        """Members that the starting model has proposed, which is the frozen reference, remember its log p."""
        return self.with_old_logp(self.ref_logp)

    def select(self, rows: Sequence[int]) -> NBestBatch:
        """The utterances at these positions, padded to the largest of them."""
        hypotheses = tuple(self.hypotheses[b] for b in rows)
        width = max((len(row) for row in hypotheses), default=0)
        scores = {
            name: {key: values[list(rows)][:, :width] for key, values in getattr(self, name).items()} for name in _FILL
        }
        return NBestBatch(
            tuple(self.utterances[b] for b in rows), tuple(self.contexts[b] for b in rows), hypotheses, **scores
        )

    @staticmethod
    def cat(batches: Sequence[NBestBatch]) -> NBestBatch:
        """The utterances of several batches (at least one) of the same heads, one after another."""
        width = max(max(batch.sizes) for batch in batches)
        scores: dict[str, dict[str, Tensor]] = {name: {} for name in _FILL}
        for name, fill in _FILL.items():
            for key in dict.fromkeys(key for batch in batches for key in getattr(batch, name)):
                known = [getattr(b, name).get(key, torch.full((len(b), max(b.sizes)), fill)) for b in batches]
                wide = [torch.nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in known]
                scores[name][key] = torch.cat(wide)
        return NBestBatch(
            tuple(u for batch in batches for u in batch.utterances),
            tuple(c for batch in batches for c in batch.contexts),
            tuple(row for batch in batches for row in batch.hypotheses),
            **scores,
        )

    def to_plain(self) -> dict[str, Any]:
        """Tensors in plain lists and dicts, for a training checkpoint."""
        plain = {name: getattr(self, name) for name in _FILL}
        place = {context: at for at, context in enumerate(dict.fromkeys(self.contexts))}
        return {
            **plain,
            "utterances": list(self.utterances),
            "contexts": [dataclasses.asdict(context) for context in place],  # each once: a list may have thousands
            "context_of": [place[context] for context in self.contexts],
            "hypotheses": [[(h.text, list(h.tokens), *h.sources) for h in row] for row in self.hypotheses],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> NBestBatch:
        """The inverse of :meth:`to_plain`."""
        known = [Context(c["description"], tuple(c["terms"]), tuple(c["previous"])) for c in plain["contexts"]]
        contexts = (known[at] for at in plain["context_of"])
        rows = (
            tuple(Hypothesis(text, tuple(y), source, tuple(also)) for text, y, source, *also in row)
            for row in plain["hypotheses"]
        )
        scores = {name: plain[name] for name in _FILL}
        return cls(tuple(plain["utterances"]), tuple(contexts), tuple(rows), **scores)


def hypothesis_groups(
    utterances: Sequence[str],
    contexts: Sequence[Context],
    hypotheses: Sequence[tuple[Hypothesis, ...]],
    ref_logp: Tensor,
    *,
    texts: Sequence[str] = (),
) -> list[HypothesisGroup]:
    """What a reward is given, from B names, contexts, members and normalised transcripts, [B, N] reference scores."""
    rows = zip(utterances, contexts, hypotheses, ref_logp.tolist(), texts or [""] * len(utterances), strict=True)
    return [HypothesisGroup(u, members, c, tuple(logp[: len(members)]), text) for u, c, members, logp, text in rows]


class NBestCache:
    """N-best lists of utterances by name, kept until they are refreshed.

    Attributes:
        refresh: index of the refresh that the kept lists belong to.
        filled: index of the refresh in which the whole pool was put in; −1 = none.
        latest: the batch that was put in or taken out last, for logs.
    """

    def __init__(self) -> None:
        self.refresh, self.filled = 0, -1
        self.latest: NBestBatch | None = None
        self._rows: dict[str, NBestBatch] = {}

    def __contains__(self, utterance: str) -> bool:
        return utterance in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def start(self, refresh: int) -> None:
        """Forgets what belongs to another refresh: a large pool would fill the memory and every checkpoint."""
        if refresh != self.refresh:
            self.refresh, self._rows = refresh, {}

    def put(self, nbest: NBestBatch) -> None:
        """Keeps every utterance of a batch, in place of what was kept under its name."""
        self.latest = nbest
        self._rows.update({utterance: nbest.select([b]) for b, utterance in enumerate(nbest.utterances)})

    def get(self, utterances: Sequence[str]) -> NBestBatch:
        """The kept lists of these utterances as one batch.

        Raises:
            KeyError: one of them is not kept.
        """
        self.latest = NBestBatch.cat([self._rows[utterance] for utterance in utterances])
        return self.latest

    def to_plain(self) -> dict[str, Any]:
        """Plain data for a training checkpoint."""
        kept = NBestBatch.cat(list(self._rows.values())).to_plain() if self._rows else None
        return {"refresh": self.refresh, "kept": kept}

    def load_plain(self, plain: Mapping[str, Any]) -> None:
        """Adds what :meth:`to_plain` gave."""
        self.start(plain["refresh"])
        if plain["kept"] is not None:
            self.put(NBestBatch.from_plain(plain["kept"]))
