"""Splits NeMo's training batches into labelled, replay and unlabeled rows, with the names and contexts of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.types import Audio, Context
from nemo_llm_feedback.data.audio import mix_channels, select_channels
from nemo_llm_feedback.data.manifests import Row, merge_context, parse_context

Batch = Sequence[Any]


class Parts(NamedTuple):
    """A batch, split by what its rows are for; None where there are no such rows.

    Attributes:
        labelled: rows whose text is learned, as signal [B, S], signal_len [B] samples, tokens [B, U], tokens_len [B];
            bit-equal to the input where these are all rows.
        replay: rows on which the model should stay as it is, in the same form; a text may be empty.
        unlabeled: rows that are learned from feedback.
    """

    labelled: Batch | None
    replay: Batch | None
    unlabeled: Audio | None

    @property
    def all_labelled(self) -> bool:
        """Whether the text of every row is learned."""
        return self.replay is None and self.unlabeled is None


class BatchReader:
    """Splits batches of NeMo's loaders into labelled and unlabeled rows.

    Args:
        run_context: merged under each row's context.
        use_text: False = every row is unlabeled.
        labelled: ``supervised`` or ``replay``: what rows with text are for, unless their manifest line names it.
        rows: rows of the staged manifests, for the classic loader, whose batches hold only indices.

    Attributes:
        replays: whether any row may be a replay row.
        seen: names of the unlabeled rows in the batches so far; of tarred rows only this shows which can be read.
    """

    def __init__(
        self, run_context: Context, *, use_text: bool, labelled: str = "supervised", rows: Sequence[Row] = ()
    ) -> None:
        self._run_context, self._use_text, self._rows = run_context, use_text, tuple(rows)
        self._of_labelled = "kl" if labelled == "replay" else labelled
        self.replays = labelled == "replay" or any(row.replay == "kl" for row in rows)
        self._collection: Any = None
        self.seen: set[str] = set()
        self._marks = 0

    def attach(self, dataloader: Any) -> None:
        """Prepares for the batches of a NeMo loader.

        Of a classic dataset its collection is kept, which maps sample ids to manifest rows (filters renumber), and the
        number of start and end marks it adds to every target, also to an empty one. Lhotse loaders mix channels.

        Args:
            dataloader: NeMo's training loader.
        """
        mix_channels(dataloader)
        processor = getattr(getattr(dataloader, "dataset", None), "manifest_processor", None)
        if processor is not None:
            self._collection = processor.collection
            self._marks = (processor.bos_id is not None) + (processor.eos_id is not None)

    def split(self, batch: Batch) -> Parts:
        """Splits a batch.

        Args:
            batch: signal [B, S], signal_len [B] samples, tokens [B, U], tokens_len [B], and B sample ids or cuts.
        """
        signal, signal_len, tokens, tokens_len, ids = batch
        labelled = tokens_len > self._marks if self._use_text else torch.zeros_like(tokens_len, dtype=torch.bool)
        replayed = torch.zeros_like(labelled)
        if self.replays:
            unnamed = [self._of_labelled if has_text else "" for has_text in labelled.tolist()]
            uses = [self._about(ids, b)[2] or use for b, use in enumerate(unnamed)]
            replayed = torch.tensor([use == "kl" for use in uses], device=labelled.device)
        learned = labelled & ~replayed
        if bool(learned.all()):
            return Parts((signal, signal_len, tokens, tokens_len), None, None)
        four = (signal, signal_len, tokens, torch.where(labelled, tokens_len, torch.zeros_like(tokens_len)))
        chosen, unlabeled = ~(learned | replayed), None
        if (part := _rows(four, chosen)) is not None:
            rows = [self._about(ids, b) for b in chosen.nonzero().flatten().tolist()]
            names = tuple(name for name, _, _ in rows)
            self.seen.update(names)
            contexts = tuple(merge_context(self._run_context, context) for _, context, _ in rows)
            unlabeled = Audio(part[0], part[1], names, contexts)
        return Parts(_rows(four, learned), _rows(four, replayed), unlabeled)

    def names(self, ids: Any) -> list[str]:
        """The names of all rows of a batch, from its last part."""
        return [self._about(ids, b)[0] for b in range(len(ids))]

    def _about(self, ids: Any, b: int) -> tuple[str, Context, str]:
        """Name, context and manifest key ``replay`` ("" where missing) of a row of the batch."""
        if isinstance(ids, torch.Tensor):
            index = int(ids[b])
            row = self._rows[self._collection[index].id if self._collection is not None else index]
            return row.utterance, row.context, row.replay
        # Shorter rows of a batch come as the recording with padding appended.
        cut = getattr(ids[b], "first_non_padding_cut", ids[b])
        custom = cut.custom or {}
        return _cut_name(cut), parse_context(custom.get("context")), str(custom.get("replay") or "")


def _rows(four: Batch, mask: torch.Tensor) -> Batch | None:
    """The rows of NeMo's batch of four under a [B] mask, cut to their longest; None if there are none."""
    if not bool(mask.any()):
        return None
    signal, signal_len, tokens, tokens_len = four
    kept = mask.nonzero().flatten()
    span, width = int(signal_len[kept].max()), int(tokens_len[kept].max())
    return signal[kept][:, :span], signal_len[kept], tokens[kept][:, :width], tokens_len[kept]


def _cut_name(cut: Any) -> str:
    """A name that is stable over epochs; Lhotse's id of a file is its stem, which files in two folders may share."""
    sources = cut.recording.sources if cut.has_recording else []
    if sources and sources[0].type == "file":
        return f"{sources[0].source}@{cut.start:.3f}+{cut.duration:.3f}"
    shard = (cut.custom or {}).get("shard_id", "")
    return f"{shard}/{cut.id}@{cut.start:.3f}+{cut.duration:.3f}"


def training_config(
    config: Any, *, manifest_filepath: Any, global_rank: int, world_size: int, seed: int
) -> DictConfig:
    """NeMo's ``train_ds`` with the staged manifests, set so that batches identify their rows.

    Args:
        config: the user's ``train_ds``.
        manifest_filepath: the staged copies, as in ``Staged.manifest_filepath``.
        global_rank, world_size: rank of this process and number of ranks.
        seed: the run's seed, for Lhotse's samplers, which would otherwise shuffle differently on every rank.

    Raises:
        ConfigError: a setting under which rows cannot be identified or would be dropped silently; names the fix.
    """
    faults = []
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config)
    lhotse = bool(config.get("use_lhotse"))
    if lhotse and (config.get("min_tps") is not None or config.get("max_tps") is not None):
        faults.append("model.train_ds.min_tps/max_tps count tokens, which unlabeled rows lack: remove them.")
    hiding = [key for key in ("is_concat", "shard_manifests", "use_dali") if config.get(key) and not lhotse]
    hides = "of the classic loader hides which rows a batch holds: set use_lhotse=true."
    faults += [f"model.train_ds.{key} {hides}" for key in hiding]
    tarred = config.get("tarred_audio_filepaths")
    if not lhotse and tarred is not None and not isinstance(tarred, str) and len(tarred) > 1:
        faults.append("bucketed tarred audio needs the Lhotse loader: set model.train_ds.use_lhotse=true.")
    if faults:
        raise ConfigError("\n".join(faults))
    with open_dict(config):
        config.manifest_filepath = manifest_filepath
        if lhotse:
            # NeMo's switch for batches that carry their cuts; it also takes the ranks from here.
            config.do_transcribe = True
            config.global_rank, config.world_size = global_rank, world_size
            if config.get("shard_seed") is None and tarred is None and not config.get("force_iterable_dataset"):
                # A stream keeps NeMo's seed: each rank and worker must shuffle its share, differently in every pass.
                config.shard_seed = seed
        else:
            config.return_sample_id = True
    select_channels(config)
    return config
