"""Results of `prune`."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Result
from .conversion import PerplexityProtocol


@dataclass(frozen=True, kw_only=True)
class PrunedLayer(Result):
    """How the pruning of one decoder layer went."""

    layer: int
    kept: list[int]
    """The experts that stayed, by their numbers in the source; empty for a layer that is dense."""
    expert_tokens_before: list[int]
    """Calibration tokens that ran each expert of the source."""
    expert_tokens: list[int]
    """Calibration tokens that run each expert that stayed."""
    split_error: float
    """Error of the routed experts' output, relative to all experts', over calibration tokens: without recovery."""
    error: float
    """The same after recovery."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PruningResult(Result):
    """What `prune` did; `pruning.json` in its output."""

    output: str
    model: str
    architecture: str
    method: str
    recovery: str
    num_experts_before: int
    num_experts: int
    num_experts_per_tok: int
    total_parameters_before: int
    total_parameters: int
    perplexity_before: float
    perplexity: float
    perplexity_protocol: PerplexityProtocol
    layers: list[PrunedLayer]
    max_abs_logit_error: float | None
    """Between the output as transformers loads it and the run layer by layer; None where it does not fit in memory."""
    notes: list[str]
    """What else was changed or left out, for people."""
    collapsed: bool
    seed: int
    fingerprint: dict[str, str]
    compute_dtype: str
    versions: dict[str, str]
    machine: str
    peak_rss_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class HealedLayer(Result):
    """How a decoder layer that stays went."""

    layer: int
    """Its number in the pruned model."""
    source_layer: int
    """Its number in the source."""
    healed: bool
    """Whether its down-projection was fitted again."""
    split_error: float | None
    """Error of the residual stream where the next layer that stays takes over, relative to the source's there, over
    calibration tokens: with this layer as it was. None without recovery, which needs no calibration tokens here."""
    error: float | None
    """The same after recovery."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DepthResult(Result):
    """What `prune` did to a model's layers; `pruning.json` in its output."""

    output: str
    model: str
    architecture: str
    method: str
    recovery: str
    num_hidden_layers_before: int
    num_hidden_layers: int
    removed_layers: list[int]
    """By their numbers in the source."""
    distances: list[float]
    """What the method went by: of `depth` each layer's Block Influence, or the angular distance over the run of layers
    that begins there."""
    total_parameters_before: int
    total_parameters: int
    active_parameters_before: int
    """Weights that a decoding step of one token reads: all but an embedding that is not the head too."""
    active_parameters: int
    perplexity_before: float
    perplexity: float
    logit_factor: float
    """The temperature, in the final norm's weight; 1 without recovery."""
    perplexity_protocol: PerplexityProtocol
    layers: list[HealedLayer]
    max_abs_logit_error: float | None
    """Between the output as transformers loads it and the run layer by layer; None where it does not fit in memory."""
    notes: list[str]
    """What else was changed or left out, for people."""
    collapsed: bool
    seed: int
    fingerprint: dict[str, str]
    compute_dtype: str
    versions: dict[str, str]
    machine: str
    peak_rss_bytes: int
    seconds: float
