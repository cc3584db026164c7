"""Stock models for the tests of rescoring, each restored once, and decoding through NeMo's choke points."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nemo.collections.asr.models import ASRModel
from omegaconf import OmegaConf

from nemo_llm_feedback.asr.heads import heads_of
from nemo_llm_feedback.asr.reference import evaluation_mode
from nemo_llm_feedback.core.trie import PrefixTrie
from nemo_llm_feedback.rescoring import RescoringMixin, disable_rescoring

_RESTORED: dict[str, tuple[Any, Any]] = {}


@contextmanager
def stock_models(nemo_file: Any) -> Iterator[Callable[..., Any]]:
    """Yields ``get(kind)``: a model in eval mode, as it was restored; one got ``fresh`` may be spoilt by its test."""
    lent = []

    def get(kind: str, *, fresh: bool = False) -> Any:
        if fresh or kind not in _RESTORED:
            model = ASRModel.restore_from(str(nemo_file(kind)), map_location="cpu").eval()
            if fresh:
                return model
            _RESTORED[kind] = (model, copy.deepcopy(model.cfg))
        lent.append(kind)
        return _RESTORED[kind][0]

    yield get
    for kind in dict.fromkeys(lent):
        model, cfg = _RESTORED[kind]
        model.cfg = copy.deepcopy(cfg)
        if isinstance(model, RescoringMixin):
            disable_rescoring(model)  # builds the decoders anew from the configuration
        elif hasattr(model, "cur_decoder"):
            for head in ("ctc", "rnnt"):
                model.change_decoding_strategy(None, decoder_type=head, verbose=False)
        else:
            model.change_decoding_strategy(cfg.get("decoding", {}), verbose=False)
        model.eval()


def encoded(rows: int = 2, frames: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 16, frames] and lengths, the last row shorter."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, 16, frames, generator=generator), torch.tensor([frames] * (rows - 1) + [frames - 4])


def decode(model: Any, x: torch.Tensor, lengths: torch.Tensor, *, ctc: bool = False) -> list[Any]:
    """Through the choke point that transcribe, WER and predict_step share."""
    hybrid = hasattr(model, "ctc_decoder")
    with torch.no_grad():
        if hasattr(model, "joint") and not ctc:
            return model.decoding.rnnt_decoder_predictions_tensor(x, lengths)
        decoder, decoding = (model.ctc_decoder, model.ctc_decoding) if hybrid else (model.decoder, model.decoding)
        return decoding.ctc_decoder_predictions_tensor(decoder(encoder_output=x), lengths)


def exact(model: Any, labels: list[int], x: torch.Tensor, lengths: torch.Tensor, row: int) -> float:
    with torch.no_grad(), evaluation_mode(model):
        trie = PrefixTrie.build([labels], [row])
        return float(heads_of(model)[0].log_prob(x, lengths, trie)[0])


def decoding_cfg(model: Any, **beam: Any) -> Any:
    """A copy of the model's decoding configuration with other ``beam`` values; ``strategy`` goes to the top."""
    cfg = OmegaConf.create(OmegaConf.to_container(model.cfg.decoding) if "decoding" in model.cfg else {})
    strategy = beam.pop("strategy", None)
    return OmegaConf.merge(cfg, {"beam": beam, **({"strategy": strategy} if strategy else {})})
