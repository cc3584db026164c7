"""Checks whether a NeMo decoding configuration can be rescored, and changes it so that NeMo returns an N-best."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_llm_feedback.core.config.faults import refuse
from nemo_llm_feedback.core.config.rescoring import DEFAULT_NBEST

GREEDY = ("greedy", "greedy_batch")
BATCHED_BEAM = {"ctc": "beam_batch", "transducer": "malsd_batch"}
# Not pyctcdecode, which returns text that NeMo tokenizes again: log p is then that of the tokenizer's spelling, and
# lower than that of the labels found.
RESCORABLE = {"ctc": ("beam_batch",), "transducer": ("malsd_batch", "maes_batch", "maes", "beam")}
_FUSION = ("ngram_lm_model", "ngram_lm_alpha", "boosting_tree", "boosting_tree_alpha")
_FUSING = ("beam_batch", "malsd_batch")
_CONFIDENCE = ("preserve_frame_confidence", "preserve_token_confidence", "preserve_word_confidence")


def nbest_config(given: DictConfig, *, kind: str, nbest: int | None, characters: bool) -> DictConfig:
    """The configuration that NeMo's decoding object is built from so that it returns an N-best.

    Greedy strategies become the family's batched beam and keep their n-gram model and boosting tree. What a beam
    cannot do is refused. CTC's word bonus ``beam_beta``, which is 1 by default and unfounded where log p decides in
    the end, is switched off; another value is kept.

    Args:
        given: NeMo's decoding configuration as the user or the checkpoint has it; not changed.
        kind: ``ctc`` or ``transducer``.
        nbest: beam size, or None for that of the configuration.
        characters: whether it is for a character model, for which NeMo has no boosting tree.

    Raises:
        ConfigError: every reason why it cannot be rescored, with the fix.
    """
    # Plain, since the typed sections of NeMo's scripts accept no key but their dataclass's, `max_symbols` for one.
    cfg = DictConfig(OmegaConf.create(OmegaConf.to_container(given, resolve=True)))
    strategy = str(cfg.get("strategy") or GREEDY[1])
    for section in ("beam", "greedy"):
        if cfg.get(section) is None:
            cfg[section] = {}
    if strategy in GREEDY:
        cfg.strategy, cfg.beam.beam_size = BATCHED_BEAM[kind], nbest or DEFAULT_NBEST
        cfg.beam.update({key: cfg.greedy[key] for key in _FUSION if cfg.greedy.get(key) is not None})
        symbols = cfg.greedy.get("max_symbols") or cfg.greedy.get("max_symbols_per_step")
        if kind == "transducer" and symbols:
            cfg.beam.max_symbols = int(symbols)  # the batched beam reads this key, not max_symbols_per_step
    elif nbest is not None:
        cfg.beam.beam_size = nbest
    refuse("this decoding configuration cannot be rescored:", _faults(cfg, strategy, kind, characters))
    cfg.beam.return_best_hypothesis = False
    cfg.compute_timestamps = False  # N-best decoders give none; the chosen hypothesis is aligned afterwards
    cfg.preserve_alignments = False
    if kind == "ctc":
        cfg.beam.compute_timestamps = False
        if cfg.beam.get("beam_beta", 1.0) == 1.0:
            cfg.beam.beam_beta = 0.0
    return cfg


def wants_timestamps(given: DictConfig) -> bool:
    """Whether a decoding configuration asks for timestamps, in any of the places that NeMo reads."""
    if given.get("compute_timestamps") is not None:
        return bool(given.compute_timestamps)
    section = "greedy" if str(given.get("strategy") or GREEDY[1]) in GREEDY else "beam"
    return bool((given.get(section) or {}).get("compute_timestamps"))


def wants_nbest(given: DictConfig) -> bool:
    """Whether a decoding configuration asks for the whole N-best: a beam with ``return_best_hypothesis: false``.

    Released transducers have that key beside a greedy strategy, which gives one hypothesis.
    """
    greedy = str(given.get("strategy") or GREEDY[1]) in GREEDY
    return not (greedy or (given.get("beam") or {}).get("return_best_hypothesis", True))


def _faults(cfg: DictConfig, asked: str, kind: str, characters: bool) -> list[str]:
    """Why a beam configuration cannot be rescored; ``asked`` is the strategy that the user gave."""
    strategy, best = str(cfg.strategy), BATCHED_BEAM[kind]
    faults = []
    if strategy not in RESCORABLE[kind]:
        faults.append(
            f"strategy={asked} gives no N-best that can be used; set strategy={best} "
            f"(known: {', '.join((*GREEDY, *RESCORABLE[kind]))})."
        )
    if int(cfg.beam.get("beam_size") or 1) < 2:
        faults.append("beam.beam_size=1 leaves no choice; set beam.beam_size to 2 or more.")
    fused = [key for key in ("ngram_lm_model", "boosting_tree") if _is_set(cfg.beam.get(key))]
    if fused and strategy not in _FUSING:
        faults.append(f"beam.{' and beam.'.join(fused)} need strategy={best}: NeMo's {strategy} has no such fusion.")
    if "boosting_tree" in fused and characters:
        faults.append(
            "beam.boosting_tree: NeMo builds no tree for character models; set boosted=8 in the rescoring settings, "
            "which boosts the context's terms."
        )
    if cfg.get("preserve_alignments") or cfg.beam.get("preserve_alignments"):
        faults.append("preserve_alignments: an N-best has none; set it to false or disable rescoring.")
    confidence = cfg.get("confidence_cfg") or {}
    if any(confidence.get(key) for key in _CONFIDENCE):
        faults.append("confidence_cfg: beams estimate no confidence; switch it off or disable rescoring.")
    return faults


def _is_set(value: Any) -> bool:
    """Whether a fusion key names anything; NeMo's default boosting tree is a section of nulls."""
    if value is None or isinstance(value, str):
        return bool(value)
    names = ("model_path", "key_phrases_file", "key_phrases_list", "key_phrase_items_list")
    return any(value.get(name) for name in names)
