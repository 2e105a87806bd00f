"""Depth pruning: a dense model with fewer decoder layers (`moesaic prune --method depth`), in the same harness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...checkpoint.claim import remove
from ...checkpoint.sources import resolve
from ...compat import tied_weights
from ...config import PruneConfig
from ...evaluation.cost import ffn_of
from ...machine import peak_rss_bytes
from ...models.devices import choose_device, choose_dtype
from ...models.layerwise import LayerwiseModel
from ...pruning.depth.prepare import prepare
from ...pruning.finish import parameters
from ...pruning.prune import prune
from ...results import DepthResult
from ..rows import Measurement, Point
from .base import Baseline, Cost, Evaluate, Measured, Request, calibration


class Weights(NamedTuple):
    """How many weights a decoding step of one token reads in the parts of a dense model."""

    outside: int
    """Head and final norm."""
    layer: float
    """The mean of a decoder layer."""
    ffn: float
    """The mean of a layer's FFN."""
    layers: int

    @property
    def dense(self) -> float:
        """All of them."""
        return self.outside + self.layers * self.layer


def layers_at(weights: Weights, active: float) -> int:
    """Find the number of layers, at least 1, that read nearest to what a conversion reads at the ffn share `active`.

    A conversion reads `dense - (1 - active) * all FFNs`. A layer that goes takes its attention and norms with it, so at
    half of the FFNs' bytes 13 or 14 of the 24 layers of Qwen2.5-0.5B stay, not 12.
    """
    target = weights.dense - (1 - active) * weights.layers * weights.ffn
    return min(range(1, weights.layers + 1), key=lambda kept: abs(weights.outside + kept * weights.layer - target))


def weights_of(model: str) -> Weights:
    """Count the weights of a dense model, none of which is read.

    Raises:
        InputError: unknown model, or no dense one.
    """
    folder = resolve(model)
    layerwise = LayerwiseModel(folder, choose_dtype("auto", folder), choose_device("auto"))
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layerwise.layers]
    ffns = [sum(p.numel() for p in ffn_of(layer).parameters()) for layer in layerwise.layers]
    outside = parameters(layerwise.model)  # whose layers are stubs
    if not tied_weights(layerwise.model):
        outside -= layerwise.model.get_input_embeddings().weight.numel()
    return Weights(outside, sum(layers) / len(layers), sum(ffns) / len(ffns), len(layers))


@dataclass(frozen=True, kw_only=True)
class DepthPruned(Baseline):
    """The layers of least Block Influence go (ShortGPT), or a run of layers (`contiguous`), healed or not.

    Its budget is bytes, as everywhere in the frontier: `layers_at`. The row has the exact weights that a step reads
    (`active_parameters`) and, as `ffn_active`, the share at which a conversion reads as many. Its speed is measured: it
    is a dense model.
    """

    contiguous: bool = False

    def config(self, model: str, point: Point, measurement: Measurement) -> PruneConfig:
        """Make the configuration of the pruning."""
        return PruneConfig(
            method="depth:contiguous=True" if self.contiguous else "depth", recovery=self.recovery,
            layers=layers_at(weights_of(model), point.active), calibration=calibration(model, measurement),
            tokens=measurement.tokens, seed=point.seed,
        )  # fmt: skip

    def check(self, model: str, point: Point, measurement: Measurement) -> None:
        prepare(model, self.config(model, point, measurement))

    def measure(self, request: Request, evaluate: Evaluate) -> Measured:
        config, weights = self.config(request.model, request.point, request.measurement), weights_of(request.model)
        made = prune(request.model, request.work, config, overwrite=True, force=True)
        assert isinstance(made, DepthResult)
        found = evaluate(request.work)
        width = width_of(request.work)
        remove(request.work)
        kept, whole = made.num_hidden_layers, made.num_hidden_layers_before
        less = weights.dense - made.active_parameters
        return Measured(
            found,
            Cost(
                ffn_active=1 - less / (weights.layers * weights.ffn), active_parameters=made.active_parameters,
                plan=f"{kept} of {whole} layers", expert_width=width, memory=kept / whole, seconds=made.seconds,
                peak_rss_bytes=max(made.peak_rss_bytes, peak_rss_bytes()),
            ),
        )  # fmt: skip


def width_of(folder: Path) -> int:
    """Read how many neurons an FFN of a checkpoint has."""
    layerwise = LayerwiseModel(folder, choose_dtype("auto", folder), choose_device("auto"))
    return layerwise.config.intermediate_size
