"""Groups of flags that commands share: dataclasses whose fields are flags and whose docstrings are their help.

Seconds of wall time for ``score --help`` on two CPU cores: cyclopts 0.17 (argparse by hand: 0.05); for a command with
ten flags cyclopts 0.12, simple-parsing 0.09, jsonargparse 0.14, tyro 0.15, pydantic-settings 0.17. cyclopts takes
nested dataclasses, lists without brackets and flags with an optional value; its errors name the nearest flag.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

HeadName = Literal["auto", "ctc", "transducer"]
Cuda = Annotated[int | None, Parameter(help="number of the GPU, -1 = CPU; default: GPU 0 if there is one")]
TermsFile = Annotated[
    str | None, Parameter(help="terms that may occur: one per line, a JSON list, or a JSON object of lists")
]
_RESCORING = Group("Rescoring", help="score = log p(text|audio) + alpha·log p(text|context) + beta·words")
JsonFile = Annotated[str | None, Parameter(help="write everything here too, as JSON")]
NoAudio = Annotated[bool, Parameter(help="no audio in the page, for private data")]


@Parameter(name="*")
@dataclass(frozen=True)
class JudgeOptions:
    """What judges hypotheses; None leaves the value of the configuration.

    Attributes:
        llm: folder, hub id or GGUF file of the causal LM
        description: completes 'a transcript of …', e.g. 'an order at a coffee shop'
        terms_file: terms that may occur: one per line, or JSON
        alpha: weight of the LLM (reward.alpha)
        beta: bonus per word, in nats (reward.beta)
        overrides: settings as `adapt` takes them, e.g. reward=entity reward.settings.weight=3
    """

    _: KW_ONLY
    llm: str | None = None
    description: str | None = None
    terms_file: TermsFile = None
    alpha: float | None = None
    beta: float | None = None
    overrides: Annotated[tuple[str, ...], Parameter(name="--set")] = ()

    def settings(self) -> dict[str, Any]:
        """The flags that are given, as keys of the configuration; without ``overrides``."""
        flags = {
            "llm.model": self.llm,
            "context.description": self.description,
            "context.terms_file": self.terms_file,
            "reward.alpha": self.alpha,
            "reward.beta": self.beta,
        }
        return {key: value for key, value in flags.items() if value is not None}


@Parameter(name="*", group=_RESCORING)
@dataclass(frozen=True)
class RescoringFlags:
    """What rescoring is made of beside its judge.

    Attributes:
        rescore: choose among the N-best with an LLM
        rescoring: settings as YAML (conf/rescoring.yaml); flags win
        quantization: quantisation of the LLM
        no_context: allow utterances without any context
        beam_size: hypotheses of the first pass
        boosted: more hypotheses from a beam boosted on the terms
        boosting_weight: weight of the terms in that beam
        term_swap: more hypotheses with terms swapped in
    """

    _: KW_ONLY
    rescore: bool = False
    rescoring: str | None = None
    quantization: Literal["nf4", "int8", "none"] | None = None
    no_context: bool = False
    beam_size: int | None = None
    boosted: int | None = None
    boosting_weight: float | None = None
    term_swap: int | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


@Parameter(name="*")
@dataclass(frozen=True)
class ScoringFlags:
    """How transcripts are scored.

    Attributes:
        normalizer: text normalisation of reference and transcript
        description: the domain in words, for the report
        terms: terms whose false alarms are counted
        entities_key: manifest key of the entities
        missing_entities: what to do with entities that their reference lacks
        group_by: manifest keys, e.g. speaker domain: a table per value
        samples: bootstrap resamples
        seed: seed of the bootstrap
    """

    _: KW_ONLY
    normalizer: Literal["none", "lower", "basic"] = "basic"
    description: Annotated[str, Parameter(name=("--description", "--context"))] = ""
    terms: tuple[str, ...] = ()
    terms_file: TermsFile = None
    entities_key: str = "entities"
    missing_entities: Literal["error", "skip"] = "error"
    group_by: tuple[str, ...] = ()
    samples: int = 2000
    seed: int = 0


@Parameter(name="*")
@dataclass(frozen=True)
class ProbeOptions:
    """N-best lists with their rewards, of rows of a manifest.

    Attributes:
        checkpoint: .nemo file or pretrained name
        manifest: NeMo manifest, with text or without
        utterances: rows that are taken, spread evenly over the manifest; 0 = all
        head: head of a hybrid model
        batch_size: utterances per batch of the recogniser
        cache: file or folder of LLM scores: those of earlier runs are read, new ones added
    """

    checkpoint: str
    _: KW_ONLY
    manifest: str
    utterances: int = 10
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    head: HeadName | None = None
    batch_size: int = 16
    cache: str | None = None


@Parameter(name="*")
@dataclass(frozen=True)
class Segmenting:
    """How recordings are cut, in seconds.

    Attributes:
        min_duration: shorter segments are left out
        max_duration: longer ones are split at their longest silences
        merge_gap: speech with less silence between is one segment, as long as it stays under the maximum
        padding: audio kept on both sides of speech, half the silence at most
        threshold: speech probability from which a frame is speech, 0 to 1
    """

    _: KW_ONLY
    min_duration: float = 1.0
    max_duration: float = 20.0
    merge_gap: float = 0.5
    padding: float = 0.2
    threshold: float = 0.5

    def validate(self) -> list[str]:
        """Returns every fault as a sentence."""
        faults = []
        if not 0 < self.min_duration < self.max_duration:
            faults.append(
                f"--min-duration and --max-duration must be 0 < min < max, got {self.min_duration} and "
                f"{self.max_duration}."
            )
        if self.merge_gap < 0 or self.padding < 0:
            faults.append(f"--merge-gap and --padding must be ≥ 0, got {self.merge_gap} and {self.padding}.")
        if self.padding * 2 >= self.max_duration - 0.5:
            faults.append(f"--padding {self.padding} leaves no room for speech in --max-duration {self.max_duration}.")
        if not 0 < self.threshold < 1:
            faults.append(f"--threshold must be in (0, 1), got {self.threshold}.")
        return faults
