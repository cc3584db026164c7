"""Switches rescoring on and off for a NeMo model, whatever decoding objects NeMo builds for it afterwards.

``enable_rescoring`` exchanges the model's class for a subclass of it, whose methods give NeMo an N-best configuration
and hook the decoding objects that it builds. The model's configuration stays as the user or the checkpoint wrote it,
so that a saved model is the stock one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nemo.collections.asr.parts.submodules.ctc_decoding import CTCBPEDecodingConfig, CTCDecodingConfig
from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTBPEDecodingConfig, RNNTDecodingConfig
from nemo.collections.asr.parts.utils.timestamp_utils import process_timestamp_outputs
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_llm_feedback.asr.checkpoints import supported_class
from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.likelihood.autograd import modes_of
from nemo_llm_feedback.core.config.faults import make
from nemo_llm_feedback.core.config.rescoring import RescoringConfig
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.types import Context, ExternalText
from nemo_llm_feedback.data.manifests import merge_context
from nemo_llm_feedback.rescoring.decoding import adopt
from nemo_llm_feedback.rescoring.scoring import Rescorer
from nemo_llm_feedback.rescoring.strategies import nbest_config, wants_nbest, wants_timestamps
from nemo_llm_feedback.rewards import Reward, as_reward
from nemo_llm_feedback.rewards.rules import RewardFunction

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


def enable_rescoring(
    model: Any,
    reward: Reward | RewardFunction | None = None,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    context: Context | None = None,
    nbest: int | None = None,
    boosted: int = RescoringConfig.boosted,
    term_swap: int = RescoringConfig.term_swap,
    boosting_weight: float = RescoringConfig.boosting_weight,
    normalizer: str = RescoringConfig.normalizer,
    memory_budget_mb: int = RescoringConfig.memory_budget_mb,
) -> None:
    """Makes all decoding with this model choose by log p(y|x) + α·reward + β·length.

    A greedy strategy is replaced by the family's batched beam (``beam_batch`` for CTC, ``malsd_batch`` for RNN-T and
    TDT); a beam strategy stays. Both heads of a hybrid are switched. Hypotheses carry ``score``,
    ``score_parts`` and, in ``n_best``, the whole ordered N-best with its parts; N-best lists are returned by a beam
    strategy with ``beam.return_best_hypothesis: false``. Calling it again replaces the settings.

    Args:
        model: a stock NeMo CTC, RNN-T, TDT or hybrid model, or one of this package.
        reward: judges the hypotheses, e.g. ``LLMReward``, which weighs log p(y|x) itself, or a Python function of the
            texts, whose value stands beside log p(y|x) here, so that it does not read ``ref_logp``; None = log p(y|x).
        alpha, beta: weights of any other reward and of the length; by default 1 and 0.
        context: the context of all utterances; see :func:`utterance_contexts` for one per utterance.
        nbest, boosted, term_swap, boosting_weight, normalizer, memory_budget_mb: see ``RescoringConfig``.

    Raises:
        CheckpointError: the model's class is not supported.
        ConfigError: the settings or the model's decoding configuration cannot be used.
    """
    given: dict[str, Any] = {"nbest": nbest, "boosted": boosted, "term_swap": term_swap, "reward": None}
    given |= {"boosting_weight": boosting_weight, "normalizer": normalizer, "memory_budget_mb": memory_budget_mb}
    settings = make(RescoringConfig, given, where="rescoring", what="the rescoring settings have")
    judge = None if reward is None else as_reward(reward)
    attach(model, Rescorer(judge, alpha=alpha, beta=beta, context=context or Context(), settings=settings))


def attach(model: Any, rescorer: Rescorer) -> None:
    """Switches rescoring on with a ready-made rescorer; see :func:`enable_rescoring`."""
    supported_class(model.cfg, origin=type(model).__name__)
    before = (type(model), getattr(model, "_rescorer", None))
    model._rescorer = rescorer
    model.__class__ = rescored_class(model.__class__)
    try:
        _rebuild(model)
    except Exception:
        model.__class__, model._rescorer = before
        _rebuild(model)
        raise


def disable_rescoring(model: Any) -> None:
    """Restores the model's stock class and its decoding strategy; does nothing where rescoring is off."""
    if isinstance(model, RescoringMixin):
        model.__class__ = type(model)._plain
        model._rescorer = None
        _rebuild(model)


@contextmanager
def utterance_contexts(
    model: Any,
    names: Sequence[str],
    contexts: Sequence[Context],
    external: Sequence[Sequence[ExternalText]] = (),
) -> Iterator[None]:
    """Inside, the rows of each decoded batch are these utterances, which NeMo's decoders do not know.

    Args:
        model: a model with rescoring on.
        names: a name per row, stable over runs.
        contexts: a context per row, merged over the model's.
        external: per row what other recognisers wrote, which is chosen among, too; () = nothing.

    Raises:
        ConfigError: rescoring is off.
    """
    if not isinstance(model, RescoringMixin):
        raise ConfigError("rescoring is off: call enable_rescoring(model, …) first.")
    rescorer: Rescorer = model._rescorer
    before = rescorer.batch
    merged = tuple(merge_context(rescorer.context, context) for context in contexts)
    rescorer.batch = tuple(names), merged, tuple(map(tuple, external)) or ((),) * len(merged)
    try:
        yield
    finally:
        rescorer.batch = before


@functools.cache
def rescored_class(cls: type) -> type:
    """The subclass of a model class with rescoring; it has the same name, since NeMo and its users print it."""
    if issubclass(cls, RescoringMixin):
        return cls
    return type(cls.__name__, (RescoringMixin, cls), {"_plain": cls, "__module__": cls.__module__})


class RescoringMixin(_Base):
    """Put before a NeMo ASR class, it turns every decoding object that NeMo builds into a rescoring one."""

    _plain: type
    _rescorer: Any

    def change_decoding_strategy(
        self, decoding_cfg: Any = None, decoder_type: Any = None, verbose: bool = True
    ) -> None:
        """NeMo's method; the strategy may be greedy, or any that gives an N-best.

        Args:
            decoding_cfg: NeMo's decoding configuration; None = that of the model.
            decoder_type: the head of a hybrid, ``rnnt`` or ``ctc``; None = ``rnnt``, as in NeMo.
            verbose: whether to log the configuration.

        Raises:
            ConfigError: the configuration cannot be rescored; the model keeps the one it had.
        """
        if isinstance(decoder_type, bool):  # NeMo's signature of models with one head
            decoder_type, verbose = None, decoder_type
        hybrid = hasattr(self, "cur_decoder")
        kind = "ctc" if decoder_type == "ctc" or not hasattr(self, "joint") else "transducer"
        section = self.cfg.aux_ctc if kind == "ctc" and hybrid else self.cfg
        asked = section.decoding if decoding_cfg is None else _completed(self, decoding_cfg, kind)
        rescorer: Rescorer = self._rescorer
        characters = getattr(self, "tokenizer", None) is None
        cfg = nbest_config(asked, kind=kind, nbest=rescorer.settings.nbest, characters=characters)
        if kind == "transducer" and hasattr(self.decoder, "context_size"):
            cfg.beam.allow_cuda_graphs = False  # NeMo's graphs know the LSTM's state only
        if kind == "transducer" and self.joint.num_extra_outputs:
            cfg.model_type = "tdt"  # without it NeMo takes a character TDT's durations for labels
        # Models with one head know no decoder_type.
        super().change_decoding_strategy(cfg, verbose=verbose, **({"decoder_type": decoder_type} if hybrid else {}))
        with open_dict(section):
            section.decoding = asked
        decoding = self.decoding if section is self.cfg else self.ctc_decoding
        (head,) = heads_of(self, which=kind, memory_budget_mb=rescorer.settings.memory_budget_mb)
        adopt(decoding, rescorer, head, align=wants_timestamps(asked), return_nbest=wants_nbest(asked))

    def change_vocabulary(self, *args: Any, **kwargs: Any) -> None:
        """NeMo's method; the new decoding objects rescore again."""
        super().change_vocabulary(*args, **kwargs)
        _rebuild(self)

    def _transcribe_on_begin(self, audio: Any, trcfg: Any) -> None:
        """NeMo's method; the train/eval mode of every module is noted."""
        self._modes = modes_of(self.modules())
        super()._transcribe_on_begin(audio, trcfg)

    def _transcribe_on_end(self, trcfg: Any) -> None:
        """NeMo's method, which would leave encoder, decoder and joint in train mode."""
        super()._transcribe_on_end(trcfg)
        for module, training in self.__dict__.pop("_modes", ()):
            module.training = training

    def _transcribe_output_processing(self, outputs: Any, trcfg: Any) -> list[Any]:
        """NeMo's method, which fails on N-best lists and puts log-probabilities where labels belong."""
        logits = outputs.get("logits")
        plain = dataclasses.replace(trcfg, return_hypotheses=False, timestamps=False)
        found = super()._transcribe_output_processing(outputs, plain)
        for b, hyps in enumerate(found):
            listed = hyps if isinstance(hyps, list) else [hyps]
            if logits is not None and trcfg.return_hypotheses:
                for hyp in listed:
                    hyp.alignments = logits[b, : hyp.length].detach().cpu().clone()
            if trcfg.timestamps:
                stride = self.cfg["preprocessor"]["window_stride"]
                process_timestamp_outputs(listed, self.encoder.subsampling_factor, stride)
        return list(found)


def _rebuild(model: Any) -> None:
    """Builds the decoding objects again from the model's configuration; the current head of a hybrid last."""
    current = getattr(model, "cur_decoder", None)
    heads = sorted(("rnnt", "ctc"), key=lambda name: name == current)
    for head in [{"decoder_type": name} for name in heads] if current else [{}]:
        model.change_decoding_strategy(None, verbose=False, **head)


def _completed(model: Any, given: Any, kind: str) -> DictConfig:
    """A user's configuration over NeMo's defaults, as NeMo would write it into the model's configuration."""
    if dataclasses.is_dataclass(given):
        given = OmegaConf.structured(given)
    config = (
        (CTCDecodingConfig, CTCBPEDecodingConfig) if kind == "ctc" else (RNNTDecodingConfig, RNNTBPEDecodingConfig)
    )
    defaults = OmegaConf.to_container(OmegaConf.structured(config[hasattr(model, "tokenizer")]))
    merged = OmegaConf.merge(OmegaConf.create(defaults), given)
    if kind == "transducer":
        merged = model.set_decoding_type_according_to_loss(merged)
    return DictConfig(merged)
