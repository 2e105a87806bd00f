"""Results of `plan`, `convert` and `inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from .base import Json, Result
from .export import EngineChoice, WrittenGGUF
from .training import FinetuneResult


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Result):
    """How the conversion of one decoder layer went."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"error_by_modality", "expert_tokens_by_modality"})

    layer: int
    split_error: float
    """Error of the FFN as cut, relative to the dense FFN's output, over weighted calibration tokens."""
    error: float
    """The same after recovery."""
    expert_tokens: list[int]
    """Calibration tokens that run each routed expert."""
    unreached_experts: list[int]
    """Routed experts that no calibration token runs."""
    activation_rates: list[float]
    """Per-cent points over neurons of how often one is among the tenth that contribute most."""
    seconds: float
    stage_seconds: dict[str, float]
    stage_peak_rss_bytes: dict[str, int]
    """The process's largest resident set so far, after each stage."""
    error_by_modality: dict[str, float] | None = None
    """As `error`, over held-out tokens of `text` and of pictures (`image`) apart; None where there are no pictures."""
    expert_tokens_by_modality: dict[str, list[int]] | None = None
    """`expert_tokens` likewise."""
    residual_error: float | None = None
    """Mean relative distance of the residual stream from the dense model's, after the layer."""
    sink_norm: float | None = None
    """Norm of attention sinks over that in the dense model; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class RouterLesson(Result):
    """A router ahead of the model, and how well it learnt, on calibration tokens that it did not see."""

    groups: int
    """Groups of layers, each with a decision of its own."""
    parameters: int
    loss: float
    """Cross-entropy to what the layers teach, nats a decision."""
    least: float
    """The entropy of that, the least that the loss can be."""
    agreement: float
    """Share of decisions for the expert that the layers put first."""


@dataclass(frozen=True, kw_only=True)
class Trial(Result):
    """One way to cut that was tried on part of the model."""

    partition: str
    plan: str
    width: int
    """Neurons of a group."""
    held_out_loss: float
    """Nats a token."""


@dataclass(frozen=True, kw_only=True)
class PerplexityProtocol(Result):
    """What a perplexity was measured on."""

    text: str
    tokens: int
    window: int
    data_sha256: str


@dataclass(frozen=True, kw_only=True)
class Check(Result):
    """How far stock transformers is from moesaic on the same weights, in float32."""

    max_abs_logit_error: float
    """Over all tokens, also where a tie between experts was decided otherwise."""
    median_difference: float
    """Median difference of log-probabilities in nats, of the worst sequence."""
    agreement: float
    """Share of tokens with the same most likely next."""
    tokens: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class PictureResult(Result):
    """What a conversion does to what a vision-language model says of pictures."""

    perplexity_dense: float
    """The dense model's, on answers to questions about bundled held-out pictures."""
    perplexity: float
    held_out: str = "heldout"
    """Which of them: `heldout`, shapes, or `natural`, photographs and pages."""
    agreement: float | None
    """Share of the answers' tokens that both models put first; None after training, which has no dense model."""
    answer_tokens: int
    calibrated: bool
    """Whether pictures were among the calibration data."""
    image_weight: float


@dataclass(frozen=True, kw_only=True)
class LaterChange(Result):
    """What was done to a conversion after it had been made and its layers measured."""

    verb: str
    """`pruned` or `adapted`."""
    method: str
    what: str
    """What there is now, e.g. `2 of 3 experts a layer`."""
    perplexity_before: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class ConversionResult(Result):
    """What `convert` did; `metrics.json` in its output."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset(
        {"check", "finetune", "router", "pictures", "engine", "gguf", "changes"}
    )

    output: str
    format: str
    """How it is written: `moesaic`, or a stock architecture such as `glm4_moe`."""
    format_reason: str
    """Why it is no stock architecture, or nothing."""
    partition: str
    plan: str
    expert_width: int
    """Neurons of a group."""
    ffn_active: float
    """The ffn share: the part of the dense FFN's neurons that one token runs."""
    memory_factor: float
    """Neurons that are kept, relative to the dense FFN's."""
    total_parameters: int
    active_parameters: int
    """Parameters that one token runs."""
    dense_parameters: int
    perplexity_dense: float
    perplexity: float
    perplexity_protocol: PerplexityProtocol
    peak_rss_bytes: int
    layers: list[LayerRecord]
    fingerprint: dict[str, str]
    compute_dtype: str
    versions: dict[str, str]
    machine: str
    trials: list[Trial]
    logit_factor: float
    """By which the final norm, and with it all logits, were scaled."""
    seconds: float
    collapsed: bool
    engines: list[str]
    """Engines that load the output as it is."""
    check: Check | None = None
    finetune: FinetuneResult | None = None
    router: RouterLesson | None = None
    """What the router learnt, of a model that is routed ahead of its layers."""
    pictures: PictureResult | None = None
    """What is left of answers about pictures, of a vision-language model."""
    engine: EngineChoice | None = None
    """What an engine was chosen for, of a conversion for one."""
    gguf: WrittenGGUF | None = None
    """The file that was written, of a conversion for llama.cpp."""
    changes: list[LaterChange] | None = None
    """In their order; errors of layers and the plot of them are from before."""

    def worst_ratio(self) -> float:
        """Compute perplexity over the dense model's, of text or of answers about pictures, whichever is more."""
        ratios = [self.perplexity / self.perplexity_dense]
        if self.pictures is not None:
            ratios.append(self.pictures.perplexity / self.pictures.perplexity_dense)
        return max(ratios, key=lambda ratio: math.inf if math.isnan(ratio) else ratio)

    def judged(self, collapse_ratio: float) -> Self:
        """Note whether the worst ratio is above that of a collapse, or no number."""
        return replace(self, collapsed=not self.worst_ratio() <= collapse_ratio)

    def changed(self, verb: str, method: str, what: str, perplexity: float) -> Self:
        """Note what was done to the model later, and what its perplexity is now."""
        change = LaterChange(
            verb=verb, method=method, what=what, perplexity_before=self.perplexity, perplexity=perplexity
        )
        return replace(self, perplexity=perplexity, changes=[*(self.changes or []), change])


@dataclass(frozen=True, kw_only=True)
class Inspection(Result):
    """What a converted model says of itself."""

    folder: str
    model: str
    """The dense model it was made from."""
    architecture: str
    bytes: int
    moe: Mapping[str, int | str]
    """Fields of `config.json`: num_experts, num_experts_per_tok, ..."""
    config: Json
    """The conversion's settings."""
    metrics: ConversionResult

    def to_dict(self) -> Json:
        values = super().to_dict()
        del values["metrics"]
        return values | self.metrics.to_dict()


@dataclass(frozen=True, kw_only=True)
class PlanChoice(Result):
    """One shape near a budget."""

    partition: str
    plan: str
    expert_width: int
    ffn_active: float
    memory_factor: float
    total_parameters: int
    active_parameters: int
    decode_limit: float
    """Weights that a decoding step reads in the dense model over those in this one."""
    prefill_limit: float
    """The same of what a prompt's token multiplies with."""
    format: str
    format_reason: str
    engines: list[str]
    good_for: list[str]
    """Engines that load it and were measured to run experts of that width well."""
    gguf: list[str]
    """Types of GGUF that hold it."""
    options: str
    """With which `moesaic convert` makes it."""


@dataclass(frozen=True, kw_only=True)
class Plans(Result):
    """Shapes near a budget, specialists first."""

    omitted_when_none: ClassVar[frozenset[str]] = frozenset({"engine"})

    model: str
    intermediate_size: int
    """Neurons of the dense FFN."""
    active: float
    choices: list[PlanChoice]
    """The first is the one that `convert` takes for the engine, where one is given."""
    engine: EngineChoice | None = None
