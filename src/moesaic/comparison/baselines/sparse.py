"""Dense FFNs that skip weights token by token, and what they need to learn: thresholds, a down-projection.

Every weight is kept and a token reads some of them, so nothing is won but at batch 1, and only with kernels that skip
rows or columns; here all is computed and masked. Shapes: T tokens, C of a chunk, D hidden size, F neurons, N sequences,
L tokens in one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ...calibration.activations import LayerActivations
from ...calibration.layers import calibrate, replaced_ffn
from ...calibration.sinks import opening_targets
from ...checkpoint.claim import remove
from ...checkpoint.sources import resolve
from ...checkpoint.writer import ResumableOutput
from ...config import ConvertConfig
from ...conversion.temperature import fit_temperature
from ...conversion.tokens import ConversionTokens, tokenise
from ...errors import InputError
from ...evaluation.cost import active_weights
from ...machine import give_back_memory, versions
from ...models.devices import choose_device, choose_dtype, compute_dtype
from ...models.families import GatedFFN, decoder_layers, ffn_name, gated_ffn
from ...models.layerwise import LayerwiseModel
from ...recovery._refit import FitSample, refit, weighted_error
from ..rows import Measurement, Point
from .base import BATCH_1, Baseline, Cost, Evaluate, Measured, Request, calibration

Tensors = Mapping[str, Tensor]
DOWN = "down_proj"
MOST_VALUES = 1 << 24
"""Values that a threshold is taken from: enough for a quantile, few for memory."""


class SparseFFN(nn.Module, ABC):
    """A dense FFN of which each token reads a part; it counts how much."""

    def __init__(self, ffn: GatedFFN, tensors: Tensors, density: float) -> None:
        super().__init__()
        down_DF = tensors.get(DOWN)
        self.ffn = ffn if down_DF is None else replace(ffn, down_DF=down_DF.to(ffn.down_DF))
        self.density = density
        self.tokens, self.read = 0, 0.0
        """Tokens so far, and the shares of the FFN's weights that they read, added up."""

    @abstractmethod
    def hidden(self, x_TD: Tensor) -> Tensor:
        """Compute the neurons' activations, 0 where a token skips them, [T, F]."""

    def count(self, *kept: Tensor) -> None:
        """Count what tokens read, from what is kept of each matrix's rows or columns, bool [T, ...]."""
        shares = [part_TX.float().mean(-1) for part_TX in kept]
        self.tokens += shares[0].numel()
        self.read += sum(share_T.double().sum().item() for share_T in shares) / len(shares)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(self.hidden(hidden_states), self.ffn.down_DF)


def largest(value_TX: Tensor, density: float) -> Tensor:
    """Tell which are among the share `density`, at least one, of largest values of each token: bool [T, X]."""
    size = value_TX.shape[-1]
    index_TK = value_TX.topk(max(1, min(size, round(density * size))), dim=-1, sorted=False).indices
    return torch.zeros_like(value_TX, dtype=torch.bool).scatter_(-1, index_TK, True)


def threshold(values: Iterable[Tensor], density: float) -> Tensor:
    """Find the value that a share `density` of all values reach: a scalar, float32; every `value >= it` is kept."""
    flat = torch.cat([part.flatten().float() for part in values])
    rank = flat.numel() - max(1, min(flat.numel(), round(density * flat.numel())))
    return flat.kthvalue(rank + 1).values


def few(sample: LayerActivations, width: int) -> LayerActivations:
    """Take evenly spaced tokens, as many as have `MOST_VALUES` values of `width` each."""
    return sample.every(-(-sample.tokens * width // MOST_VALUES))


@dataclass(frozen=True, kw_only=True)
class Sparsity(Baseline):
    """A baseline that skips weights of dense FFNs token by token."""

    ffn_class: ClassVar[type[SparseFFN]]
    bound: ClassVar[str] = BATCH_1

    def density(self, active: float) -> float:
        """Find the share of rows or columns that are chosen, where a share `active` of the weights is read.

        Raises:
            UndefinedBudget: there is none.
        """
        return active

    @abstractmethod
    def fit(self, sample: LayerActivations, density: float) -> Tensors:
        """Learn a layer's thresholds from its calibration tokens."""

    def ffn(self, ffn: GatedFFN, tensors: Tensors, density: float) -> SparseFFN:
        """Make the FFN of one layer."""
        return self.ffn_class(ffn, tensors, density)

    def check(self, model: str, point: Point, measurement: Measurement) -> None:
        self.density(point.active)
        layerwise = open_dense(model)
        if self.calibrated:
            tokens_of(model, layerwise, self, point, measurement)

    def measure(self, request: Request, evaluate: Evaluate) -> Measured:
        start, density = time.monotonic(), self.density(request.point.active)
        learnt = walk(request, self, density) if self.calibrated else unlearnt()
        seconds = time.monotonic() - start
        costs: list[Cost] = []

        @contextmanager
        def altered(model: PreTrainedModel) -> Iterator[None]:
            dense = active_weights(model)
            with sparse(model, self, density, learnt) as ffns:
                yield
            weights = sum(f.ffn.gate_FD.numel() + f.ffn.up_FD.numel() + f.ffn.down_DF.numel() for f in ffns)
            share = sum(f.read for f in ffns) / max(1, sum(f.tokens for f in ffns))
            reads = dense - (1 - share) * weights
            costs.append(
                Cost(
                    ffn_active=share, active_parameters=round(reads), memory=1.0, speedup=dense / reads,
                    speed_is="limit", bound=self.bound, seconds=seconds,
                )
            )  # fmt: skip

        found = evaluate(request.model, altered)
        if learnt.output is not None:
            remove(learnt.output.folder)
        return Measured(found, costs[0])


@dataclass(frozen=True)
class Learnt:
    """What was learnt from calibration text."""

    layers: Sequence[Tensors]
    """Of each layer; empty where nothing is learnt."""
    outside: Tensors
    """Parameters outside of layers that changed, by their names: the temperature's."""
    output: ResumableOutput | None
    """Where it lies."""


def unlearnt() -> Learnt:
    """Give what a method has that learns nothing."""
    return Learnt([], {}, None)


@contextmanager
def sparse(model: PreTrainedModel, method: Sparsity, density: float, learnt: Learnt) -> Iterator[list[SparseFFN]]:
    """Put a method's FFNs into a dense model, which is dense again on leaving."""
    layers = list(decoder_layers(model))
    names = [ffn_name(layer) for layer in layers]
    modules = [layer.get_submodule(name) for layer, name in zip(layers, names, strict=True)]
    named = dict(model.named_parameters())
    before = {name: named[name].data.clone() for name in learnt.outside}
    made = [
        method.ffn(gated_ffn(module), tensors, density)
        for module, tensors in zip(modules, learnt.layers or [{}] * len(modules), strict=True)
    ]
    try:
        for name, tensor in learnt.outside.items():
            named[name].data.copy_(tensor)
        for layer, name, ffn in zip(layers, names, made, strict=True):
            setattr(layer, name, ffn)
        yield made
    finally:
        for name, tensor in before.items():
            named[name].data.copy_(tensor)
        for layer, name, module in zip(layers, names, modules, strict=True):
            setattr(layer, name, module)


def open_dense(model: str) -> LayerwiseModel:
    """Open a dense text model to run layer by layer.

    Raises:
        InputError: unknown, damaged, no dense gated FFNs, or it takes pictures.
    """
    folder, device = resolve(model), choose_device("auto")
    layerwise = LayerwiseModel(folder, compute_dtype(choose_dtype("auto", folder), device), device)
    if layerwise.takes_pictures:
        raise InputError(f"'{model}' takes pictures, and methods that skip single weights are measured on text models")
    return layerwise


def tokens_of(
    model: str, layerwise: LayerwiseModel, method: Sparsity, point: Point, measurement: Measurement
) -> ConversionTokens:
    """Tokenise the calibration text as a conversion does.

    Raises:
        InputError: it is missing or too short.
    """
    config = ConvertConfig(
        calibration=calibration(model, measurement),
        tokens=measurement.tokens,
        seed=point.seed,
        recovery=method.recovery,
    )
    return tokenise(resolve(model), config, min(config.window, layerwise.config.max_position_embeddings))


@torch.no_grad()
def walk(request: Request, method: Sparsity, density: float) -> Learnt:
    """Learn layer by layer, on the path of layers that skip already, as conversions do; resumable.

    With closed-form recovery each down-projection is solved again for what the tokens do not skip, `refit` with h
    masked towards the dense FFN's output, and at the end the temperature is fitted.
    """
    layerwise = open_dense(request.model)
    tokens = tokens_of(request.model, layerwise, method, request.point, request.measurement)
    output = ResumableOutput(request.work, _fingerprint(layerwise, tokens, method, density), resume=True)
    layerwise.load_embeddings_and_head()
    texts = {
        "calibration": tokens.calibration_NL, "opening": tokens.opening_M1, "validation": tokens.validation_NL
    }  # fmt: skip
    embedded = {name: layerwise.embed(tokens_NL) for name, tokens_NL in texts.items() if len(tokens_NL)}
    states = output.hidden(layerwise.device, layerwise.dtype)
    if states is None:
        states = embedded | {f"dense_{name}": h.clone() for name, h in embedded.items() if name == "opening"}
        output.start(states)
    for index in range(len(output.layers), len(layerwise.layers)):
        tensors = learn_layer(layerwise, index, method, density, states, tokens.domain_N)
        output.add_layer({name: tensor.clone() for name, tensor in tensors.items()}, states, {"layer": index})
        give_back_memory()
    layers = [load_file(output.folder / output.shard(index)) for index in range(len(layerwise.layers))]
    outside: Tensors = {}
    if method.recovery != "none" and "validation" in states:
        outside = fit_temperature(layerwise, tokens.validation_NL, states["validation"]).tensors
    return Learnt(layers, outside, output)


def learn_layer(
    layerwise: LayerwiseModel, index: int, method: Sparsity, density: float, states: dict[str, Tensor], domain_N: Tensor
) -> Tensors:
    """Learn one layer, and move `states` through it."""
    with layerwise.layer(index) as layer:
        opening = None
        if "opening" in states:
            opening = opening_targets(layerwise, index, layer, states["opening"], states["dense_opening"])
        sample = calibrate(layerwise, index, layer, states["calibration"], domain_N, opening)
        tensors = dict(method.fit(sample, density))
        ffn = method.ffn(sample.ffn, tensors, density)
        if method.recovery != "none":
            tensors[DOWN] = recovered(ffn, sample)
            ffn = method.ffn(sample.ffn, tensors, density)
        with replaced_ffn(layer, ffn):
            run = partial(layerwise.run, index, layer)
            states |= {name: run(h_NLD) for name, h_NLD in states.items() if name != "dense_opening"}
        if opening is not None:
            states["dense_opening"] = opening.dense_after_M1D
    return tensors


def recovered(ffn: SparseFFN, sample: LayerActivations) -> Tensor:
    """Solve the down-projection again for what is not skipped; its own where that is not better on these tokens."""
    rows, own_DF = FitSample.of(sample), sample.ffn.down_DF
    new_DF = refit(ffn.hidden, own_DF, rows).to(own_DF.dtype)

    def error(down_DF: Tensor) -> float:
        parts = ((part, linear(ffn.hidden(part.input_TD), down_DF)) for part in rows.chunks())
        return sum(weighted_error(part, output_CD) for part, output_CD in parts)

    return new_DF if error(new_DF) <= error(own_DF) else own_DF


def _fingerprint(
    layerwise: LayerwiseModel, tokens: ConversionTokens, method: Sparsity, density: float
) -> dict[str, str]:
    return {
        "model": layerwise.checkpoint.fingerprint(), "tokens": tokens.fingerprint(), "method": f"{method} {density}",
        "device": layerwise.device.type, "compute dtype": str(layerwise.dtype),
        "version": " ".join(f"{name} {version}" for name, version in versions().items()),
    }  # fmt: skip
