"""Splits NeMo's training batches into labelled, replay and unlabeled rows, with the names and contexts of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_llm_feedback.core.config import plain
from nemo_llm_feedback.core.errors import ConfigError, DecodingError, ManifestError
from nemo_llm_feedback.core.text_files import to_number
from nemo_llm_feedback.core.types import Audio, Context, ExternalText
from nemo_llm_feedback.data.audio import guard_readers, is_augmented, select_channels
from nemo_llm_feedback.data.external import KEY, parse_hypotheses
from nemo_llm_feedback.data.manifests import Row, merge_context, parse_context

Batch = Sequence[Any]


class Parts(NamedTuple):
    """A batch, split by what its rows are for; None where there are no such rows.

    Attributes:
        labelled: rows whose text is learned, as signal [B, S], signal_len [B] samples, tokens [B, U], tokens_len [B];
            bit-equal to the input where these are all rows.
        replay: rows on which the model should stay as it is, in the same form; a text may be empty.
        unlabeled: rows that are learned from feedback, with ``feedback.labelled=reward`` also rows with text.
    """

    labelled: Batch | None
    replay: Batch | None
    unlabeled: Audio | None

    @property
    def all_labelled(self) -> bool:
        """Whether the text of every row is learned."""
        return self.labelled is not None and self.replay is None and self.unlabeled is None


class _About(NamedTuple):
    """Of a row its name, its context, what it is for ("" where the manifest names nothing), other recognisers' texts,
    and its own."""

    name: str
    context: Context
    replay: str
    external: tuple[ExternalText, ...]
    text: str


class BatchReader:
    """Splits batches of NeMo's loaders into labelled and unlabeled rows.

    Args:
        run_context: merged under each row's context.
        use_text: False = every row is unlabeled.
        labelled: ``supervised``, ``replay`` or ``reward``: what rows with text are for, unless their line names it.
        rows: rows of the staged manifests, for the classic loader, whose batches hold only indices.
        skip_bad_audio: leave rows out whose audio cannot be read, also in mid-run; otherwise they are an error.
        train_ds: NeMo's section of the loader: where it changes samples, equal names are not compared.

    Attributes:
        replays: whether any row may be a replay row.
        seen: names of the unlabeled rows in the batches so far; of tarred rows only this shows which can be read.
        left_out: names of the rows that were left out in mid-run.
    """

    def __init__(
        self,
        run_context: Context,
        *,
        use_text: bool,
        labelled: str = "supervised",
        rows: Sequence[Row] = (),
        skip_bad_audio: bool = False,
        train_ds: Mapping[str, Any] | None = None,
    ) -> None:
        self._run_context, self._use_text, self._rows = run_context, use_text, tuple(rows)
        self._of_labelled = "kl" if labelled == "replay" else labelled
        self.replays = labelled == "replay" or any(row.replay == "kl" for row in rows)
        self._collection: Any = None
        self.seen: set[str] = set()
        self.left_out: set[str] = set()
        self._skip, self._compared = skip_bad_audio, not is_augmented(train_ds or {})
        self._energy: dict[str, float] = {}
        self._marks = 0

    def attach(self, dataloader: Any) -> None:
        """Prepares for the batches of a NeMo loader.

        Of a classic dataset its collection is kept, which maps sample ids to manifest rows (filters renumber), and the
        number of start and end marks it adds to every target, also to an empty one. Channels are mixed, and files that
        cannot be read are named.

        Args:
            dataloader: NeMo's training loader.
        """
        guard_readers(dataloader, skip=self._skip)
        processor = getattr(getattr(dataloader, "dataset", None), "manifest_processor", None)
        if processor is not None:
            self._collection = processor.collection
            self._marks = (processor.bos_id is not None) + (processor.eos_id is not None)

    def split(self, batch: Batch) -> Parts:
        """Splits a batch.

        Args:
            batch: signal [B, S], signal_len [B] samples, tokens [B, U], tokens_len [B], and B sample ids or cuts.

        Raises:
            DecodingError: audio that cannot be read, unless it is skipped.
            ManifestError: two different recordings have one name.
        """
        signal, signal_len, tokens, tokens_len, ids = batch
        energy = self._energies(signal, signal_len, ids)
        good = torch.tensor([math.isfinite(value) for value in energy], device=signal.device)
        labelled = tokens_len > self._marks if self._use_text else torch.zeros_like(tokens_len, dtype=torch.bool)
        replayed, judged = torch.zeros_like(labelled), torch.zeros_like(labelled)
        if self.replays or self._of_labelled == "reward":
            unnamed = [self._of_labelled if has_text else "" for has_text in labelled.tolist()]
            uses = [self._about(ids, b).replay or use for b, use in enumerate(unnamed)]
            replayed, judged = (
                torch.tensor([use == wanted for use in uses], device=labelled.device) for wanted in ("kl", "reward")
            )
        learned = labelled & ~(replayed | judged) & good
        if bool(learned.all()):
            return Parts((signal, signal_len, tokens, tokens_len), None, None)
        four = (signal, signal_len, tokens, torch.where(labelled, tokens_len, torch.zeros_like(tokens_len)))
        replayed &= good
        chosen, unlabeled = ~(learned | replayed) & good, None
        if (part := _rows(four, chosen)) is not None:
            places = chosen.nonzero().flatten().tolist()
            rows = [self._about(ids, b) for b in places]
            names = tuple(row.name for row in rows)
            self._compare(names, [energy[b] for b in places])
            self.seen.update(names)
            contexts = tuple(merge_context(self._run_context, row.context) for row in rows)
            texts = tuple(row.text if bool(judged[b]) else "" for b, row in zip(places, rows, strict=True))
            unlabeled = Audio(part[0], part[1], names, contexts, tuple(row.external for row in rows), texts)
        return Parts(_rows(four, learned), _rows(four, replayed), unlabeled)

    def names(self, ids: Any) -> list[str]:
        """The names of all rows of a batch, from its last part."""
        return [self._about(ids, b).name for b in range(len(ids))]

    def _energies(self, signal: torch.Tensor, signal_len: torch.Tensor, ids: Any) -> list[float]:
        """The energy of each row of a [B, S] signal, by which recordings are told apart; NaN of rows to leave out."""
        if signal.dim() != 2:
            raise DecodingError(
                f"{', '.join(self.names(ids))}: the loader gives several channels: remove channel_selector."
            )
        found: list[float] = signal.double().square().sum(dim=1).tolist()
        energy = [e if n and math.isfinite(e) else math.nan for e, n in zip(found, signal_len.tolist(), strict=True)]
        bad = [self._about(ids, b).name for b, value in enumerate(energy) if value != value]
        if bad and not self._skip:
            raise DecodingError(
                f"{', '.join(bad)}: samples that are no numbers, or none (feedback.on_bad_audio=skip)."
            )
        if new := [name for name in bad if name not in self.left_out]:
            logging.warning(f"left out, since the audio cannot be read: {', '.join(new)}")
            self.left_out.update(new)
        return energy

    def _compare(self, names: Sequence[str], energy: Sequence[float]) -> None:
        """Refuses a name under which another recording was read before; all would learn the words of the first."""
        for name, value in zip(names, energy, strict=True):
            if self._compared and not math.isclose(self._energy.setdefault(name, value), value, rel_tol=1e-5):
                raise ManifestError(
                    f"two different recordings are called {name}: give their rows different paths or offsets."
                )

    def _about(self, ids: Any, b: int) -> _About:
        """What the manifest says of a row of the batch."""
        if isinstance(ids, torch.Tensor):
            index = int(ids[b])
            row = self._rows[self._collection[index].id if self._collection is not None else index]
            return _About(row.utterance, row.context, row.replay, row.external, row.text)
        # Shorter rows of a batch come as the recording with padding appended.
        cut = getattr(ids[b], "first_non_padding_cut", ids[b])
        custom = cut.custom or {}
        context, external = parse_context(custom.get("context")), parse_hypotheses(custom.get(KEY))
        text = " ".join(part.text for part in cut.supervisions if part.text)
        return _About(_cut_name(cut), context, str(custom.get("replay") or ""), external, text)


def _rows(four: Batch, mask: torch.Tensor) -> Batch | None:
    """The rows of NeMo's batch of four under a [B] mask, cut to their longest; None if there are none."""
    if not bool(mask.any()):
        return None
    signal, signal_len, tokens, tokens_len = four
    kept = mask.nonzero().flatten()
    span, width = int(signal_len[kept].max()), int(tokens_len[kept].max())
    return signal[kept][:, :span], signal_len[kept], tokens[kept][:, :width], tokens_len[kept]


def _cut_name(cut: Any) -> str:
    """A name that is stable over epochs; Lhotse's id of a file is its stem, which files in two folders may share.

    NeMo cuts segments out of tarred recordings, so that each starts at 0; the manifest's offset is in ``custom``.
    """
    sources = cut.recording.sources if cut.has_recording else []
    if sources and sources[0].type == "file":
        return f"{sources[0].source}@{cut.start:.3f}+{cut.duration:.3f}"
    custom = cut.custom or {}
    folder = custom.get("tar_origin") or custom.get("shard_id", "")
    member = cut.recording.id if cut.has_recording else cut.id
    return f"{folder}/{member}@{cut.start + (to_number(custom.get('offset')) or 0.0):.3f}+{cut.duration:.3f}"


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
    config = OmegaConf.create(plain(config))
    lhotse = bool(config.get("use_lhotse"))
    others = [key for key in ("input_cfg", "cuts_path", "shar_path") if config.get(key) is not None]
    others += ["text_field"] if config.get("text_field") not in (None, "text") else []
    faults += [
        f"model.train_ds.{key}: a run reads manifest_filepath and its key text alone: remove it." for key in others
    ]
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
            # Members whose rows were left out are no fault.
            config.skip_missing_manifest_entries = True
            config.global_rank, config.world_size = global_rank, world_size
            if config.get("shard_seed") is None and tarred is None and not config.get("force_iterable_dataset"):
                # A stream keeps NeMo's seed: each rank and worker must shuffle its share, differently in every pass.
                config.shard_seed = seed
        else:
            config.return_sample_id = True
    select_channels(config)
    return config
